"""CogVLA's direction (2508.21046): visual tokens reduced as the instruction says, trained.

Our reduced form of the idea; the authors' code (JiuTian-VL/CogVLA) appends 64 learned tokens to
the vision tower, conditions every block of it by FiLM on the prompt, and drops the 256 patches
behind it. Here a quarter of the tokens of each camera are learned queries over the frozen tower's
tokens, one attention head behind it:

    q' = q·(1 + γ(prompt)) + β(prompt)          FiLM by the mean prompt embedding
    out = Σ_n softmax(q'·K(x_n)/√d + bias_n)·(x_n + V(x_n))

V and FiLM start at zero and the bias at 2 × 2 windows, so training starts from mean pooling, which
is also the control (`kind=mean`), as is the same without FiLM (`kind=plain`). Everything behind is
trained with task + velocity loss. Not built: the router of visual tokens in the language model's
layers. The depth may be cut too, uniformly.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from shallow_pi.deploy import policy as deployed
from shallow_pi.distill import gates, layer_map, student
from shallow_pi.evaluation.rivals import rival, training
from shallow_pi.inference import forward
from shallow_pi.models import layers as equations
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0

KINDS = ("film", "plain", "mean")
# A query's attention logits outside its window at the start.
OUTSIDE = -6.0


@dataclasses.dataclass(frozen=True)
class CogVLA:
    """Options."""

    # Tokens by queries that the prompt modulates (film), that it does not (plain), or the mean of
    # 2 × 2 windows (mean).
    kind: str = "film"
    # Layers to keep, uniformly; 0 keeps all.
    layers: int = 0
    # Training steps; a student's on the tabletop.
    steps: int = 1200

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.layers < 0 or self.steps < 1:
            raise ValueError(
                f"cogvla: kind is one of {', '.join(KINDS)}, layers 0 (all) or more and steps at "
                f"least 1, got {self}"
            )

    def make(self, material: rival.Material, folder: pathlib.Path) -> deployed.Policy:
        """Train the queries and the model behind them."""
        teacher = material.model
        kept = layer_map.uniform(self.layers or teacher.depth, teacher.depth)
        model, _, own = self.untrained(teacher, material.params)
        start = training.Trained(student.cut(teacher, material.params, kept), own)

        def loss(held: training.Trained, seen: training.Seen) -> Float[Array, ""]:
            drawn = seen.drawn
            whole = gates.embed(model, held.model, drawn.observation, seen.image_tokens)
            prefix = reduce(self.kind, model, held.own, whole)
            given = (drawn.observation.state, drawn.x_t, drawn.t)
            return training.task_and_velocity(
                gates.velocity(model, held.model, prefix, *given), seen
            )

        named = f"cogvla-{self.kind}-{kept.depth}"
        found = training.fit(material, model, start, loss, folder, steps=self.steps, label=named)
        return rival.policy(
            material, model, training.cast(model, found.model), self.sample, found.own
        )

    def sample(
        self,
        config: pi0.Pi0Config,
        held: rival.Weights,
        observation: observations.Observation,
        noise: Float[Array, "b ah ad"],
    ) -> Float[Array, "b ah ad"]:
        """Sample over a quarter of the image tokens."""
        prepared = held.prepared
        found = forward.embed_prefix(config, prepared, observation)
        whole = gates.Prefix(found.tokens, found.valid)
        prefix = reduce(self.kind, config, held.extra, whole)
        model = rival.with_tokens(config, rival.images(config) // 4)
        positions = jnp.cumsum(prefix.valid, axis=1) - 1
        made = forward.run_prefix(model, prepared, *prefix, positions)
        return rival.sample_behind(made, model, prepared, observation.state, noise)

    def untrained(
        self, config: pi0.Pi0Config, params: PyTree
    ) -> tuple[pi0.Pi0Config, rival.Sample, PyTree]:
        """The model at the kept depth, and queries that are the mean of windows."""
        del params
        model = pi0.at_depth(config, self.layers or config.depth)
        return model, self.sample, init(model, jax.random.key(0))

    def operations(self, config: pi0.Pi0Config, num_steps: int) -> int:
        """Of the tower, the queries, and the model over fewer tokens."""
        fewer = rival.with_tokens(config, rival.images(config) // 4)
        count = rival.count(fewer, self.layers or config.depth, num_steps)
        width = config.backbone.width
        queries = 0
        if self.kind != "mean":
            n, m = config.image_tokens, config.image_tokens // 4
            queries = len(config.cameras) * 2 * (2 * n * width**2 + 2 * n * m * width)
        return count.total + queries

    def parameters_held(self, config: pi0.Pi0Config) -> int:
        """The model's, and the queries'."""
        model = pi0.at_depth(config, self.layers or config.depth)
        own = jax.eval_shape(lambda: init(model, jax.random.key(0)))
        return rival.held(model) + (rival.size(own) if self.kind != "mean" else 0)


def init(config: pi0.Pi0Config, key: Array) -> PyTree:
    """Queries that start as the mean over 2 × 2 windows."""
    width, window = config.backbone.width, windows(config)
    keys, spread = jax.random.split(key), config.backbone.width**-0.5
    return {
        "queries": jax.random.normal(keys[0], (len(window), width)),
        "key": spread * jax.random.normal(keys[1], (width, width)),
        "value": jnp.zeros((width, width)),
        "bias": jnp.where(jnp.asarray(window), 0.0, OUTSIDE),
        "film": {"kernel": jnp.zeros((width, 2 * width)), "bias": jnp.zeros(2 * width)},
    }


def windows(config: pi0.Pi0Config) -> Bool[np.ndarray, "m n"]:
    """The tokens (columns) of the 2 × 2 window of each reduced token (row) of a camera.

    Raises:
      ValueError: an odd number of tokens on a side.
    """
    side = config.image_size // config.image.patch_size
    if side % 2:
        raise ValueError(
            f"cogvla: a camera's {side} × {side} tokens have no windows of 2 × 2; image size over "
            f"patch size must be even, got {config.image_size} and {config.image.patch_size}"
        )
    row, column = np.divmod(np.arange(side**2), side)
    window = row // 2 * (side // 2) + column // 2
    return window == np.arange(side**2 // 4)[:, None]


def reduce(kind: str, config: pi0.Pi0Config, own: PyTree, whole: gates.Prefix) -> gates.Prefix:
    """A quarter of the image tokens, then the prompt tokens."""
    images, cameras = rival.images(config), len(config.cameras)
    b, _, width = whole.tokens.shape
    x = whole.tokens[:, :images].reshape(b, cameras, -1, width).astype(jnp.float32)
    if kind == "mean":
        window = jnp.asarray(windows(config), jnp.float32) / 4
        out = jnp.einsum("mn,bcnd->bcmd", window, x)
    else:
        words, valid = whole.tokens[:, images:], whole.valid[:, images:, None]
        asked = jnp.sum(words.astype(jnp.float32) * valid, axis=1)
        asked = asked / jnp.maximum(jnp.sum(valid.astype(jnp.float32), axis=1), 1.0)
        queries = jnp.broadcast_to(own["queries"][None], (b, *own["queries"].shape))
        if kind == "film":
            film = equations.dense(own["film"], asked)[:, None]
            gamma, beta = jnp.split(film, 2, axis=-1)
            queries = queries * (1 + gamma) + beta
        keys = jnp.einsum("bcnd,de->bcne", x, own["key"])
        logits = jnp.einsum("bmd,bcnd->bcmn", queries, keys) * width**-0.5
        maps = jax.nn.softmax(logits + own["bias"][None, None], axis=-1)
        values = x + jnp.einsum("bcnd,de->bcne", x, own["value"])
        out = jnp.einsum("bcmn,bcnd->bcmd", maps, values)
    reduced = out.reshape(b, -1, width).astype(whole.tokens.dtype)
    there = whole.valid[:, :images].reshape(b, cameras, -1)[:, :, : config.image_tokens // 4]
    return gates.Prefix(
        jnp.concatenate([reduced, whole.tokens[:, images:]], axis=1),
        jnp.concatenate([there.reshape(b, -1), whole.valid[:, images:]], axis=1),
    )
