"""The interface of rivals: made of a teacher and samples, they are policies that anything can run.

A rival is a frozen dataclass of its options. It is made by `make` into a `deployed.Policy` whose
program is the rival's own; rollouts, latency measurements and servers call it like any other.
Rivals read the same openpi checkpoint as the teacher. All run with unrolled layers and scanned
steps, whatever is fastest for the teacher on this device: times compare when the teacher's own is
measured with these options too (rival `teacher`).
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, UInt8

from shallow_pi.checkpoints import run_folder
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.deploy import policy as deployed
from shallow_pi.distill import flow, layer_map, layer_scores
from shallow_pi.inference import attention, forward, prepare, program, sampler, tuning
from shallow_pi.models import batch as batches
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0
from shallow_pi.speed import flops

OPTIONS = dataclasses.replace(tuning.ALL_ON, unrolled_steps=False, padded_tower=False)


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """A teacher and its data, from which a rival is made."""

    # The teacher's.
    assets: policy_assets.Assets
    params: PyTree
    # Training batches from the first on, in the same order at every call.
    feed: Callable[[], Iterator[batches.Batch]]

    @property
    def model(self) -> pi0.Pi0Config:
        """The teacher."""
        return self.assets.model


class Draw(NamedTuple):
    """A batch with noise and time, as the losses draw it."""

    observation: observations.Observation
    x_t: Float[Array, "b r ah ad"]
    t: Float[Array, "b r"]
    u: Float[Array, "b r ah ad"]


def draw(key: Array, batch: batches.Batch, draws: int = 1) -> Draw:
    """Noise and times for every sample of a batch."""
    noise_key, time_key = jax.random.split(key)
    actions = jnp.asarray(batch.actions)
    shape = (len(actions), draws, *actions.shape[1:])
    noise, t = flow.sample_noise(noise_key, shape), flow.sample_time(time_key, shape[:2])
    actions = jnp.broadcast_to(actions[:, None], shape)
    observation = jax.tree.map(jnp.asarray, batch.observation).as_float()
    x_t = flow.interpolate(actions, noise, t)
    return Draw(observation, x_t, t, flow.target_velocity(actions, noise))


def scores(material: Material, strategy: layer_map.Measured) -> Float[np.ndarray, " l"]:
    """A score of each layer of the teacher, on the first batch."""
    drawn = draw(jax.random.key(0), next(iter(material.feed())))
    measure = jax.jit(layer_scores.measure, static_argnums=(0, 1))
    single = (x[:, 0] for x in drawn[1:])
    found = measure(strategy, material.model, material.params, drawn.observation, *single)
    return np.asarray(found)


def kept(path: pathlib.Path, measure: Callable[[], Iterable[float]]) -> list[float]:
    """Numbers of a JSON file, measured and written first where it is missing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([float(x) for x in measure()]) + "\n"
        run_folder.write_text(path, text, run_folder.AGAIN)
    return [float(x) for x in json.loads(path.read_text(encoding="utf-8"))]


class Weights(NamedTuple):
    """A rival's weights: prepared layers, and its own."""

    prepared: prepare.Prepared
    extra: PyTree


# From (config, weights, observation, noise) to normalized actions.
Sample = Callable[[pi0.Pi0Config, Weights, observations.Observation, Array], Array]


class Rival(Protocol):
    """A rival's options."""

    def make(self, material: Material, folder: pathlib.Path) -> deployed.Policy:
        """The policy; what it measures or trains is kept in the folder, and read where it is."""
        ...

    def untrained(
        self, config: pi0.Pi0Config, params: PyTree
    ) -> tuple[pi0.Pi0Config, Sample, PyTree]:
        """Its model, sampler and own parameters of a teacher, before training; to time them."""
        ...

    def operations(self, config: pi0.Pi0Config, num_steps: int) -> int:
        """Floating-point operations of one inference, of trimmed observations."""
        ...

    def parameters_held(self, config: pi0.Pi0Config) -> int:
        """Parameters in memory, those included that an input may skip."""
        ...


def policy(
    material: Material, config: pi0.Pi0Config, params: PyTree, sample: Sample, extra: PyTree
) -> deployed.Policy:
    """A policy that samples in its own way, with the teacher's robot and integration steps.

    Its model differs from the teacher at most in depth; `extra` are the sampler's own parameters.
    """
    assets = dataclasses.replace(material.assets, model=config)
    made = deployed.Policy(assets, params, num_steps=assets.num_steps)
    made.program = RivalProgram.of(config, params, sample, extra, assets.num_steps)
    return made


@dataclasses.dataclass(frozen=True, eq=False)
class RivalProgram(program.Program):
    """A program with another sampler."""

    sample: Sample

    @classmethod
    def of(
        cls, config: pi0.Pi0Config, params: PyTree, sample: Sample, extra: PyTree, num_steps: int
    ) -> "RivalProgram":
        """Prepare a model's parameters."""
        times = sampler.integration_times(num_steps)
        prepared = jax.jit(lambda tree: prepare.prepare(config, tree, times, OPTIONS))(params)
        held = Weights(prepared, jax.tree.map(jnp.asarray, extra))
        arrays = program.Arrays((), tuple(jax.tree.leaves(held)))
        return cls(arrays, jax.eval_shape(lambda: held), num_steps, OPTIONS, sample)

    @functools.cached_property
    def run(self) -> jax.stages.Wrapped:
        """As of `program.Program`."""
        tree = jax.tree.structure(self.shapes)
        return jax.jit(functools.partial(_run, tree=tree, sample=self.sample), static_argnums=0)


def _run(
    layout: program.Layout,
    arrays: program.Arrays,
    packed: UInt8[Array, "b n"],
    *,
    tree: Any,
    sample: Sample,
) -> Float[Array, "b ah ad"]:
    if layout.guided:
        raise ValueError("rivals cannot continue a previous chunk: choose another executor")
    observation, noise, _ = program.unpack(layout, packed)
    held: Weights = jax.tree.unflatten(tree, arrays.others)
    return sample(layout.config, held, observation, noise)


def steps_of(prepared: prepare.Prepared) -> int:
    """The integration steps that weights are prepared for."""
    return len(jax.tree.leaves(prepared.tables)[0])


# From (x_t, tables of one time, buffers) to (velocity, buffers).
Velocity = Callable[[Array, prepare.Tables, attention.Cache], tuple[Array, attention.Cache]]


def integrate(
    velocity: Velocity, prepared: prepare.Prepared, noise: Array, cache: attention.Cache
) -> Float[Array, "b ah ad"]:
    """Euler steps at the times of the prepared tables, from noise to actions."""
    dt = jnp.float32(-1.0 / steps_of(prepared))

    def step(
        carry: tuple[Array, attention.Cache], tables: prepare.Tables
    ) -> tuple[tuple[Array, attention.Cache], None]:
        x_t, cache = carry
        v, cache = velocity(x_t, jax.tree.map(lambda leaf: leaf[None], tables), cache)
        return (x_t + dt * v, cache), None

    return jax.lax.scan(step, (noise.astype(jnp.float32), cache), prepared.tables)[0][0]


def sample_behind(
    prefix: tuple[attention.Cache, Bool[Array, "b s"]],
    config: pi0.Pi0Config,
    prepared: prepare.Prepared,
    state: Float[Array, "b ad"],
    noise: Array,
) -> Float[Array, "b ah ad"]:
    """Sample as every policy does, behind the buffers and the mask of a prefix."""
    cache, valid = forward.append_state(config, prepared, state, *prefix)
    return integrate(
        lambda x_t, tables, cache: forward.velocity(config, prepared, cache, valid, x_t, tables),
        prepared,
        noise,
        cache,
    )


def images(config: pi0.Pi0Config) -> int:
    """Image tokens of all cameras together."""
    return len(config.cameras) * config.image_tokens


@dataclasses.dataclass(frozen=True)
class FewerTokens(pi0.Pi0Config):
    """A model over fewer image tokens than its cameras give."""

    kept: int = 0

    @property
    def prefix_tokens(self) -> int:
        """Kept image tokens and prompt tokens together."""
        return self.kept + self.max_token_len


def with_tokens(config: pi0.Pi0Config, kept: int) -> FewerTokens:
    """The same model over that many image tokens."""
    fields = {
        field.name: getattr(config, field.name) for field in dataclasses.fields(pi0.Pi0Config)
    }
    return FewerTokens(**fields, kept=kept)


def count(config: pi0.Pi0Config, depth: int, num_steps: int) -> flops.Count:
    """Operations of a plain model of that depth."""
    model = pi0.at_depth(config, depth)
    return flops.inference_flops(model, num_steps=num_steps, options=OPTIONS)


def layer(config: pi0.Pi0Config) -> flops.Count:
    """Operations of one layer that others follow, over the prefix and in one step."""
    two, one = (count(config, depth, 1) for depth in (2, 1))
    return flops.Count(0, two.prefix - one.prefix, two.step - one.step, 1)


def held(config: pi0.Pi0Config) -> int:
    """Parameters of a plain model."""
    return size(pi0.abstract_params(config))


def size(tree: PyTree) -> int:
    """How many numbers its leaves hold."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
