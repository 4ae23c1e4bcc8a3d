"""Policies under test: what plans actions for running simulators, and how long one plan takes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int

from shallow_pi.deploy import policy as deployed
from shallow_pi.sims import simulator
from shallow_pi.speed import latency


@runtime_checkable
class Policy(Protocol):
    """Plans a chunk of robot actions for several episodes at once."""

    def plan(
        self,
        observations: Sequence[simulator.Observation],
        keys: Int[np.ndarray, "b 2"],
        sims: Sequence[simulator.Simulator],
        *,
        previous: Sequence[Float[np.ndarray, "m rd"]] | None = None,
        delay: int = 0,
    ) -> Float[np.ndarray, "n ah rd"]:
        """Actions in the robot's units, one chunk per simulator.

        Args:
          observations: always a full batch: behind the last simulator's the last one is repeated,
            so that a jitted policy compiles for one shape only.
          keys: (episode seed, index of the plan) of each observation; see `noise`.
          sims: the simulators themselves, n <= b. Only a privileged expert looks into them.
          previous: what is left of each chunk before, where the new one has to go on from it.
          delay: control steps of `previous` that are executed before the new chunk is there.

        Returns:
          At least n chunks; those behind the n-th are ignored.
        """
        ...


def noise(
    keys: Int[np.ndarray, "b 2"], action_horizon: int, action_dim: int
) -> Float32[np.ndarray, "b ah ad"]:
    """Standard normal noise that a policy starts from, a function of each row's key alone."""
    shape = (action_horizon, action_dim)
    draws = [np.random.default_rng([int(k) for k in key]).standard_normal(shape) for key in keys]
    return np.stack(draws).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A policy as it is deployed, whose noise is a function of episode and plan alone."""

    policy: deployed.Policy

    def plan(
        self,
        observations: Sequence[simulator.Observation],
        keys: Int[np.ndarray, "b 2"],
        sims: Sequence[simulator.Simulator],
        *,
        previous: Sequence[Float[np.ndarray, "m rd"]] | None = None,
        delay: int = 0,
    ) -> Float[np.ndarray, "b ah rd"]:
        """One chunk for each observation, by one batched inference."""
        drawn = noise(keys, *self.policy.noise_shape)
        robot = self.policy.assets.robot
        if robot.prompt:  # Its own instruction counts.
            observations = [
                {key: value for key, value in observation.items() if key != robot.prompt_key}
                for observation in observations
            ]
        return self.policy.infer_batch(observations, drawn, previous=previous, delay=delay)


@dataclasses.dataclass(frozen=True)
class Scripted:
    """A simulator's expert, which plans one action at a time."""

    expert: simulator.Expert

    def plan(
        self,
        observations: Sequence[simulator.Observation],
        keys: Int[np.ndarray, "b 2"],
        sims: Sequence[simulator.Simulator],
        *,
        previous: Sequence[Float[np.ndarray, "m rd"]] | None = None,
        delay: int = 0,
    ) -> Float[np.ndarray, "n 1 rd"]:
        """Chunks of one action, from the simulators and not from the observations."""
        return np.stack([self.expert(sim) for sim in sims])[:, None]


def measure_latency(
    pair: Mapping[str, deployed.Policy], sim: simulator.Simulator
) -> latency.Latency:
    """Batch-1 inference from a prepared observation to actions on the device, taking turns."""
    sim.reset(0)
    first = next(iter(pair.values()))
    batch = first.prepare([sim.observe()])
    drawn = noise(np.array([[0, 0]]), *first.noise_shape)
    calls = {
        name: (lambda policy=policy: policy.sample(batch, drawn)) for name, policy in pair.items()
    }
    return latency.median_latency(calls, repeats=50)
