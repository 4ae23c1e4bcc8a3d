"""Record demonstrations of a simulator's scripted expert as a LeRobot v3.0 dataset.

uv run scripts/make_demonstrations.py --sim NAME [--episodes N] [--output DIR]

    --sim metaworld_mt10 --episodes 500                       MT10, 50 episodes a task on average
    --sim metaworld_mt50 --option tasks=hammer,soccer         two tasks of MT50
    --sim turntable --episodes 3000 --noise 1 --seed 7

The executed actions are perturbed, while the expert's own action is recorded in every state that is
reached. Failed attempts are discarded. An episode depends only on the options, the seed and its
number, not on the number of processes. docs/benchmarks.md lists the simulators and what they need.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from shallow_pi import flags, progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.commands import exits
from shallow_pi.data.lerobot import video_writer
from shallow_pi.sims import recording, simulator


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The simulator, and how much to record."""

    # Name of a simulator, or MODULE:CLASS of your own suite.
    sim: str
    # Options of the simulator as NAME=VALUE.
    option: tuple[str, ...] = ()
    # Number of episodes.
    episodes: int = 500
    # Folder to create; empty uses demonstrations/SIM.
    output: str = ""
    # Seed of the episodes and perturbations.
    seed: int = 0
    # Scale of the perturbations; 0 records the expert's own path.
    noise: float = 0.5
    # Number of processes; 0 uses one for each CPU.
    workers: int = 0
    # Store images losslessly (png), or as video, which is smaller.
    images: Literal["png", "h264", "av1"] = "png"
    # Constant rate factor of video; smaller means better quality and larger files.
    crf: int = 18

    def __post_init__(self) -> None:
        flags.at_least(self, 1, "episodes")
        flags.at_least(self, 0, "workers", "noise")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, record, print the folder."""
    given = flags.parse(Arguments, arguments, __doc__ or "", idle=_idle)
    with exits.exit_on():
        suite = simulator.find(given.sim, flags.pairs(given.option, "--option"))
        if suite.expert() is None:
            raise ValueError(f"simulator {given.sim!r} has no expert that demonstrates its tasks")
        encoding = None
        if given.images != "png":
            encoding = video_writer.Encoding(given.images, crf=given.crf)
        folder = run_folder.check_output(
            given.output or f"demonstrations/{given.sim}", "give another --output", is_new=True
        )
        tasks = recording.write(
            folder, suite, given.episodes, given.seed, given.noise, given.workers, encoding
        )
        progress.say(", ".join(f"{task} {count}" for task, count in sorted(tasks.items())))
    print(folder)


def _idle(given: Arguments) -> flags.Idle:
    reason = "--images png writes no video; give --images h264 or av1"
    yield given.images == "png", "crf", reason
