"""Measure cells: episodes in closed loop, and the distributions of plans in open loop.

`measure` yields what it finds block by block. `run` spreads cells over processes and appends their
blocks to a results file.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jaxtyping import Float

from shallow_pi import interrupts, progress
from shallow_pi.deploy import policy as deployed
from shallow_pi.evaluation import policies, rollout
from shallow_pi.evidence import measures, sources
from shallow_pi.evidence.claims import cells, recipes
from shallow_pi.parallel import processes
from shallow_pi.sims import simulator, tabletop

# Simulators side by side; of Meta-World, whose scenes take 21 MB for each task; episodes a line of
# results.
BATCH, MANY_SCENES, BLOCK = 50, 20, 125
# Held-out observations of a cell of plans, plans at each, and control steps of an expert's plan.
OBSERVATIONS, PLANS, HORIZON = 64, 16, 20
# The expert has played at most so many steps when a held-out observation is made.
PLAYED = 15


@dataclasses.dataclass(frozen=True)
class Job:
    """The missing part of a cell."""

    cell: cells.Cell
    seeds: tuple[int, ...]
    # The policy with whose plans those of a cell of plans are compared.
    teacher: str = ""
    # Length of an episode at most, seconds; 0 is the simulator's own limit.
    max_seconds: float = 0.0


def jobs(
    wanted: Sequence[cells.Cell],
    results: cells.Results,
    teacher_of: Callable[[str], str],
    episodes: int,
) -> list[Job]:
    """The missing part of each cell that is not complete, in order.

    Plans are compared with those of the policy's teacher, which `teacher_of` gives by slug.
    """
    found = []
    for cell in dict.fromkeys(wanted):
        first, count = cells.EPISODE_SEED, episodes
        if cell.kind == "chunks":
            first, count = cells.OBSERVATION_SEED, min(OBSERVATIONS, episodes)
        missing = sorted(set(range(first, first + count)) - results.seeds(cell))
        if missing:
            found.append(Job(cell, tuple(missing), teacher_of(cell.policy)))
    return found


# Seed, task and columns of an episode or observation.
Found = list[tuple[int, str, dict[str, float]]]


class Watched:
    """A simulator that records the outcome of each of its episodes (see `simulator.Simulator`).

    Episodes end after `max_seconds`, or at the simulator's own limit if it is 0; outcomes are
    appended to `ended`.
    """

    def __init__(
        self, world: simulator.Followed, control_hz: float, max_seconds: float, ended: Found
    ):
        self.world = world
        self._control_hz, self._max_seconds, self._ended = control_hz, max_seconds, ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self.world, name)

    def reset(self, seed: int) -> None:
        """Start an episode, and its path."""
        self.world.reset(seed)
        self._seed, self._path = seed, [self.world.tip]

    @property
    def done(self) -> bool:
        """The episode is over, or cut off."""
        cut_off = self._max_seconds and self.world.time >= self._max_seconds - 1e-9
        return bool(self.world.done or cut_off)

    def step(self, action: simulator.Action) -> None:
        """Apply an action; when the episode is over, record its outcome."""
        world = self.world
        world.step(action)
        self._path.append(world.tip)
        if self.done:
            path = np.array(self._path)
            outcome = {
                "success": float(world.success),
                "steps": len(path) - 1.0,
                "path_mm": round(measures.path_length(path)),
                "jerk": round(measures.jerk(path, self._control_hz), 2),
                **world.happened(),
            }
            self._ended.append((self._seed, world.task, outcome))


def measure(job: Job, runs: pathlib.Path) -> Iterator[cells.Block]:
    """The missing blocks of a cell."""
    digest = _digest(job.cell.policy, runs)
    origin = {"commit": commit(), "device": jax.devices()[0].device_kind}
    start = time.monotonic()
    for found in (_chunks if job.cell.kind == "chunks" else _episodes)(job, runs):
        seconds = round(time.monotonic() - start, 1)
        start = time.monotonic()
        seeds, tasks, rows = zip(*sorted(found, key=lambda one: one[0]), strict=True)
        names = [name for name in cells.COLUMNS[job.cell.kind] if name in rows[0]]
        columns = {name: [row[name] for row in rows] for name in names}
        yield cells.Block(job.cell, digest, seeds, tasks, columns, {**origin, "seconds": seconds})


@functools.lru_cache(maxsize=2)
def _worlds(suite: simulator.Suite) -> list[simulator.Followed]:
    """Idle simulators, kept from cell to cell with their compiled scenes."""
    return []


def _episodes(job: Job, runs: pathlib.Path) -> Iterator[Found]:
    situation = job.cell.situation
    suite = situation.suite
    acting: policies.Policy
    execute_steps = situation.execute_steps
    if job.cell.policy == recipes.EXPERT:
        play = suite.expert()
        assert play is not None, "every suite of the studies has one"
        acting, execute_steps = policies.Scripted(lambda watched: play(watched.world)), 1
    else:
        acting = policies.Trained(policy(job.cell.policy, runs, situation.num_steps))
    for start in range(0, len(job.seeds), BLOCK):
        yield _block(job, suite, acting, execute_steps, job.seeds[start : start + BLOCK])


def _block(
    job: Job,
    suite: simulator.Suite,
    acting: policies.Policy,
    execute_steps: int,
    seeds: Sequence[int],
) -> Found:
    """The episodes of these seeds."""
    ended: Found = []
    idle, used = _worlds(suite), list[Watched]()

    def watched() -> Watched:
        world = idle.pop() if idle else cast(simulator.Followed, suite.make())
        used.append(Watched(world, suite.control_hz, job.max_seconds, ended))
        return used[-1]

    situation = job.cell.situation
    batch = MANY_SCENES if situation.sim == "metaworld_mt10" else BATCH
    with tempfile.TemporaryDirectory() as folder:
        # `evaluate` takes a range of seeds, less those that a file says are done.
        path, wanted = pathlib.Path(folder) / "done.jsonl", set(seeds)
        span = range(seeds[0], seeds[-1] + 1)
        done = [rollout.Episode(seed, "", False, 0) for seed in span if seed not in wanted]
        path.write_text("".join(json.dumps(dataclasses.asdict(e)) + "\n" for e in done))
        rollout.evaluate(
            watched,
            acting,
            episodes=len(span),
            seed=span.start,
            execute_steps=execute_steps,
            label=job.cell.name,
            batch=min(batch, len(wanted)),
            path=path,
            delay=situation.delay,
        )
    idle += [one.world for one in used]
    return ended


def _chunks(job: Job, runs: pathlib.Path) -> Iterator[Found]:
    situation = job.cell.situation
    at = runs, situation.tasks, job.seeds
    held = held_out(*at[1:])
    references = _plans(job.teacher, cells.NUM_STEPS, *at, salt=1)
    planned = _plans(job.cell.policy, situation.num_steps, *at, salt=2)
    found: Found = []
    for one, own, teachers in zip(held, planned, references, strict=True):
        expert = one.expert[:, : own.shape[1]]
        outcome = {
            "to_teacher_mm": measures.chunk_distance(own, teachers),
            "to_expert_mm": measures.chunk_distance(own, expert),
            "spread_mm": measures.sideways_spread(own, one.towards),
        }
        found.append((one.seed, one.task, {name: round(v, 3) for name, v in outcome.items()}))
    yield found


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A state that no demonstration has, and what the expert might do from there."""

    seed: int
    task: str
    observation: simulator.Observation
    towards: Float[np.ndarray, "2"]
    expert: Float[np.ndarray, "n h 3"]


@functools.lru_cache(maxsize=4)
def held_out(tasks: tuple[str, ...], seeds: tuple[int, ...]) -> list[HeldOut]:
    """States on the expert's way, and samples of its plans there."""
    sim = tabletop.Suite(tasks=tasks).make()
    return [_state(sim, seed) for seed in seeds]


def _state(sim: tabletop.Tabletop, seed: int) -> HeldOut:
    rng = np.random.default_rng([seed, 0])
    side, played = (1 if rng.uniform() < 0.5 else -1), int(rng.integers(PLAYED))

    def start(played: int) -> None:
        sim.reset(seed)
        sim.side = side
        _play(sim, np.random.default_rng([seed, 1]), played)

    start(played)
    if sim.task == "around" or sim.done:
        played = 0  # Before the pillar, where both ways are open; or before the end.
        start(played)
    observation = sim.observe()
    towards = sim.positions[sim.target, :2] - sim.tip[:2]
    plans = []
    for plan in range(PLANS):
        start(played)
        sim.side = 1 if plan % 2 else -1
        plans.append(_play(sim, np.random.default_rng([seed, 2, plan]), HORIZON))
    return HeldOut(seed, sim.task, observation, towards, np.stack(plans))


def _play(sim: tabletop.Tabletop, rng: np.random.Generator, steps: int) -> Float[np.ndarray, "h 3"]:
    """The expert's actions, perturbed when executed as in demonstrations (`gantry.demonstrate`)."""
    spread, wander, actions = rng.uniform(0, 0.003), np.zeros(3), []
    for _ in range(steps):
        if not sim.done:
            actions.append(tabletop.expert(sim))
            wander = 0.7 * wander + np.sqrt(1 - 0.7**2) * rng.normal(scale=spread, size=3)
            sim.step(actions[-1] + wander)
    return np.array(actions + actions[-1:] * (steps - len(actions)))


@functools.lru_cache(maxsize=4)
def _plans(
    slug: str,
    num_steps: int,
    runs: pathlib.Path,
    tasks: tuple[str, ...],
    seeds: tuple[int, ...],
    salt: int,
) -> list[Float[np.ndarray, "n h 3"]]:
    """A policy's plans at each held-out observation; another salt is other noise."""
    planner, found = policy(slug, runs, num_steps), []
    held = held_out(tasks, seeds)
    keys = [[one.seed, salt * 1000 + plan] for one in held for plan in range(PLANS)]
    observations = [one.observation for one in held for _ in range(PLANS)]
    size = 4 * PLANS
    for i in range(0, len(keys), size):
        # Always full batches, so that one shape is compiled.
        rows = [min(row, len(keys) - 1) for row in range(i, i + size)]
        noise = policies.noise(np.array([keys[row] for row in rows]), *planner.noise_shape)
        found.append(planner.infer_batch([observations[row] for row in rows], noise))
    whole = np.concatenate(found)[: len(keys)]
    return list(whole.reshape(len(held), PLANS, *whole.shape[1:]))


@functools.lru_cache(maxsize=4)
def policy(slug: str, runs: pathlib.Path, num_steps: int) -> deployed.Policy:
    return sources.load(slug, runs, num_steps)


@functools.lru_cache(maxsize=4)
def _digest(slug: str, runs: pathlib.Path) -> str:
    return sources.digest(slug, runs)


@functools.lru_cache(maxsize=1)
def commit() -> str:
    """Of the source, where it is a clone."""
    try:
        asked = ["git", "-C", str(pathlib.Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def run(todo: Sequence[Job], runs: pathlib.Path, output: pathlib.Path, workers: int) -> None:
    """Measure jobs in this many processes and append their blocks to a file.

    Each process keeps to one core, so that many small policies run side by side; one alone uses
    the whole device. A job that fails does not stop the others.

    Raises:
      ValueError: some jobs failed; says which, and why.
    """
    total = sum(len(job.seeds) for job in todo)
    failed: dict[str, str] = {}
    # One process shows the bar of each cell, and beside it a line as cells are done.
    bar = progress.bar("Episodes", total=total) if workers > 1 else _lines(total)
    with bar as advance, _results(workers) as submit:
        pending = {submit(_work, job, runs, output): job for job in todo}
        for future in concurrent.futures.as_completed(pending):
            name, error = pending[future].cell.name, future.result()
            if error:
                failed[name] = error
                progress.say(f"{name}: {error}")
            advance(len(pending[future].seeds), note=name)
    if failed:
        few = "; ".join(f"{name}: {error}" for name, error in list(failed.items())[:3])
        raise ValueError(f"{len(failed)} of {len(todo)} cells failed: {few}")


@contextlib.contextmanager
def _lines(total: int) -> Iterator[progress.Advance]:
    """A line with an estimate of the time left whenever a cell is done."""
    start, count = time.monotonic(), 0

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal count
        count += amount
        left = (time.monotonic() - start) / count * (total - count)
        progress.say(f"{count} of {total} episodes, ETA {left:.0f} s: {note}")

    yield advance


Submit = Callable[..., concurrent.futures.Future[str]]


@contextlib.contextmanager
def _results(workers: int) -> Iterator[Submit]:
    """Do jobs in processes, or in the only other thread of this one."""
    if workers <= 1:
        with concurrent.futures.ThreadPoolExecutor(1) as alone:
            try:
                yield alone.submit
            finally:
                alone.shutdown(cancel_futures=True)
        return
    context = multiprocessing.get_context("spawn")
    cores: Any = context.SimpleQueue()
    for index in range(workers):
        cores.put(index)
    os.environ["JAX_PLATFORMS"] = "cpu"  # Of the workers: many processes do not share a GPU well.
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_begin, initargs=(cores,)
    ) as pool:

        def submit(*arguments: Any) -> concurrent.futures.Future[str]:
            with interrupts.held():  # It may start a process.
                return pool.submit(*arguments)

        try:
            yield submit
        finally:
            pool.shutdown(cancel_futures=True)


def _begin(cores: Any) -> None:
    """Keep a worker on a core of its own, and quiet."""
    progress.console.quiet = True
    processes.cache_compilations()
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {allowed[cores.get() % len(allowed)]})


def _work(job: Job, runs: pathlib.Path, output: pathlib.Path) -> str:
    """Measure a job and write its blocks; an error's text, or ""."""
    try:
        for block in measure(job, runs):
            cells.append(output, block)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def digests(slugs: Sequence[str], runs: pathlib.Path) -> Mapping[str, str]:
    """Digests of the policies that are there, by slug."""
    return {slug: _digest(slug, runs) for slug in slugs if sources.exists(slug, runs)}
