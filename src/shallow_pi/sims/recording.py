"""Demonstrations of a suite's expert as a LeRobot dataset."""

import pathlib
from collections import Counter

from shallow_pi import progress
from shallow_pi.data.lerobot import video_writer
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.sims import demonstrations, simulator


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

    Args:
      path: folder to create.
      suite: as in `demonstrations.collect`, like the next three.
      episodes: their number.
      seed: of the episodes and perturbations.
      noise: scale of the perturbations.
      workers: processes; 0 uses one for each CPU.
      encoding: of video; None writes images as PNG.

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
    return tasks
