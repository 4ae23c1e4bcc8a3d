"""Closed-loop success: many simulators in lock-step, one batched inference for all of them.

Every simulator replans after `execute_steps` control steps; whoever is finished makes room for the
next episode of the queue. An episode depends on nothing but its seed: it resets the simulator, and
together with the index of the plan it names the sampling noise, so neither the batch size nor the
order of the episodes changes what is measured (up to the rounding of a differently shaped matrix
product). Policies evaluated with the same seed therefore saw the same episodes, pair by pair. Plans
come at once, or late by as many control steps as are injected (`late_plans`).
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8

from shallow_pi import progress
from shallow_pi.evaluation import intervals, late_plans
from shallow_pi.sims import simulator

AT_ONCE = late_plans.Delay()


@runtime_checkable
class Actor(Protocol):
    """Plans a chunk of robot actions for several episodes at once."""

    def act(
        self,
        observations: Sequence[Mapping[str, Any]],
        keys: Int[np.ndarray, "b 2"],
        sims: Sequence[simulator.Simulator],
    ) -> Float[np.ndarray, "n ah rd"]:
        """Actions in the robot's units, one chunk per simulator.

        Args:
          observations: flat LeRobot observations, always a full batch: behind the last simulator's
            the last one is repeated, so that a jitted policy compiles for one shape only.
          keys: (episode seed, index of the plan) of each observation; see `noise`.
          sims: the simulators themselves, n <= b. Only a privileged expert looks into them.

        Returns:
          At least n chunks; those behind the n-th are ignored.
        """
        ...


def noise(
    keys: Int[np.ndarray, "b 2"], action_horizon: int, action_dim: int
) -> Float[np.ndarray, "b ah ad"]:
    """The noise a policy starts from: standard normal, a function of each row's key alone."""
    shape = (action_horizon, action_dim)
    draws = [np.random.default_rng([int(k) for k in key]).standard_normal(shape) for key in keys]
    return np.stack(draws).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Episode:
    """What came of one episode."""

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
                f"Expected the same episode seeds for {self.label!r} and {other.label!r}, got "
                f"{len(mine)} from {mine[:1]} and {len(theirs)} from {theirs[:1]}; evaluate both "
                "with the same seed and number of episodes."
            )
        return intervals.paired_difference(
            [e.success for e in self.episodes], [e.success for e in other.episodes]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evaluation":
        episodes = tuple(Episode(**episode) for episode in values["episodes"])
        return cls(values["label"], values["execute_steps"], episodes)


@dataclasses.dataclass
class _Slot:
    """One place of the batch: a simulator and the episode it is in."""

    sim: simulator.Simulator
    seed: int
    plans: int = 0
    steps: int = 0
    # What is left of the chunk before; None at the first plan.
    left: Float[np.ndarray, "n rd"] | None = None

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
    actor: Actor,
    *,
    episodes: int,
    seed: int,
    execute_steps: int,
    label: str,
    batch: int = 50,
    path: pathlib.Path | None = None,
    delay: late_plans.Delay = AT_ONCE,
) -> Evaluation:
    """Run the episodes with seeds `seed`, `seed + 1`, ... and count successes.

    Args:
      make_sim: builds one simulator; called at most `batch` times.
      actor: plans for all simulators at once.
      episodes: how many episodes.
      seed: the first episode's seed.
      execute_steps: how many actions of a chunk are executed before the next plan.
      label: the policy's name, for the progress bar and errors.
      batch: how many simulators run side by side.
      path: file that keeps every finished episode as a line of JSON. Episodes found there are not
        run again, so an interrupted evaluation picks up where it was. The caller gives each policy
        its own file and deletes it when the policy changes.
      delay: how late plans arrive. For "real-time" the actor's `act` is given `previous` and
        `delay` by name as well (see `Policy.infer_batch`).
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
    with (
        _episode_log(path) as log,
        progress.bar(f"Evaluate {label}", total=episodes, done=len(finished)) as advance,
    ):
        while queue or slots:
            while queue and idle:
                sim, episode_seed = idle.pop(), queue.pop(0)
                sim.reset(episode_seed)
                slots.append(_Slot(sim, episode_seed))
            chunks = _plan(actor, slots, batch, execute_steps, label, delay)
            for slot, chunk in zip(slots, chunks, strict=True):
                slot.execute(chunk)
            ended = [slot for slot in slots if slot.sim.done]
            slots = [slot for slot in slots if not slot.sim.done]
            for slot in ended:
                finished[slot.seed] = slot.episode()
                log(finished[slot.seed])
                idle.append(slot.sim)
            if ended:
                # A count, not a rate: successes end early, so a rate would start too high.
                solved = sum(episode.success for episode in finished.values())
                advance(len(ended), note=f"{solved} solved")
    return Evaluation(label, execute_steps, tuple(finished[s] for s in wanted))


def _plan(
    actor: Actor,
    slots: Sequence[_Slot],
    batch: int,
    execute_steps: int,
    label: str,
    delay: late_plans.Delay,
) -> Float[np.ndarray, "n execute rd"]:
    """One batched inference, and the actions that are due by it.

    Checks what comes back, since a NaN would only look like a failure.
    """
    horizon = delay.horizon(execute_steps)
    observations = [slot.sim.observe() for slot in slots]
    keys = [(slot.seed, slot.plans) for slot in slots]
    padding = batch - len(slots)
    left = [slot.left for slot in slots]
    act: Callable[..., Any] = actor.act
    chunks = np.asarray(
        act(
            observations + observations[-1:] * padding,
            np.asarray(keys + keys[-1:] * padding),
            [slot.sim for slot in slots],
            **delay.conditions(left + left[-1:] * padding),
        )
    )
    if chunks.ndim != 3 or len(chunks) < len(slots) or chunks.shape[1] < horizon:
        raise ValueError(
            f"Expected actions of shape (n >= {len(slots)}, ah >= {horizon}, rd) from "
            f"{label!r}, got {chunks.shape}; execute_steps (and the control steps a plan is late) "
            "must not exceed the action horizon."
        )
    due = []
    for slot, chunk in zip(slots, chunks[: len(slots)], strict=True):
        if not np.isfinite(chunk).all():
            raise ValueError(
                f"Expected finite actions from {label!r}, got {chunk[~np.isfinite(chunk)][0]} in "
                f"plan {slot.plans} of the episode with seed {slot.seed}; check the policy's "
                "parameters and normalization statistics."
            )
        slot.plans += 1
        actions, slot.left = delay.due(slot.left, chunk, execute_steps)
        due.append(actions)
    return np.stack(due)


def _read_episodes(path: pathlib.Path | None) -> dict[int, Episode]:
    """Episodes of an earlier, perhaps interrupted run; a line cut short is left out."""
    episodes = {}
    if path is not None and path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                episode = Episode(**json.loads(line))
                episodes[episode.seed] = episode
    return episodes


@contextlib.contextmanager
def _episode_log(path: pathlib.Path | None) -> Iterator[Callable[[Episode], None]]:
    if path is None:
        yield lambda episode: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        # A line cut short by an interruption must not swallow the next one.
        if path.stat().st_size and not path.read_text().endswith("\n"):
            file.write("\n")

        def log(episode: Episode) -> None:
            file.write(json.dumps(dataclasses.asdict(episode)) + "\n")
            file.flush()

        yield log


@dataclasses.dataclass(frozen=True)
class Recording:
    """The pictures of one episode, one per control step and camera, and how it ended."""

    label: str
    prompt: str
    episode: Episode
    # Seconds of simulated time of each frame.
    times: Float[np.ndarray, " n"]
    # By camera: "base", "wrist", ...
    frames: dict[str, UInt8[np.ndarray, "n h w 3"]]


def record(
    make_sim: Callable[[], simulator.Simulator],
    actor: Actor,
    *,
    seed: int,
    execute_steps: int,
    label: str,
    batch: int = 1,
    delay: late_plans.Delay = AT_ONCE,
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
        for key, picture in slot.sim.observe().items():
            if key.startswith(prefix):
                frames.setdefault(key.removeprefix(prefix), []).append(picture)

    keep()
    while not slot.sim.done:
        (chunk,) = _plan(actor, [slot], batch, execute_steps, label, delay)
        for action in chunk:
            if not slot.sim.done:
                slot.execute(action[None])
                keep()
    return Recording(
        label=label,
        prompt=slot.sim.prompt,
        episode=slot.episode(),
        times=np.asarray(times),
        frames={camera: np.stack(pictures) for camera, pictures in frames.items()},
    )
