"""DeeR-VLA (2411.02359): leave the layers as soon as another exit would not change the action.

Our reimplementation of the idea, after the authors' code (yueyang130/DeeR-VLA): exits every few
layers, their losses summed with equal weights, and a threshold of each exit from quantiles over
demonstrations, shares of leaving ∝ ratio^i. [our choice]: exits are joint, of both streams, each
with a scale behind the shared final norm and a projection to actions of its own; an exit's action
is the first integration step's velocity, and the depth found is kept for all steps; the loss is
task + velocity; the code's extra exit over randomly drawn layers is left out. All layers stay in
memory. No input leaves at the first exit, which has none before it to compare with.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from shallow_pi.deploy import policy as deployed
from shallow_pi.distill import flow, gates
from shallow_pi.evaluation.rivals import gated, rival, training
from shallow_pi.inference import forward, prepare
from shallow_pi.models import gemma, layers, pi0
from shallow_pi.models import observation as observations

# Batches over which thresholds are calibrated.
CALIBRATION = 4


@dataclasses.dataclass(frozen=True)
class EarlyExit:
    """Options."""

    # Layers between exits.
    every: int = 3
    # Share of those who leave at an exit to those who leave at the one before.
    ratio: float = 0.5
    # Training steps; a student's on the tabletop.
    steps: int = 1200

    def __post_init__(self) -> None:
        if min(self.every, self.steps) < 1 or not self.ratio > 0:
            raise ValueError(
                f"earlyexit: every and steps are at least 1 and ratio above 0, got {self}"
            )

    def exits(self, depth: int) -> tuple[int, ...]:
        """Layers before each exit; the last is behind all."""
        return (*range(self.every, depth, self.every), depth)

    def shares(self, depth: int) -> Float[np.ndarray, " x"]:
        """The share that leaves at each exit; none at the first of several."""
        count = len(self.exits(depth))
        raw = self.ratio ** np.arange(count) * (np.arange(count) > 0 if count > 1 else 1)
        return np.asarray(raw / raw.sum())

    def make(self, material: rival.Material, folder: pathlib.Path) -> deployed.Policy:
        """Train all exits together, then calibrate the thresholds."""
        model, every = material.model, self.exits(material.model.depth)

        def loss(held: training.Trained, seen: training.Seen) -> Float[Array, ""]:
            drawn = seen.drawn
            prefix = gates.embed(model, held.model, drawn.observation, seen.image_tokens)
            given = (drawn.observation.state, drawn.x_t, drawn.t)
            behind = gates.run(model, held.model, prefix, *given).suffix
            condition = gates.condition(model, held.model, drawn.t)
            total = jnp.zeros(())
            for i, depth in enumerate(every):
                v = _read(model, held, behind[depth - 1], condition, i)
                total += training.task_and_velocity(v, seen) / len(every)
            return total

        start = training.Trained(material.params, init(material.params, len(every)))
        kept = training.fit(
            material, model, start, loss, folder, steps=self.steps, label=f"earlyexit-{self.every}"
        )
        found = rival.kept(
            folder / f"thresholds-{self.ratio:g}.json",
            lambda: thresholds(_differences(material, kept, every), self.shares(model.depth)),
        )
        own = {**kept.own, "thresholds": np.array(found, np.float32)}
        return rival.policy(material, model, training.cast(model, kept.model), self.sample, own)

    def sample(
        self,
        config: pi0.Pi0Config,
        held: rival.Weights,
        observation: observations.Observation,
        noise: Float[Array, "b ah ad"],
    ) -> Float[Array, "b ah ad"]:
        """Go exit by exit with the first step, then keep each observation's depth."""
        prepared, own, b = held.prepared, held.extra, len(noise)
        backbone, expert = prepared.prefix, prepared.suffix
        assert isinstance(backbone, list), "rivals prepare lists of layers"
        assert isinstance(expert, list), "rivals prepare lists of layers"
        prefix = forward.embed_prefix(config, prepared, observation)
        tokens, valid = prefix.tokens, prefix.valid
        every, depth = self.exits(config.depth), config.depth
        first = jax.tree.map(lambda leaf: leaf[:1], prepared.tables)
        cache, start = gated.empty(config, tokens, valid, depth)
        slots = start
        if not config.pi05:
            slots = start.at[:, config.prefix_tokens].set(True)
        seen, acted = tokens, forward.embed_suffix(config, prepared, noise, first)
        state = acted[:, :0]
        if not config.pi05:
            state = layers.dense(prepared.params["state_proj"], observation.state)[:, None]
            state = state.astype(config.dtype)
        rope = layers.rope_table(jnp.cumsum(valid, axis=1) - 1, config.backbone.head_dim)
        after = jnp.sum(start, axis=1, keepdims=True)
        state_rope = layers.rope_table(after, config.expert.head_dim)
        slot, step_rope, mask = forward.suffix_geometry(config, slots, acted.shape[1])
        on, left = jnp.ones(b, bool), jnp.full(b, len(every) - 1)
        before: Array | None = None
        for i, (low, high) in enumerate(zip((0, *every), every, strict=False)):
            part = slice(low, high)
            opened = jnp.broadcast_to(on, (high - low, b))
            seen, cache[part] = gated.run(
                config, backbone[part], seen, cache[part], 0, rope, start[:, None], None, opened
            )
            own_stack = expert[part]
            if not config.pi05:
                state, cache[part] = gated.run(
                    config,
                    own_stack,
                    state,
                    cache[part],
                    config.prefix_tokens,
                    state_rope,
                    slots[:, None],
                    None,
                    opened,
                )
            given = None if first.modulation is None else first.modulation[0, part]
            acted, _ = gated.run(
                config, own_stack, acted, cache[part], slot, step_rope, mask, given, opened
            )
            v = _head(config, prepared, own, acted, first, jnp.full(b, i))
            if before is not None:
                moved = jnp.sqrt(jnp.mean(jnp.square(v - before), axis=(1, 2)))
                leaves = on & (moved <= own["thresholds"][i])
                left, on = jnp.where(leaves, i, left), on & ~leaves
            before = v
        opened = jnp.arange(depth)[:, None] < jnp.asarray(every)[left][None]

        def velocity(
            x_t: Array, tables: prepare.Tables, cache: list[tuple[Array, Array]]
        ) -> tuple[Array, list[tuple[Array, Array]]]:
            acted = forward.embed_suffix(config, prepared, x_t, tables)
            acted, cache = gated.suffix(config, prepared, acted, cache, slots, tables, opened)
            return _head(config, prepared, own, acted, tables, left), cache

        return rival.integrate(velocity, prepared, noise, cache)

    def untrained(
        self, config: pi0.Pi0Config, params: PyTree
    ) -> tuple[pi0.Pi0Config, rival.Sample, PyTree]:
        """The teacher; everybody leaves at the exit nearest to the mean depth."""
        every = self.exits(config.depth)
        mean = float(self.shares(config.depth) @ np.array(every))
        nearest = int(np.argmin(np.abs(np.array(every) - mean)))
        limits = np.where(np.arange(len(every)) >= max(nearest, 1), 1e30, -1.0)
        own = {**init(params, len(every)), "thresholds": limits.astype(np.float32)}
        return config, self.sample, own

    def operations(self, config: pi0.Pi0Config, num_steps: int) -> int:
        """The mean over those who leave at each exit, at the calibrated shares."""
        one, whole = rival.layer(config), rival.count(config, config.depth, num_steps)
        mean = float(self.shares(config.depth) @ np.array(self.exits(config.depth)))
        rest = whole.step - config.depth * one.step
        # The first step is computed twice: once to find the depth.
        return whole.vision + round(
            mean * (one.prefix + (num_steps + 1) * one.step) + (num_steps + 1) * rest
        )

    def parameters_held(self, config: pi0.Pi0Config) -> int:
        """All layers, and the exits' heads."""
        head = config.expert.width + (config.expert.width + 1) * config.action_dim
        return rival.held(config) + len(self.exits(config.depth)) * head


def init(params: PyTree, exits: int) -> PyTree:
    """Heads that are the teacher's at every exit."""
    head = params["action_out_proj"]
    width = head["kernel"].shape[0]
    return {
        "scale": jnp.ones((exits, width)),
        "kernel": jnp.stack([head["kernel"]] * exits),
        "bias": jnp.stack([head["bias"]] * exits),
    }


def thresholds(
    moved: Float[np.ndarray, "x n"], shares: Float[np.ndarray, " x"]
) -> Float[np.ndarray, " x"]:
    """Of each exit, so that of all samples its share leaves there; ∞ at the last.

    `moved` is the change of the velocity from the exit before; its first row is not read.
    """
    found, here = np.full(len(moved), -1.0), np.ones(moved.shape[1], bool)
    for i in range(1, len(moved) - 1):
        wanted = round(float(shares[i]) * moved.shape[1])
        order = np.sort(moved[i][here])
        if wanted and len(order):
            found[i] = order[min(wanted, len(order)) - 1]
            here &= moved[i] > found[i]
    found[-1] = 1e30
    return found


def _differences(
    material: rival.Material, held: training.Trained, every: tuple[int, ...]
) -> Float[np.ndarray, "x n"]:
    """Change of the first step's velocity from exit to exit, over some batches."""
    model = material.model

    @jax.jit
    def moved(observation: observations.Observation, x_t: Array) -> Array:
        t = jnp.ones((len(x_t), 1))
        prefix = gates.embed(model, held.model, observation)
        given = (observation.state, x_t[:, None], t)
        behind = gates.run(model, held.model, prefix, *given).suffix
        condition = gates.condition(model, held.model, t)
        v = jnp.stack(
            [_read(model, held, behind[d - 1], condition, i) for i, d in enumerate(every)]
        )[:, :, 0]
        change = jnp.sqrt(jnp.mean(jnp.square(v[1:] - v[:-1]), axis=(2, 3)))
        return jnp.concatenate([jnp.zeros((1, len(x_t))), change])

    rows, feed = [], iter(material.feed())
    for i in range(CALIBRATION):
        batch = next(feed)
        observation = jax.tree.map(jnp.asarray, batch.observation).as_float()
        noise = flow.sample_noise(jax.random.key(i), batch.actions.shape)
        rows.append(np.asarray(moved(observation, noise)))
    return np.concatenate(rows, axis=1)


def _read(
    config: pi0.Pi0Config,
    held: training.Trained,
    behind: Float[Array, "b r t e"],
    condition: Array | None,
    index: int,
) -> Float[Array, "b r ah ad"]:
    """An exit's velocity while training."""
    normed, _ = gemma.norm(held.model["PaliGemma"]["llm"]["final_norm_1"], behind, condition)
    scaled = normed[:, :, -config.action_horizon :] * layers.row(held.own["scale"][index], 4)
    head = {"kernel": held.own["kernel"][index], "bias": held.own["bias"][index]}
    return layers.dense(head, scaled).astype(jnp.float32)


def _head(
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    own: PyTree,
    behind: Float[Array, "b t e"],
    tables: prepare.Tables,
    index: Array,
) -> Float[Array, "b ah ad"]:
    """The velocity of each observation's exit."""
    x, modulation, scale = behind[:, -config.action_horizon :], None, None
    if tables.final is None:
        norm = prepared.params["PaliGemma"]["llm"]["final_norm_1"]["scale"]
        scale = 1 + norm.astype(jnp.float32)
    else:
        given = tables.final[0]
        modulation = (layers.row(given[0], 3), layers.row(given[1], 3), layers.row(given[2], 3))
    normed, _ = layers.rms_norm(x, scale, modulation)
    scaled = normed.astype(jnp.float32) * own["scale"][index][:, None]
    v = jnp.einsum("bte,bea->bta", scaled, own["kernel"][index])
    return v + own["bias"][index][:, None]
