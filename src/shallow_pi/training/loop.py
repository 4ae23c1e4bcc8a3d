"""Training: the steps of an opened run, with their log, validation and checkpoints.

A step is dispatched while the previous one still runs, and its metrics are fetched while later ones
run (`metrics_buffer`). Validation runs before the first step and at intervals, and is logged in the
row of its step; a step that is the best so far is saved.
"""

import contextlib
import functools
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping

import jax
from jaxtyping import PyTree

from shallow_pi import interrupts, progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.data import loader, sheet
from shallow_pi.distill import step, student
from shallow_pi.parallel import processes, shapes, sharding
from shallow_pi.planning import memory
from shallow_pi.training import checkpoint, metrics, metrics_buffer, profiling, setup, validation
from shallow_pi.training import run as runs

# Writes the row of a step.
Log = Callable[[int, metrics_buffer.Row], None]


class NonFiniteLossError(RuntimeError):
    """A loss is NaN or infinite; no checkpoint was saved from that step on."""


class InterruptedRunError(RuntimeError):
    """The run was stopped by a signal; its last step is saved."""


# Errors that end a run and are no bugs.
ENDS = (NonFiniteLossError, InterruptedRunError)


def train(run: runs.Run, label: str = "Distil") -> pathlib.Path:
    """Train to the end and return the last step's folder.

    Args:
      run: the run; it resumes from its folder's last checkpoint. The caller has claimed the folder
        (`runs.claimed`), where the config is saved first.
      label: label of the progress bar.

    Raises:
      checkpoint.SaveError, memory.DoesNotFitError, NonFiniteLossError, InterruptedRunError: see
        their docstrings.
    """
    experiment, end = run.experiment, run.experiment.num_train_steps
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory.explained(experiment.batch_size))
        run.save_config()
        whole_teacher = run.load_teacher()
        checkpoints = stack.enter_context(_checkpoints(run, whole_teacher))
        feed = stack.enter_context(contextlib.closing(run.feed()))
        state = start(run, whole_teacher, checkpoints, feed)
        first = int(state.step) + 1
        log = _open_log(run, first, stack)
        held_out = _validation(run, whole_teacher)
        teacher = shapes.held_teacher(run.spec, whole_teacher)
        del whole_teacher  # The rest leaves the devices.
        key = jax.random.key(experiment.seed)
        advance, gradient_norms = _compile(run, state)
        if first == 1 and held_out is not None:
            log(0, held_out.measure(teacher, state))
        tell = stack.enter_context(processes.bar(label, end, first - 1))

        def write(number: int, row: metrics_buffer.Row) -> None:
            log(number, row)
            tell(0, note=f"loss {row['loss']:.4f}")

        def save(number: int, row: metrics_buffer.Row, error: float | None = None) -> None:
            with buffer.stalling(row):
                checkpoints.save(number, state, feed.state(), run.save_assets, error=error)

        check = functools.partial(_require_finite, checkpoints)
        buffer = metrics_buffer.MetricsBuffer(write, check, experiment.log_interval)
        stopping = stack.enter_context(_stop_signals())
        steps = profiling.traced(
            first, end, experiment.profile, run.folder, lambda: jax.block_until_ready(state)
        )
        number = first - 1
        for number in stack.enter_context(steps):
            with buffer.waiting():
                batch = next(feed)
            more: step.Metrics = {}
            if experiment.gradient_interval and number % experiment.gradient_interval == 0:
                more = gradient_norms(teacher, state, key, batch)
            state, values = advance(teacher, state, key, batch)
            buffer.add(number, {**values, **more})
            checkpoints.poll()
            tell(1)
            stops = stopping.after(number)  # Asked once, so that a stop always saves.
            measures = held_out is not None and held_out.is_due(number, end)
            saves = stops or number == end or number % experiment.save_interval == 0
            if saves or measures:
                with buffer.closing() as row:
                    error = None
                    if measures and held_out is not None:
                        tell(0, note="validation")
                        try:
                            row |= held_out.measure(teacher, state)
                        except Exception:  # It costs no step that is due.
                            if saves:
                                save(number, row)
                            raise
                        error = row[held_out.criterion]
                    if saves or checkpoints.is_best(error):
                        save(number, row, error)
            if stops:
                break
        checkpoints.wait()
        if stopping.name:
            raise InterruptedRunError(
                f"stopped by {stopping.name} after step {number}, which is saved; "
                "go on with --resume"
            )
        if held_out is not None and checkpoints.best is not None:
            best, error = checkpoints.best
            where = checkpoints.best_path
            progress.say(f"Best step: {best} ({held_out.criterion} {error:.4g}), {where}")
    return run.folder / str(end)


def start(
    run: runs.Run, teacher: PyTree, checkpoints: checkpoint.Checkpoints, feed: loader.Prefetch
) -> step.DistillState:
    """The state a run starts or resumes from; the feed is set to the next batch."""
    # (1) This run's last step.
    if (last := processes.of_main(checkpoints.latest_step())) is not None:
        progress.say(f"Start: step {last} in {run.folder}")
        state, position = checkpoints.restore(shapes.abstract_state(run.spec, run.mesh), last)
        feed.restore(position)
        return state
    new = f" (--resume finds no step in {run.folder})" if run.experiment.resume else ""
    # (2) Else the teacher, cut to the student's layers.
    if teacher is not None and run.experiment.student.init == "cut":
        progress.say(f"Start: cut out of the teacher{new}")
        return setup.cut_state(run.spec, run.mesh, teacher)
    # (3) Else random parameters.
    progress.say(f"Start: random parameters{new}")
    return setup.random_state(run.spec, run.mesh, run.experiment.seed)


def _checkpoints(run: runs.Run, teacher: PyTree) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(
        run.folder,
        keep=run.experiment.keep,
        keep_period=run.experiment.keep_period or None,
        frozen=student.split(teacher or {}, run.spec.freeze)[1],
    )


def _validation(run: runs.Run, teacher: PyTree) -> validation.Validation | None:
    return validation.create(
        run.experiment.validation,
        run.data.held_out,
        run.data.assets,
        run.spec,
        teacher,
        mesh=run.mesh,
        batch_size=run.experiment.batch_size // run.experiment.accumulation,
        seed=run.experiment.seed,
    )


def _compile(
    run: runs.Run, state: step.DistillState
) -> tuple[Callable[..., tuple[step.DistillState, step.Metrics]], Callable[..., step.Metrics]]:
    """The compiled step, which donates its state, and the gradient norm of each loss.

    The spec is a static argument, so that runs of one process with equal specs are traced once.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    advance = jax.jit(
        step.distill_step,
        static_argnums=0,
        out_shardings=(shardings, sharding.replicated(run.mesh)),
        donate_argnums=2,
    )
    gradient_norms = jax.jit(step.loss_gradient_norms, static_argnums=0)
    return functools.partial(advance, run.spec), functools.partial(gradient_norms, run.spec)


def _open_log(run: runs.Run, first: int, stack: contextlib.ExitStack) -> Log:
    """Open the log in the main process; log the data sheet of a new run."""
    if not processes.is_main():
        return lambda number, row: None
    experiment = run.experiment
    log = metrics.MetricsLog(
        run.folder,
        tensorboard=experiment.tensorboard,
        wandb=experiment.wandb or None,
        trackio=experiment.trackio or None,
        first_step=first if first > 1 else 0,
    )
    stack.enter_context(log)
    if first == 1:
        path = run.folder / run_folder.SHEET_FILE
        with run_folder.writing(path):
            image = sheet.write(path, run.samples, experiment.augmentation, experiment.seed)
        log.image(0, "data_sheet", image)
    return log.log


def _require_finite(
    checkpoints: checkpoint.Checkpoints, number: int, values: Mapping[str, float]
) -> None:
    broken = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if broken:
        with contextlib.suppress(Exception):
            checkpoints.wait()
        last = checkpoints.latest_step()
        kept = "no checkpoint was written yet" if last is None else f"step {last} is kept"
        advice = (
            "Check the data of that step and continue with --resume, or lower --schedule.peak-lr "
            "under another --exp-name"
        )
        raise NonFiniteLossError(f"step {number}: {', '.join(broken)}; {kept}. {advice}")


class _Stop:
    """The signal that stops the run, if one came."""

    name = ""

    def after(self, number: int) -> bool:
        """True if the run stops after this step; the same in every process of the job."""
        if processes.stops_here(number):
            self.name = signal.SIGTERM.name
        return bool(self.name)


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn the first Ctrl-C, SIGTERM or SIGHUP (a closed terminal) into a flag.

    One that is repeated later acts as usual; SIGHUP under `nohup` is ignored as before. In a job of
    several processes JAX handles SIGTERM and informs the others (`stops_here`).
    """
    stop = _Stop()
    asked: float | None = None
    previous: dict[int, signal._HANDLER] = {}
    alone = jax.process_count() == 1

    def restore() -> None:
        for n, handler in previous.items():
            signal.signal(n, handler)

    def ask(number: int, _: object) -> None:
        nonlocal asked
        if asked is not None:
            if time.monotonic() - asked > interrupts.FORWARDED_SECONDS:
                restore()
                signal.raise_signal(number)
            return
        asked = time.monotonic()
        name = signal.Signals(number).name
        progress.say(f"{name}: saving after this step; repeat it to stop at once")
        if alone:
            stop.name = name
        else:
            signal.raise_signal(signal.SIGTERM)

    with contextlib.suppress(ValueError):  # Handlers can be set in the main thread alone.
        for number in (signal.SIGINT, signal.SIGHUP, *((signal.SIGTERM,) if alone else ())):
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()
