"""Operations, parameters in memory and latency of rivals, at any size, with any parameters.

Weights do not change the time of a rival, but for early exits, which are timed with everybody
leaving at the exit nearest to the mean depth. All are sampled in one process, in turns, with the
same options as the teacher (`rival.OPTIONS`).
"""

import dataclasses
import json
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from shallow_pi.distill import student
from shallow_pi.evaluation.rivals import rival, table
from shallow_pi.inference import program
from shallow_pi.models import batch as batches
from shallow_pi.models import pi0
from shallow_pi.speed import latency


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one inference at batch 1."""

    name: str
    operations: int
    # Held in memory, those included that an input may skip.
    parameters: int
    median_ms: float
    p95_ms: float
    device: str

    def to_json(self) -> str:
        """One line."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))


def measure(
    config: pi0.Pi0Config,
    params: PyTree,
    names: Sequence[str],
    *,
    num_steps: int = 10,
    repeats: int = 50,
) -> list[Cost]:
    """Costs of one teacher's rivals, all of its cameras and its whole prompt in use."""
    observation = batches.zeros(config, 1).observation
    observation = dataclasses.replace(
        observation,
        image_masks={name: np.ones(1, bool) for name in config.cameras},
        tokenized_prompt_mask=np.ones((1, config.max_token_len), bool),
    )
    noise = np.random.default_rng(0).standard_normal(
        (1, config.action_horizon, config.action_dim), np.float32
    )
    calls: dict[str, Callable[[], jax.Array]] = {}
    found = {name: table.find(name) for name in dict.fromkeys(names)}
    for name, made in found.items():
        model, sample, own = made.untrained(config, params)
        shallow = student.gather(params, jnp.arange(model.depth))
        run = rival.RivalProgram.of(model, shallow, sample, own, num_steps)
        layout = program.Layout(model)
        packed = jax.device_put(program.pack(layout, observation, noise))
        calls[name] = lambda run=run, layout=layout, packed=packed: run(layout, packed)  # type: ignore[misc]  # one variable a call
    times = latency.median_latency(calls, repeats=repeats)
    return [
        Cost(
            name,
            made.operations(config, num_steps),
            made.parameters_held(config),
            round(times.median_ms[name], 4),
            round(times.p95_ms[name], 4),
            times.device,
        )
        for name, made in found.items()
    ]
