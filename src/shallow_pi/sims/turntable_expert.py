"""The turntable's scripted expert, and demonstrations by it.

The expert sees the true scene and has no memory: its action is a smooth function of the tip and the
target, so that a policy can imitate it from one observation. The height it asks for falls with the
distance to the target like the wall of a funnel. Demonstrations perturb what is executed and record
the expert's own action in every state reached, and some begin after an unrecorded excursion that
leaves the peg low and a few centimetres off, so that recoveries are in the data while no label has
to foresee a perturbation.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import multiprocessing
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int, UInt8

from shallow_pi import progress
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.data.robots import robot as robots
from shallow_pi.sims import simulator, turntable, turntable_scene

HOVER = 0.035  # above the target's top
STRIDE = 0.008  # longest way from the tip to the commanded point: about 0.2 m/s
PRESS_DEPTH = 0.004  # commanded below a block's top
INSERT_DEPTH = 0.020  # commanded below a cup's rim
SERVO_LAG = turntable_scene.SERVO_DAMPING / turntable_scene.SERVO_STIFFNESS


def _ramp(value: float, low: float, high: float) -> float:
    """0 below `low`, 1 above `high`, smooth between."""
    x = float(np.clip((value - low) / (high - low), 0.0, 1.0))
    return x * x * (3 - 2 * x)


def _limit(way: Float[np.ndarray, " n"], longest: float) -> Float[np.ndarray, " n"]:
    """`way`, shortened smoothly so that it never exceeds `longest`."""
    return way / np.sqrt(1 + (way @ way) / longest**2)


class Expert:
    """Goes above the target, descends as it comes into line, and keeps pressing."""

    def action(self, sim: turntable.Turntable) -> Float[np.ndarray, "3"]:
        """The absolute target for the tip, from the simulator's true state."""
        tip, goal = sim.tip, sim.positions[sim.target]
        turn = np.deg2rad(sim.config.disc_speed_deg) * (SERVO_LAG + 0.5 / sim.config.control_hz)
        cos, sin = np.cos(turn), np.sin(turn)
        ahead = np.array([[cos, -sin], [sin, cos]]) @ goal[:2]  # where a turning target will be
        error = float(np.hypot(*(tip[:2] - goal[:2])))
        if sim.task == "insert":
            play = sim.config.clearance_mm / 1000
            depth, inner, outer = INSERT_DEPTH, 0.7 * play, 1.5 * play
        else:
            depth, inner, outer = PRESS_DEPTH, 0.004, 0.011
        brim = 0.004  # kept above the target's top until in line
        height = -depth + (brim + depth) * _ramp(error, inner, outer)
        height += (HOVER - brim) * _ramp(error, outer, outer + 0.022)
        # Beside the target and low: rise first, so as not to push against its side.
        low = 1 - _ramp(tip[2] - goal[2], -0.004, 0.002)
        free = 1 - low * _ramp(error, outer, 1.5 * outer)
        across = _limit(free * (ahead - tip[:2]), STRIDE)
        down = _limit(np.array([goal[2] + height - tip[2]]), STRIDE)
        return tip + np.concatenate([across, down])


@dataclasses.dataclass(frozen=True)
class Episode:
    """One recorded demonstration; frame t is what was seen, and the expert's action there."""

    images: dict[str, UInt8[np.ndarray, "t h w 3"]]
    state: Float32[np.ndarray, "t 3"]
    action: Float32[np.ndarray, "t 3"]
    task: str  # the prompt
    name: str  # the task's short name
    seed: int  # of the simulator
    success: bool
    discarded: int  # attempts without success before this one


def demonstrations(
    config: turntable.TurntableConfig, episodes: int, seed: int, noise: float = 1.0
) -> Iterator[Episode]:
    """Successful demonstrations, one by one.

    Args:
      config: the family of episodes.
      episodes: how many to give.
      seed: episode i is a function of (config, seed, i, noise) alone.
      noise: scale of the perturbations; 0 for the expert's own path.
    """
    for index in range(episodes):
        yield _demonstrate(config, seed, noise, index)


def collect(
    config: turntable.TurntableConfig,
    episodes: int,
    seed: int,
    noise: float = 1.0,
    workers: int = 2,
) -> Iterator[Episode]:
    """The same episodes in the same order as `demonstrations`, from several processes.

    The processes are spawned, so a script that calls this guards its entry with
    `if __name__ == "__main__":`.
    """
    if workers <= 1:
        yield from demonstrations(config, episodes, seed, noise)
        return
    demonstrate = functools.partial(_demonstrate, config, seed, noise)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        try:
            yield from pool.map(demonstrate, range(episodes), chunksize=4)
        finally:
            pool.shutdown(cancel_futures=True)


@functools.lru_cache(maxsize=2)
def _simulator(config: turntable.TurntableConfig) -> turntable.Turntable:
    return turntable.Turntable(config)


def _demonstrate(config: turntable.TurntableConfig, seed: int, noise: float, index: int) -> Episode:
    sim = _simulator(config)
    for attempt in itertools.count():
        rng = np.random.default_rng([seed, index, attempt])
        episode = _attempt(sim, int(rng.integers(2**63)), rng, noise)
        if episode is not None:
            return dataclasses.replace(episode, discarded=attempt)
        if attempt >= 100:
            raise ValueError(
                f"no success in {attempt} attempts at demonstration {index} of {config} with "
                f"noise {noise}; lower the noise or raise max_seconds"
            )
    raise AssertionError("unreachable")


def _attempt(
    sim: turntable.Turntable, sim_seed: int, rng: np.random.Generator, noise: float
) -> Episode | None:
    """One recorded attempt, or None where it did not succeed."""
    expert = Expert()
    sim.reset(sim_seed)
    if noise and rng.uniform() < 0.4:
        _excursion(sim, rng, noise)
    frames: list[dict] = []
    actions = []
    play = sim.config.clearance_mm / 1000 if sim.task == "insert" else np.inf
    spread = noise * rng.uniform(0, min(0.003, play))  # metres, of the perturbation
    wander = np.zeros(3)
    while not sim.done:
        clean = expert.action(sim)
        frames.append(sim.observe())
        actions.append(clean)
        wander = 0.7 * wander + np.sqrt(1 - 0.7**2) * rng.normal(scale=spread, size=3)
        sim.step(clean + wander)
    if not (frames and sim.success):
        return None
    key = "observation.images."
    return Episode(
        images={c: np.stack([f[key + c] for f in frames]) for c in turntable.CAMERAS},
        state=np.stack([f["observation.state"] for f in frames]),
        action=np.array(actions, np.float32),
        task=sim.prompt,
        name=sim.task,
        seed=sim_seed,
        success=sim.success,
        discarded=0,
    )


def _excursion(sim: turntable.Turntable, rng: np.random.Generator, noise: float) -> None:
    """Bring the peg, unrecorded, near some object: mostly the target, at any height above it."""
    wanted = sim.target if rng.uniform() < 0.8 else int(rng.integers(len(sim.positions)))
    spot = sim.positions[wanted] + [*rng.normal(scale=noise * 0.02, size=2), 0.0]
    spot[2] += rng.uniform(0.002, HOVER)
    expert_height = turntable_scene.CUP_HEIGHT + HOVER
    for _ in range(40):
        way = spot - sim.tip
        if np.hypot(*way[:2]) > 0.01:
            way[2] = max(spot[2], expert_height) - sim.tip[2]
        if np.linalg.norm(way) < 0.004 or sim.done:
            return
        sim.step(sim.tip + _limit(way, 5 * STRIDE))


class ExpertActor:
    """The scripted expert as a policy that plans one action at a time."""

    def act(
        self,
        observations: Sequence[Mapping[str, Any]],
        keys: Int[np.ndarray, "b 2"],
        sims: Sequence[simulator.Simulator],
    ) -> Float[np.ndarray, "n 1 rd"]:
        """The expert looks into the simulators, not at the observations."""
        expert = Expert()
        actions = []
        for sim in sims:
            assert isinstance(sim, turntable.Turntable), "this expert knows the turntable"
            actions.append(expert.action(sim))
        return np.stack(actions)[:, None]


def write(
    path: pathlib.Path,
    config: turntable.TurntableConfig,
    episodes: int,
    seed: int,
    noise_scale: float = 1.0,
) -> None:
    """Have the expert solve the task and write the episodes as a LeRobot dataset."""
    robot = robots.TURNTABLE
    axes = ("x", "y", "z")
    with (
        lerobot_writer.Writer(
            path, int(robot.fps), state_names=axes, action_names=axes, robot_type=robot.name
        ) as writer,
        progress.bar("Demonstrations", total=episodes) as advance,
    ):
        for episode in collect(config, episodes, seed, noise_scale):
            writer.add_episode(episode.images, episode.state, episode.action, episode.task)
            advance(1)
