"""A policy under test: as an actor in a simulator, and the time one of its plans takes."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from shallow_pi.deploy import policy as policies
from shallow_pi.evaluation import rollout
from shallow_pi.sims import simulator
from shallow_pi.speed import latency


@dataclasses.dataclass(frozen=True)
class PolicyActor:
    """Its noise is a function of episode and plan alone."""

    policy: policies.Policy

    def act(
        self,
        observations: Sequence[Mapping[str, Any]],
        keys: Int[np.ndarray, "b 2"],
        sims: Sequence[simulator.Simulator],
        *,
        previous: Sequence[Float[np.ndarray, "n rd"]] | None = None,
        delay: int = 0,
    ) -> Float[np.ndarray, "b ah rd"]:
        """One chunk an observation; where plans come late, it goes on from the `previous` one."""
        noise = rollout.noise(keys, *self.policy.noise_shape)
        return self.policy.infer_batch(observations, noise, previous=previous, delay=delay)


def measure_latency(
    pair: Mapping[str, policies.Policy], sim: simulator.Simulator
) -> latency.Latency:
    """Batch-1 inference from a prepared observation to actions on device, in turns."""
    sim.reset(0)
    first = next(iter(pair.values()))
    batch = first.prepare([sim.observe()])
    noise = rollout.noise(np.array([[0, 0]]), *first.noise_shape)
    calls = {
        name: (lambda policy=policy: policy.sample(batch, noise)) for name, policy in pair.items()
    }
    return latency.median_latency(calls, repeats=50)
