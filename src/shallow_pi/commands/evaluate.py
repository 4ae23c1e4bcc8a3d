"""Evaluate policies closed loop on a simulated benchmark, on the same episodes.

uv run scripts/evaluate.py POLICY [POLICY ...] --sim NAME [--episodes 50] [--execute-steps 5]

A POLICY is a run's folder, a step folder, a checkpoint of openpi or LeRobot (local, gs://, hf://),
a policy server (ws://HOST:PORT, ours or openpi's), or `expert`, the simulator's scripted expert.
NAME=POLICY gives it a name.

    student=checkpoints/pi05_libero_l6/first teacher=gs://openpi-assets/checkpoints/pi05_libero
        --sim libero --execute-steps 5
    checkpoints/pi0_metaworld_mt10_l6/first --sim metaworld_mt10 --late-ms 110
    ws://127.0.0.1:8000 expert --sim turntable --option disc_speed_deg=15

Simulators: turntable, tabletop; metaworld_mt10, metaworld_mt50 (--extra metaworld);
aloha_transfer_cube, aloha_insertion (--extra aloha-sim); libero_spatial, libero_object,
libero_goal, libero_10 (--extra libero); libero is these four, with their average.
docs/benchmarks.md describes their requirements and protocols.

All policies meet the same initial states. The results (report.md, report.json, a film of each
policy) are written to evaluations/SIM. Repeat the command to continue after an interruption; you
can add policies and raise --episodes at any time.
"""

import contextlib
import dataclasses
import hashlib
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

import tyro

from shallow_pi import flags, progress
from shallow_pi.checkpoints import run_folder, weights
from shallow_pi.commands import exits, policy_arguments
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import normalize
from shallow_pi.deploy import step_folder
from shallow_pi.evaluation import comparison, policies, rollout, served, together
from shallow_pi.inference import calibration, quantize
from shallow_pi.parallel import processes
from shallow_pi.sims import demonstrations, simulator, workers

EXPERT = "expert"
# Options of loading that change no result, and why.
_IDLE = {
    "seed": "the noise depends only on episode and plan; give --seed",
    "state_warn": "an evaluation never warns of states; give --policy.state-refuse",
}
# Entries of a server's metadata that tell its policy from another; openpi's has none.
_TOLD = (comparison.PARAMETERS, "num_steps", "quantize")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The policies, the simulator, and the execution."""

    # Policies, as above.
    policies: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="POLICY ...")]
    # Name of a simulator, or MODULE:CLASS of your own suite.
    sim: str
    # How to load the policies that are checkpoints.
    policy: policy_arguments.Loading = dataclasses.field(default_factory=policy_arguments.Loading)
    # Options of the simulator as NAME=VALUE, such as tasks=hammer,soccer.
    option: tuple[str, ...] = ()
    # Number of episodes per task (on average, if an episode draws its task).
    episodes: int = 50
    # Actions of a chunk to execute before the next plan.
    execute_steps: int = 5
    # Delay of every plan in milliseconds: one number for all policies, or one for each.
    late_ms: tuple[float, ...] = (0.0,)
    # Execution of a late plan: "skip" drops the actions whose time has passed, "late" executes all
    # of its actions late, "real-time" skips too, and makes the plan continue the actions that are
    # executed in the meantime.
    executor: rollout.Executor = "skip"
    # Seed of the first episode; later episodes have the following seeds.
    seed: int = 1_000_000
    # Folder of the results; empty uses evaluations/SIM.
    output: str = ""
    # Rename an existing folder and start a new one.
    overwrite: bool = False
    # Number of simulators to run in parallel; their plans are computed together.
    parallel: int = 16
    # Number of processes that run the simulators; 0 uses one for each CPU.
    processes: int = 0
    # Number of episodes to film with each policy.
    films: int = 1

    def __post_init__(self) -> None:
        flags.at_least(self, 1, "episodes", "execute_steps", "parallel")
        flags.at_least(self, 0, "processes", "films", "seed")
        if not self.policies:
            raise ValueError("name a policy to evaluate: a checkpoint, ws://HOST:PORT or expert")
        if not self.late_ms or not all(0 <= late < math.inf for late in self.late_ms):
            raise ValueError(f"--late-ms: expected numbers of 0 or more, got {self.late_ms}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, evaluate, print the folder."""
    given = flags.parse(Arguments, arguments, __doc__ or "", idle=_idle)
    with exits.exit_on():
        folder = evaluate(given)
    print(folder)


def _idle(given: Arguments) -> flags.Idle:
    sources = [source for _, source in map(_named, given.policies) if source != EXPERT]
    alone = "the expert plans one action at a time, and in time; leave it out"
    yield not sources, "execute_steps late_ms", alone
    yield not any(given.late_ms), "executor", "no plan is late; give --late-ms"
    loaded = [source for source in sources if not served.is_url(source)]
    fields = " ".join(f"policy.{field.name}" for field in dataclasses.fields(given.policy))
    yield not loaded, fields, "none of the policies is a checkpoint; leave it out"
    for name, reason in _IDLE.items():
        yield loaded, f"policy.{name}", reason


def evaluate(given: Arguments) -> pathlib.Path:
    """Evaluate the policies; returns the folder of the results."""
    folder = run_folder.check_output(
        given.output or f"evaluations/{given.sim.replace(':', '.')}", "give another --output"
    )
    sims = simulator.GROUPS.get(given.sim, (given.sim,))
    jobs = []
    for sim in sims:
        own = dataclasses.replace(given, sim=sim)
        course = _course(own)
        jobs.append((course, _entrants(own, course.suite)))
    if given.overwrite:
        run_folder.prepare(folder, resume=False, overwrite=True, meet=processes.sync)
    processes.cache_compilations()
    if len(sims) == 1:
        comparison.run(folder, *jobs[0])
        return folder
    with together.folder(folder, sims):
        found = {course.sim: comparison.run(folder / course.sim, course, e) for course, e in jobs}
        together.write(folder, given.sim, found)
    return folder


def _course(given: Arguments) -> comparison.Course:
    options = flags.pairs(given.option, "--option")
    suite = simulator.find_evaluated(given.sim, options)
    return comparison.Course(
        sim=given.sim,
        options=options,
        suite=suite,
        episodes=given.episodes * len(suite.task_names()),
        seed=given.seed,
        parallel=given.parallel,
        processes=given.processes or demonstrations.cpus(),
        films=given.films,
    )


def _entrants(given: Arguments, suite: simulator.Suite) -> list[comparison.Entrant]:
    """Every policy, in order; what cannot be evaluated is found out before any of them runs."""
    if len(given.late_ms) not in (1, len(given.policies)):
        raise ValueError(
            f"--late-ms: expected one number, or one for each of {len(given.policies)} policies, "
            f"got {len(given.late_ms)}"
        )
    late = given.late_ms * len(given.policies) if len(given.late_ms) == 1 else given.late_ms
    entrants = [
        _entrant(given, suite, source, milliseconds)
        for source, milliseconds in zip(given.policies, late, strict=True)
    ]
    labels = [entrant.label for entrant in entrants]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(
            f"several policies are called {' and '.join(twice)}: name them, as in NAME=POLICY"
        )
    return entrants


def _entrant(
    given: Arguments, suite: simulator.Suite, named: str, late_ms: float
) -> comparison.Entrant:
    label, source = _named(named)
    steps = math.ceil(late_ms / 1000 * suite.control_hz - 1e-9)
    if steps > given.execute_steps:
        raise ValueError(
            f"plans {late_ms:g} ms late arrive after {steps} control steps at {suite.control_hz:g} "
            f"Hz: give --execute-steps {steps} or more, got {given.execute_steps}"
        )
    delay = rollout.Delay(steps, given.executor)
    if source == EXPERT:
        if suite.expert() is None:
            raise ValueError(f"simulator {given.sim!r} has no expert")
        # It plans one action, and never late.
        expert = policies.Scripted(workers.expert)
        return comparison.Entrant(
            label or EXPERT, {"source": EXPERT}, 1, rollout.AT_ONCE, lambda: expert
        )
    if served.is_url(source):
        label = label or re.sub(r"\W+", "-", source).strip("-")

        def connect() -> served.Served:
            needed, continues = given.execute_steps + steps, delay.continues
            return served.Served(source, suite.robot, needed, continues=continues)

        with contextlib.closing(
            connect()
        ) as there:  # Of this robot, and goes on from a chunk if it must.
            own = {name: there.metadata[name] for name in _TOLD if name in there.metadata}
        origin = {"source": source, **own}
        return comparison.Entrant(label, origin, given.execute_steps, delay, connect)
    step = step_folder.find(source, given.policy.step)
    is_ours = (step / run_folder.ASSETS / policy_assets.FILE_NAME).is_file()
    needed, default = given.execute_steps + delay.steps, _label(step)
    loading = dataclasses.replace(given.policy, step="last")  # The folder is the step's.

    def check(horizon: int) -> None:
        if needed > horizon:
            raise ValueError(
                f"{step} plans {horizon} actions: --execute-steps {given.execute_steps} and "
                f"{delay.steps} control steps of lateness need {needed}"
            )

    trained: quantize.Scheme = "none"
    if is_ours:
        assets = policy_assets.load(step)
        trained = assets.quantize
        simulator.check_robot(suite, assets.robot, f"evaluate it on another --sim than {given.sim}")
        check(given.policy.action_horizon or assets.model.action_horizon)
    else:
        policy_assets.check_is_policy(step)
    origin = {
        "source": str(step),
        comparison.PARAMETERS: weights.digest(step),
        **_calibration(step, given.policy.quantize or trained),
        **_set_options(given.policy),
    }

    def load() -> policies.Policy:
        loaded = loading.load(str(step), robot=None if is_ours else suite.robot)
        if not is_ours:
            _check_dimensions(step, loaded.assets.stats, suite)
        check(loaded.noise_shape[0])
        progress.say(f"{label or default}: {loaded.description}")
        return policies.Trained(loaded)

    return comparison.Entrant(label or default, origin, given.execute_steps, delay, load)


def _named(policy: str) -> tuple[str, str]:
    """The name given to a policy, and its source."""
    match = re.fullmatch(r"(?:([\w.+-]+)=)?(.*)", policy)
    assert match is not None, "any text matches"
    return match[1] or "", match[2]


def _check_dimensions(
    step: pathlib.Path, stats: Mapping[str, normalize.NormStats], suite: simulator.Suite
) -> None:
    """Raise if a folder that does not name its robot has statistics of a larger one."""
    dims = {"state": suite.robot.state_dim, "actions": suite.robot.action_dim}
    found = {key: normalize.moving_dims(stats[key]) for key in dims}
    if any(found[key] > dims[key] for key in dims):
        raise ValueError(
            f"{step} is a policy for a robot other than {suite.robot.name!r}: state of "
            f"{found['state']} dimensions, not {dims['state']}; actions of {found['actions']}, not "
            f"{dims['actions']}"
        )


def _set_options(loading: policy_arguments.Loading) -> dict[str, object]:
    """Options of loading that change the results; the step is in the path."""
    idle = ("step", *_IDLE)
    return {
        field.name: value
        for field in dataclasses.fields(loading)
        if field.name not in idle and (value := getattr(loading, field.name)) != field.default
    }


def _calibration(step: pathlib.Path, scheme: calibration.Asked) -> dict[str, object]:
    """A digest of the bounds that a policy rounds activations with; nothing where it does not."""
    path = step / run_folder.ASSETS / calibration.FILE_NAME
    rounds = scheme == "tuned" or quantize.rounds_activations(scheme)
    if not rounds or not path.is_file():
        return {}
    return {"calibration": hashlib.sha256(path.read_bytes()).hexdigest()[:10]}


def _label(step: pathlib.Path) -> str:
    """The end of the path that tells policies apart."""
    parts = step.parts[-3:] if step.name.isdigit() else step.parts[-1:]
    return re.sub(r"[^\w.+-]+", "-", "-".join(parts)).strip("-")
