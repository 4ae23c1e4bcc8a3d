"""Layers left out of the teacher without training, and the teacher itself for comparison.

The Shallow-π paper asks whether skipping could replace a trained cut: it drops layers one after the
other in the order of a test-time oracle, least harm first. `oracle` measures the harm anew behind
every drop, `sensitivity` and the other scores once.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from shallow_pi.deploy import policy as deployed
from shallow_pi.distill import gates, layer_map, student
from shallow_pi.evaluation.rivals import rival
from shallow_pi.inference import forward
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0

Order = Literal["oracle", layer_map.Measured]


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The teacher, run as the rivals are."""

    def make(self, material: rival.Material, folder: pathlib.Path) -> deployed.Policy:
        """The whole teacher."""
        del folder
        return rival.policy(material, material.model, material.params, plain, ())

    def untrained(
        self, config: pi0.Pi0Config, params: PyTree
    ) -> tuple[pi0.Pi0Config, rival.Sample, PyTree]:
        """The teacher."""
        del params
        return config, plain, ()

    def operations(self, config: pi0.Pi0Config, num_steps: int) -> int:
        """Of the plain sampler."""
        return rival.count(config, config.depth, num_steps).total

    def parameters_held(self, config: pi0.Pi0Config) -> int:
        """All."""
        return rival.held(config)


@dataclasses.dataclass(frozen=True)
class Skip:
    """The teacher without some layers, untrained."""

    # Layers left out.
    drop: int = 0
    # Order in which they go: oracle, or a score of `layer_scores`.
    order: str = "oracle"

    def __post_init__(self) -> None:
        known = (*get_args(Order)[:1], *layer_map.MEASURED)
        if self.order not in known or self.drop < 0:
            raise ValueError(
                f"skip: drop is 0 or more and order one of {', '.join(known)}, got {self}"
            )

    def make(self, material: rival.Material, folder: pathlib.Path) -> deployed.Policy:
        """Measure the order on the first batch, and cut."""
        model, path = material.model, folder / f"{self.order}-order.json"
        found = rival.kept(path, lambda: order(material, self.order))
        kept = without(model.depth, [int(layer) for layer in found[: self.drop]])
        params = student.cut(model, material.params, kept)
        return rival.policy(material, pi0.at_depth(model, kept.depth), params, plain, ())

    def untrained(
        self, config: pi0.Pi0Config, params: PyTree
    ) -> tuple[pi0.Pi0Config, rival.Sample, PyTree]:
        """The model at what is left of its depth."""
        del params
        return pi0.at_depth(config, config.depth - self.drop), plain, ()

    def operations(self, config: pi0.Pi0Config, num_steps: int) -> int:
        """Of the plain sampler at what is left."""
        return rival.count(config, config.depth - self.drop, num_steps).total

    def parameters_held(self, config: pi0.Pi0Config) -> int:
        """Parameters of the kept layers."""
        return rival.held(pi0.at_depth(config, config.depth - self.drop))


def plain(
    config: pi0.Pi0Config,
    held: rival.Weights,
    observation: observations.Observation,
    noise: jax.Array,
) -> jax.Array:
    """The sampler of every policy, with the rivals' options."""
    prefix = forward.prefill(config, held.prepared, observation)
    return rival.sample_behind(prefix, config, held.prepared, observation.state, noise)


def without(depth: int, dropped: Sequence[int]) -> layer_map.LayerMap:
    """The map of all layers but these."""
    return layer_map.explicit([i for i in range(depth) if i not in dropped], depth)


def order(material: rival.Material, by: str) -> tuple[int, ...]:
    """All layers in the order in which they are left out, first the one missed least.

    By "oracle", or by a score of `layer_scores`, on a batch of the teacher's.
    """
    if by == "oracle":
        return _oracle(material)
    strategy = next(name for name in layer_map.MEASURED if name == by)
    scores = rival.scores(material, strategy)
    missed = -scores if by in ("similarity", "cka") else scores
    return tuple(np.argsort(missed, kind="stable").tolist())


def _oracle(material: rival.Material) -> tuple[int, ...]:
    """Greedy: again and again the layer whose loss changes the teacher's velocity least."""
    model, params = material.model, material.params
    observation, x_t, t, _ = rival.draw(jax.random.key(0), next(iter(material.feed())))

    @jax.jit
    def harms(opened: jax.Array) -> jax.Array:
        """Error of the velocity without each layer, beside those that are gone."""
        prefix = gates.embed(model, params, observation)
        given = (prefix, observation.state, x_t, t)
        whole = gates.velocity(model, params, *given)

        def harm(without: jax.Array) -> jax.Array:
            spread = jnp.broadcast_to((opened * (1 - without))[:, None], (model.depth, len(t)))
            v = gates.velocity(model, params, *given, spread)
            return jnp.mean(jnp.square(v - whole))

        return jax.lax.map(harm, jnp.eye(model.depth))

    opened = np.ones(model.depth, np.float32)
    gone: list[int] = []
    while len(gone) < model.depth - 1:
        found = np.where(opened > 0, np.asarray(harms(opened)), np.inf)
        gone.append(int(np.argmin(found)))
        opened[gone[-1]] = 0
    return (*gone, int(np.argmax(opened)))
