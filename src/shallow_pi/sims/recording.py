"""Demonstrations of a suite's expert as a LeRobot dataset, which says what it was recorded with."""

import contextlib
import dataclasses
import json
import pathlib
from collections import Counter
from typing import Any

from shallow_pi import progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.data.lerobot import video_writer
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.sims import demonstrations, simulator

# The settings of a recording, in its folder.
FILE = pathlib.Path("meta/recording.json")


def write(
    path: pathlib.Path,
    suite: simulator.Suite,
    episodes: int,
    seed: int,
    noise: float = 1.0,
    workers: int = 0,
    encoding: video_writer.Encoding | None = None,
) -> Counter[str]:
    """Have the expert solve the tasks and write the episodes as a LeRobot dataset.

    Arguments are those of `demonstrations.collect`, but 0 workers use one process for each CPU, and
    without an encoding images are written as PNG.

    Returns:
      The number of episodes of each task.
    """
    robot = suite.robot
    tasks: Counter[str] = Counter()
    writer = lerobot_writer.Writer(
        path, robot.fps, robot_type=robot.name, names=suite.names(), encoding=encoding
    )
    with writer, progress.bar("Demonstrations", total=episodes) as advance:
        for episode in demonstrations.collect(
            suite, episodes, seed, noise, workers or demonstrations.cpus()
        ):
            prompts = [episode.prompt] * len(episode.vectors[robot.action_key])
            writer.add(episode.images, episode.vectors, prompts)
            tasks[episode.task] += 1
            advance(1)
        settings = json.dumps(_settings(suite, episodes, seed, noise), indent=2) + "\n"
        writer.attach(FILE, settings.encode())
    return tasks


def check(
    path: pathlib.Path, suite: simulator.Suite, episodes: int, seed: int, noise: float
) -> None:
    """Raise a `ValueError` unless `write` recorded a dataset with these settings."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):  # Then nothing is known of it.
        found = run_folder.flatten(json.loads((path / FILE).read_text(encoding="utf-8")))
    asked = run_folder.flatten(_settings(suite, episodes, seed, noise))
    differing = [
        f"{name}: recorded {found.get(name, 'unknown')!r}, now {asked.get(name, 'absent')!r}"
        for name in sorted({*found, *asked})
        if found.get(name) != asked.get(name)
    ]
    if differing:
        raise ValueError(
            f"the demonstrations in {path} were recorded with other settings:\n  "
            + "\n  ".join(differing)
            + "\ndelete them to record these, or give the settings they were recorded with"
        )


def _settings(suite: simulator.Suite, episodes: int, seed: int, noise: float) -> dict[str, Any]:
    """Everything that the episodes depend on, as it is read back from JSON."""
    kind = type(suite)
    found = {
        "suite": f"{kind.__module__}:{kind.__qualname__}",
        "options": dataclasses.asdict(suite),  # type: ignore[call-overload]
        "episodes": episodes,
        "seed": seed,
        "noise": noise,
    }
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain
