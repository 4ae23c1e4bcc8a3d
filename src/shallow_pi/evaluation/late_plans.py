"""Success when plans are late, for teacher and student, where the world moves meanwhile.

Two pairs of latencies: those measured here, and those that the paper gives for its robot (364 ms
for the teacher, 110 ms for the student). Each is executed in three ways: as the plans come, with
the late actions skipped, and with real-time chunking. A plan takes effect at the first control step
at which it is there, so a latency counts in whole steps, rounded up.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping

from shallow_pi.evaluation import policies, rollout
from shallow_pi.sims import simulator, workers
from shallow_pi.speed import latency as latencies

PAPER_MS = {"teacher": 364.0, "student": 110.0}
EXECUTORS: dict[rollout.Executor, str] = {
    "late": "as they come",
    "skip": "late actions skipped",
    "real-time": "real-time chunking",
}
# Few, for the whole table takes 14 times as many.
EPISODES = 24
IN_TIME = "in time"


@dataclasses.dataclass(frozen=True)
class LatePlans:
    """One column of the table."""

    # Such as "364 and 110 ms (the paper's), late actions skipped".
    label: str
    # Milliseconds of a plan, by policy; empty for plans in time.
    milliseconds: Mapping[str, float]
    executor: rollout.Executor = "skip"
    evaluations: Mapping[str, rollout.Evaluation] = dataclasses.field(default_factory=dict)

    def steps(self, policy: str, control_hz: float) -> int:
        """Control steps that a policy's plans are late."""
        return math.ceil(self.milliseconds.get(policy, 0.0) * control_hz / 1000 - 1e-9)


def columns(measured: Mapping[str, float]) -> list[LatePlans]:
    """The columns, not yet evaluated."""
    found = [LatePlans(IN_TIME, {})]
    for whose, pair in (("measured here", measured), ("the paper's", PAPER_MS)):
        pair = {name: pair[name] for name in PAPER_MS}
        numbers = " and ".join(f"{pair[name]:.0f}" for name in PAPER_MS)
        for executor, words in EXECUTORS.items():
            found.append(LatePlans(f"{numbers} ms ({whose}), {words}", pair, executor))
    return found


def evaluate(
    suite: simulator.Suite,
    pair: Mapping[str, policies.Policy],
    measured: latencies.Latency,
    *,
    execute_steps: int,
    seed: int,
    folder: pathlib.Path,
    name: str,
    episodes: int = EPISODES,
) -> list[LatePlans]:
    """Evaluate "teacher" and "student" in every column.

    `name` is the part of the files' names in `folder` that changes with the policies and their
    integration steps; `episodes` are run for each policy and column.
    """
    found, batch = [], workers.fitting(suite, episodes)
    for column in columns(measured.median_ms):
        evaluations = {}
        for policy in PAPER_MS:
            steps = column.steps(policy, suite.control_hz)
            way = f"{steps} steps late, {EXECUTORS[column.executor]}"
            evaluations[policy] = rollout.evaluate(
                suite.make,
                pair[policy],
                episodes=episodes,
                seed=seed,
                execute_steps=execute_steps,
                label=f"{policy}, {way if column.milliseconds else IN_TIME}",
                batch=batch,
                path=folder / f"{policy}-{steps}-steps-late-{column.executor}-{name}.jsonl",
                delay=rollout.Delay(steps, column.executor),
            )
        found.append(dataclasses.replace(column, evaluations=evaluations))
    return found
