"""Closed-loop success: many simulators in lock-step, one batched inference for all of them.

Every simulator replans after `execute_steps` control steps; a finished one begins the next episode
of the queue. An episode depends on nothing but its seed: it resets the simulator, and together with
the index of the plan it names the sampling noise, so neither the batch size nor the order of the
episodes changes what is measured (up to the rounding of a differently shaped matrix product).
Policies evaluated with the same seed therefore meet the same episodes, pair by pair.

Simulators wait for a policy; robots do not. With a `Delay`, a plan arrives some control steps after
its observation, and meanwhile the chunk before is executed further, as `deploy.executors` does it
on a robot. The first plan of an episode is waited for.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float, UInt8

from shallow_pi import atomic, progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.evaluation import intervals, policies
from shallow_pi.sims import simulator

# Simulators side by side, unless asked for fewer.
BATCH = 50

T = TypeVar("T")
Executor = Literal["skip", "late", "real-time"]


@dataclasses.dataclass(frozen=True)
class Delay:
    """Lateness of plans, and the execution of a late one."""

    # Control steps between an observation and the arrival of its plan.
    steps: int = 0
    # "skip" drops the actions whose time is over, "late" executes a plan from its first action,
    # "real-time" skips, and has the plan go on from what is executed meanwhile.
    executor: Executor = "skip"

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"a plan is 0 or more control steps late, got {self.steps}")

    @property
    def continues(self) -> bool:
        """Plans go on from the chunk before."""
        return self.executor == "real-time" and self.steps > 0

    def due(
        self,
        before: Float[np.ndarray, "n rd"] | None,
        last: Float[np.ndarray, " rd"] | None,
        chunk: Float[np.ndarray, "ah rd"],
        execute_steps: int,
    ) -> tuple[Float[np.ndarray, "execute rd"], Float[np.ndarray, "m rd"]]:
        """The actions until the next observation, and what is left of the chunk then.

        A robot that runs out of actions stands: its last action is repeated until the plan is
        there, of which it then executes one before anything else. Only actions for which it
        executed others are skipped. Both as `deploy.executors` does.

        `before` is what was left of the chunk before at the observation, `last` the action executed
        last; both are None at the first.
        """
        if before is None or last is None:
            return chunk[:execute_steps], chunk[execute_steps:]
        meanwhile = before[: self.steps]
        given = len(meanwhile)
        standing = (meanwhile[-1:] if given else last[None]).repeat(self.steps - given, axis=0)
        start = 0 if self.executor == "late" else given
        end = start + max(execute_steps - given, min(len(standing), 1))
        return np.concatenate([meanwhile, standing, chunk[start:end]]), chunk[end:]

    def previous(
        self, left: list[Float[np.ndarray, "n rd"] | None]
    ) -> list[Float[np.ndarray, "n rd"]] | None:
        """The rest of each chunk, for a late plan in "real-time" to go on from; else None."""
        seen = next((chunk for chunk in left if chunk is not None), None)
        if not self.continues or seen is None:
            return None
        return [seen[:0] if chunk is None else chunk for chunk in left]


AT_ONCE = Delay()


@dataclasses.dataclass(frozen=True)
class Episode:
    """Outcome of one episode."""

    seed: int
    task: str
    success: bool
    # Control steps taken.
    steps: int


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The episodes of one policy, ordered by seed."""

    label: str
    execute_steps: int
    episodes: tuple[Episode, ...]

    @property
    def successes(self) -> int:
        return sum(episode.success for episode in self.episodes)

    @property
    def rate(self) -> float:
        return self.successes / len(self.episodes)

    def wilson(self) -> tuple[float, float]:
        """95 % interval of the success rate."""
        return intervals.wilson(self.successes, len(self.episodes))

    def by_task(self) -> dict[str, "Evaluation"]:
        """The same evaluation, one task at a time, sorted by name."""
        return {
            task: dataclasses.replace(
                self, episodes=tuple(e for e in self.episodes if e.task == task)
            )
            for task in sorted({episode.task for episode in self.episodes})
        }

    def minus(self, other: "Evaluation") -> intervals.Difference:
        """This policy's success rate minus `other`'s, paired by episode."""
        mine, theirs = ([e.seed for e in x.episodes] for x in (self, other))
        if mine != theirs:
            raise ValueError(
                f"Expected the same seeds for {self.label!r} and {other.label!r}, got {len(mine)} "
                f"from {mine[:1]} and {len(theirs)} from {theirs[:1]}; evaluate both on the same."
            )
        return intervals.paired_difference(
            [e.success for e in self.episodes], [e.success for e in other.episodes]
        )


@dataclasses.dataclass
class _Slot:
    """One place of the batch: a simulator and the episode it is in."""

    sim: simulator.Simulator
    seed: int
    plans: int = 0
    steps: int = 0
    # Rest of the previous chunk, and the last action before the plan; None at the first plan.
    left: Float[np.ndarray, "n rd"] | None = None
    last: Float[np.ndarray, " rd"] | None = None

    def execute(self, chunk: Float[np.ndarray, "ah rd"]) -> None:
        for action in chunk:
            if self.sim.done:
                return
            self.sim.step(action)
            self.steps += 1

    def episode(self) -> Episode:
        return Episode(self.seed, self.sim.task, bool(self.sim.success), self.steps)


def evaluate(
    make_sim: Callable[[], simulator.Simulator],
    policy: policies.Policy,
    *,
    episodes: int,
    seed: int,
    execute_steps: int,
    label: str,
    batch: int = BATCH,
    path: pathlib.Path | None = None,
    delay: Delay = AT_ONCE,
    threads: int = 1,
    scene: Callable[[int], int] = lambda seed: 0,
) -> Evaluation:
    """Run the episodes with seeds `seed`, `seed + 1`, ... and count successes.

    Args:
      make_sim: builds one simulator; called at most `batch` times.
      policy: plans for all simulators at once.
      episodes: how many episodes.
      seed: the first episode's seed.
      execute_steps: how many actions of a chunk are executed before the next plan.
      label: the policy's name, for the progress bar and errors.
      batch: how many simulators run side by side.
      path: file that keeps every finished episode as a line of JSON. Episodes found there are not
        run again, so an interrupted evaluation picks up where it was. The caller gives each policy
        its own file and deletes it when the policy changes.
      delay: how late plans arrive.
      threads: how many simulators render and move at once; more than one for simulators that are
        in other processes (`sims.workers`).
      scene: by an episode's seed; a simulator goes on with episodes of its scene while there are
        any (see `simulator.scene`).
    """
    if min(episodes, execute_steps, batch) < 1:
        raise ValueError(
            f"Expected at least 1 episode, 1 executed step and a batch of 1, got {episodes=}, "
            f"{execute_steps=}, {batch=}."
        )
    wanted = range(seed, seed + episodes)
    finished = {s: e for s, e in _read_episodes(path).items() if s in wanted}
    queue = [s for s in wanted if s not in finished]
    batch = min(batch, episodes)
    idle = [make_sim() for _ in range(min(batch, len(queue)))]
    slots: list[_Slot] = []
    scenes: dict[int, int] = {}

    def begin() -> _Slot:
        sim = idle.pop()
        seed = next((s for s in queue if scenes.get(id(sim)) == scene(s)), queue[0])
        queue.remove(seed)
        scenes[id(sim)] = scene(seed)
        return _Slot(sim, seed)

    if path is not None:  # A file that cannot be written is known before the first episode.
        with run_folder.writing(path, "repeat the command"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
    with (
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
        progress.bar(f"Evaluate {label}", total=episodes, done=len(finished)) as advance,
    ):
        while queue or slots:
            begun = [begin() for _ in range(min(len(queue), len(idle)))]
            _each(pool, lambda slot: slot.sim.reset(slot.seed), begun)
            slots += begun
            chunks = _plan(policy, slots, batch, execute_steps, label, delay, pool)
            _each(pool, _Slot.execute, slots, chunks)
            ended = [slot for slot in slots if slot.sim.done]
            slots = [slot for slot in slots if not slot.sim.done]
            for slot in ended:
                finished[slot.seed] = slot.episode()
                if path is not None:
                    _log(path, finished[slot.seed])
                idle.append(slot.sim)
            if ended:
                # A count, not a rate: successes end early, so a rate would start too high.
                solved = sum(episode.success for episode in finished.values())
                advance(len(ended), note=f"{solved} solved")
    return Evaluation(label, execute_steps, tuple(finished[s] for s in wanted))


def _each(
    pool: concurrent.futures.Executor | None, call: Callable[..., T], *arguments: Sequence[Any]
) -> list[T]:
    """The results of `call`, by the threads of the pool."""
    return list((map if pool is None else pool.map)(call, *arguments))


def _plan(
    policy: policies.Policy,
    slots: Sequence[_Slot],
    batch: int,
    execute_steps: int,
    label: str,
    delay: Delay,
    pool: concurrent.futures.Executor | None = None,
) -> list[Float[np.ndarray, "execute rd"]]:
    """One batched inference, and the actions that are due by it.

    Checks what comes back, since a NaN would only look like a failure.
    """
    if isinstance(policy, policies.Scripted):  # It looks into the simulators: no images.
        observations: list[simulator.Observation] = [{} for _ in slots]
    else:
        observations = _each(pool, lambda slot: slot.sim.observe(), slots)
    keys = [(slot.seed, slot.plans) for slot in slots]
    padding = batch - len(slots)
    left = [slot.left for slot in slots]
    previous = delay.previous(left + left[-1:] * padding)
    chunks = np.asarray(
        policy.plan(
            observations + observations[-1:] * padding,
            np.asarray(keys + keys[-1:] * padding),
            [slot.sim for slot in slots],
            previous=previous,
            delay=0 if previous is None else delay.steps,
        )
    )
    if chunks.ndim != 3 or len(chunks) < len(slots) or chunks.shape[1] < execute_steps:
        raise ValueError(
            f"Expected actions of shape (n >= {len(slots)}, ah >= {execute_steps}, rd) "
            f"from {label!r}, got {chunks.shape}; execute_steps must not exceed the action horizon."
        )
    due = []
    for slot, chunk in zip(slots, chunks[: len(slots)], strict=True):
        if not np.isfinite(chunk).all():
            raise ValueError(
                f"Expected finite actions from {label!r}, got {chunk[~np.isfinite(chunk)][0]} in "
                f"plan {slot.plans} of seed {slot.seed}; check its parameters and normalization "
                "statistics."
            )
        slot.plans += 1
        actions, slot.left = delay.due(slot.left, slot.last, chunk, execute_steps)
        slot.last = actions[-1]
        due.append(actions)
    return due


def stored(path: pathlib.Path, label: str, seed: int, episodes: int) -> Evaluation | None:
    """The evaluation that `evaluate` kept in a file, if all its episodes are there."""
    found = _read_episodes(path)
    wanted = range(seed, seed + episodes)
    if not found.keys() >= set(wanted):
        return None
    return Evaluation(label, 0, tuple(found[s] for s in wanted))


def _read_episodes(path: pathlib.Path | None) -> dict[int, Episode]:
    """Episodes of an earlier, perhaps interrupted run; a damaged line is left out."""
    episodes = {}
    if path is not None and path.exists():
        for line in path.read_bytes().splitlines():
            with contextlib.suppress(TypeError, ValueError):
                episode = Episode(**json.loads(line))
                episodes[episode.seed] = episode
    return episodes


def _log(path: pathlib.Path, episode: Episode) -> None:
    with run_folder.writing(path, "repeat the command"):
        atomic.append(path, json.dumps(dataclasses.asdict(episode)))


@dataclasses.dataclass(frozen=True)
class Recording:
    """The images of one episode, one per control step and camera, and how it ended."""

    label: str
    prompt: str
    episode: Episode
    # Seconds of simulated time of each frame.
    times: Float[np.ndarray, " n"]
    # By camera's key, or the end of LeRobot's: "base", "wrist", ...
    frames: dict[str, UInt8[np.ndarray, "n h w 3"]]


def record(
    make_sim: Callable[[], simulator.Simulator],
    policy: policies.Policy,
    *,
    seed: int,
    execute_steps: int,
    label: str,
    batch: int = 1,
    delay: Delay = AT_ONCE,
) -> Recording:
    """Run one episode as `evaluate` would and keep what its cameras saw.

    Give `evaluate`'s `batch` to reuse what it compiled.
    """
    prefix = "observation.images."
    sim = make_sim()
    sim.reset(seed)
    slot = _Slot(sim, seed)
    times: list[float] = []
    frames: dict[str, list[np.ndarray]] = {}

    def keep() -> None:
        times.append(slot.sim.time)
        for key, image in slot.sim.observe().items():
            if np.ndim(image) == 3:
                frames.setdefault(key.removeprefix(prefix), []).append(image)

    keep()
    while not slot.sim.done:
        (chunk,) = _plan(policy, [slot], batch, execute_steps, label, delay)
        for action in chunk:
            if not slot.sim.done:
                slot.execute(action[None])
                keep()
    return Recording(
        label=label,
        prompt=slot.sim.prompt,
        episode=slot.episode(),
        times=np.asarray(times),
        frames={camera: np.stack(images) for camera, images in frames.items()},
    )
