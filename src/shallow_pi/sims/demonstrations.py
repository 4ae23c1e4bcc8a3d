"""Successful demonstrations by a suite's expert.

Episode i is a function of (suite, seed, i, noise) alone, whatever the number of processes. An
attempt that fails is thrown away and another one made in its place.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, UInt8

from shallow_pi import interrupts
from shallow_pi.sims import simulator

# Attempts at one episode before giving up.
ATTEMPTS = 100


@dataclasses.dataclass(frozen=True)
class Episode:
    """One recorded demonstration; frame t is what was seen, and the expert's action there."""

    # Images, and states and actions, by the robot's keys.
    images: dict[str, UInt8[np.ndarray, "t h w 3"]]
    vectors: dict[str, Float32[np.ndarray, "t d"]]
    prompt: str
    # The task's short name.
    task: str
    # Of the simulator.
    seed: int


def collect(
    suite: simulator.Suite, episodes: int, seed: int, noise: float = 1.0, workers: int = 1
) -> Iterator[Episode]:
    """Successful demonstrations, one by one and always in the same order.

    `noise` is the scale of the perturbations, 0 for the expert's own path. Processes are spawned,
    so a script that asks for several guards its entry with `if __name__ == "__main__":`.
    """
    demonstrate = functools.partial(_demonstrate, suite, seed, noise)
    if workers <= 1:
        yield from map(demonstrate, range(episodes))
        return
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        with interrupts.held():
            found = pool.map(demonstrate, range(episodes), chunksize=4)
        try:
            yield from found
        except BaseException:  # Ctrl-C too: episodes under way are not waited for.
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=2)
def _simulator(suite: simulator.Suite) -> simulator.Simulator:
    return suite.make()


def _demonstrate(suite: simulator.Suite, seed: int, noise: float, index: int) -> Episode:
    sim = _simulator(suite)
    for attempt in itertools.count():
        rng = np.random.default_rng([seed, index, attempt])
        episode = _attempt(suite, sim, int(rng.integers(2**63)), rng, noise)
        if episode is not None:
            return episode
        if attempt >= ATTEMPTS:
            raise ValueError(
                f"no success in {attempt} attempts at demonstration {index} of {suite} with noise "
                f"{noise:g}; lower the noise, or give an episode more time"
            )
    raise AssertionError("unreachable")


def _attempt(
    suite: simulator.Suite,
    sim: simulator.Simulator,
    sim_seed: int,
    rng: np.random.Generator,
    noise: float,
) -> Episode | None:
    """One recorded attempt, or None if it did not succeed."""
    sim.reset(sim_seed)
    frames, actions = [], []
    for observation, action in suite.demonstrate(sim, rng, noise):
        frames.append(observation)
        actions.append(action)
    if not (frames and sim.success):
        return None
    robot = suite.robot
    states = {key: np.array([f[key] for f in frames], np.float32) for key in robot.state_keys}
    return Episode(
        images={key: np.stack([f[key] for f in frames]) for key in robot.cameras.values()},
        vectors=states | {robot.action_key: np.array(actions, np.float32)},
        prompt=sim.prompt,
        task=sim.task,
        seed=sim_seed,
    )


def cpus() -> int:
    """Number of CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
