"""The host side of training: everything is checked, put in place, and then the loop runs.

Order of work: what can be wrong is found out before the run's folder is touched; the teacher is
read straight into its shardings; the state comes from (1) this run's last checkpoint, else (2) the
cut teacher, else (3) random parameters. A step is dispatched while the last one still runs, and its
metrics are fetched while later ones run (`rows`). Validation is measured after a step, logged in
that step's row, and a step that is the best so far is saved.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import signal
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree, UInt8

from shallow_pi import progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.data import loader, opening, sheet
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.distill import layer_map, step, student
from shallow_pi.parallel import agreement, processes, shapes, sharding
from shallow_pi.training import checkpoint, config, metrics, profiling, rows, setup, validation


class NonFiniteLossError(RuntimeError):
    """A loss was NaN or infinite; nothing was saved from that step on."""


class InterruptedRunError(RuntimeError):
    """The run was asked to stop; everything up to its last step is saved."""


# How a run may end that is no fault of the code; and what a script says after Ctrl-C.
ENDS = (NonFiniteLossError, InterruptedRunError)
INTERRUPTED = "interrupted; go on with --resume"


def run(
    experiment: config.DistillConfig,
    folder: pathlib.Path,
    *,
    resume: bool | None = None,
    label: str = "Distil",
) -> pathlib.Path:
    """Train to the end and return the last step's folder.

    Args:
      experiment: the resolved config.
      folder: of this run.
      resume: go on from the folder's last checkpoint, if it has one; None does what the
        experiment's own flags say, and puts an old run aside only when everything else was read.
      label: for the progress bar.

    Raises:
      ValueError, FileNotFoundError: something does not fit or is missing.
      NonFiniteLossError, InterruptedRunError: see there.
    """
    agreement.check_shared(folder.parent)
    put_aside = resume is None and experiment.overwrite
    if resume is None and not put_aside:
        resume = run_folder.prepare(folder, experiment.resume, overwrite=False, meet=processes.sync)
    mesh, teacher_step = setup.validate(experiment)
    experiment = setup.resolve(experiment, teacher_step)
    data = opening.open_data(experiment.data, experiment.student_model, teacher_step)
    agreement.check(experiment, data.train)
    feed = loader.prefetch(
        loader.Loader(
            data.train,
            experiment.batch_size,
            seed=experiment.seed,
            num_threads=experiment.data.num_threads,
            num_workers=experiment.data.num_workers,
        ),
        sharding.batch_sharding(mesh),
    )
    teacher_params = setup.load_teacher(experiment, teacher_step, mesh)
    layers = setup.choose_layers(experiment, teacher_params, feed, folder if resume else None)
    spec = setup.make_spec(experiment, layers, mesh)
    line = setup.describe_mesh(experiment, mesh)
    progress.console.print(line, highlight=False, soft_wrap=True)
    if put_aside:
        resume = run_folder.prepare(folder, experiment.resume, overwrite=True, meet=processes.sync)
    save_config(experiment, folder, bool(resume), layers)
    abstract = shapes.abstract_state(spec, mesh)
    with checkpoint.Checkpoints(
        folder,
        keep=experiment.keep,
        keep_period=experiment.keep_period or None,
        frozen=student.split(teacher_params or {}, spec.freeze)[1],
    ) as checkpoints:
        picture = None
        if resume and checkpoints.latest_step() is not None:
            state, position = checkpoints.restore(abstract)
            feed.restore(position)
        else:
            state = setup.initial_state(experiment, spec, teacher_params, abstract)
            if processes.is_main():
                picture = sheet.write(
                    folder,
                    data.train,
                    data.assets,
                    experiment.augmentation,
                    experiment.seed,
                    masks_padding=experiment.losses.mask_padded_actions,
                )
        held_out = validation.create(
            experiment.validation,
            data.held_out,
            data.assets,
            spec,
            teacher_params,
            mesh=mesh,
            batch_size=experiment.batch_size // experiment.accumulation,
            seed=experiment.seed,
        )
        return _loop(
            experiment,
            spec,
            shapes.held_teacher(spec, teacher_params),
            state,
            feed,
            checkpoints,
            data.assets,
            held_out,
            mesh,
            label,
            picture,
        )


def save_config(
    experiment: config.DistillConfig,
    folder: pathlib.Path,
    resume: bool,
    layers: layer_map.LayerMap | None,
) -> None:
    """Write the resolved config beside the checkpoints, or hold a resumed run to it."""
    values = {
        **dataclasses.asdict(experiment),
        "layer_map": None if layers is None else list(layers.layers),
    }
    if resume and (folder / run_folder.CONFIG_FILE).exists():
        run_folder.compare_config(folder, values, config.SAFE_TO_CHANGE)
    if processes.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.save_config(folder, values)


def _loop(
    experiment: config.DistillConfig,
    spec: step.Spec,
    teacher_params: PyTree,
    state: step.DistillState,
    feed: loader.Prefetch,
    checkpoints: checkpoint.Checkpoints,
    assets: policy_assets.Assets | None,
    held_out: validation.Validation | None,
    mesh: jax.sharding.Mesh,
    label: str,
    picture: UInt8[np.ndarray, "h w 3"] | None,
) -> pathlib.Path:
    key = jax.random.key(experiment.seed)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    advance_state = jax.jit(
        functools.partial(step.distill_step, spec),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=1,
    )
    gradient_norms = jax.jit(functools.partial(step.loss_gradient_norms, spec))
    start, end = int(state.step), experiment.num_train_steps
    done = start
    if start > end:
        raise ValueError(
            f"{checkpoints.folder} is at step {start} already, beyond num_train_steps {end}: raise "
            "--num-train-steps, or use another --exp-name"
        )
    with contextlib.ExitStack() as stack:
        profile, folder = experiment.profile, checkpoints.folder
        steps = profiling.traced(
            start + 1, end, profile, folder, lambda: jax.block_until_ready(state)
        )
        stopping = stack.enter_context(_stop_signals())
        log = _open_log(experiment, checkpoints.folder, start, picture, stack)
        advance = stack.enter_context(processes.bar(label, end, start))

        def write(number: int, row: rows.Values) -> None:
            log(number, row)
            advance(0, note=f"loss {row['loss']:.4f}")

        check = functools.partial(_require_finite, checkpoints)
        logged = rows.Rows(write, check, experiment.log_interval)
        for done in stack.enter_context(steps):
            with logged.waiting():
                batch = next(feed)
            extra: Mapping[str, Any] = {}
            if experiment.gradient_interval and done % experiment.gradient_interval == 0:
                extra = gradient_norms(teacher_params, state, key, batch)
            state, values = advance_state(teacher_params, state, key, batch)
            logged.add(done, {**values, **extra})
            advance(1)
            stop = stopping.after(done)  # Asked once: what is told below must have been saved.
            measures = held_out is not None and held_out.is_due(done, end)
            saves = stop or done == end or done % experiment.save_interval == 0
            if saves or measures:
                with logged.closing() as row:
                    error = None
                    if measures:
                        assert held_out is not None, "it was due"
                        advance(0, note="validation")
                        row |= held_out.measure(teacher_params, state)
                        error = row[held_out.criterion]
                    if saves or checkpoints.is_best(error):
                        keep = (lambda _: None) if assets is None else assets.save
                        with logged.stalling(row):
                            checkpoints.save(done, state, feed.state(), keep, error=error)
            if stop:
                break
        checkpoints.wait()
        if stopping.name:
            raise InterruptedRunError(
                f"stopped by {stopping.name} after step {done}, which is saved; go on with --resume"
            )
    if held_out is not None:
        _name_best(checkpoints, held_out.criterion)
    return checkpoints.folder / str(end)


def _name_best(checkpoints: checkpoint.Checkpoints, criterion: str) -> None:
    if checkpoints.best is not None and processes.is_main():
        number, error = checkpoints.best
        line = f"Best step: {number} ({criterion} {error:.4g}), {checkpoints.folder}/best"
        progress.console.print(line, highlight=False, soft_wrap=True)


def _require_finite(
    checkpoints: checkpoint.Checkpoints, number: int, values: Mapping[str, float]
) -> None:
    broken = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if broken:
        with contextlib.suppress(Exception):
            checkpoints.wait()
        last = checkpoints.latest_step()
        kept = "no checkpoint was written yet" if last is None else f"step {last} is kept"
        raise NonFiniteLossError(
            f"step {number}: {', '.join(broken)}; {kept}. Look at the data of that step and go "
            "on with --resume, or lower --schedule.peak-lr under another --exp-name"
        )


def _open_log(
    experiment: config.DistillConfig,
    folder: pathlib.Path,
    start: int,
    picture: UInt8[np.ndarray, "h w 3"] | None,
    stack: contextlib.ExitStack,
) -> Any:
    if not processes.is_main():
        return lambda number, values: None
    log = metrics.MetricsLog(
        folder,
        tensorboard=experiment.tensorboard,
        wandb=experiment.wandb or None,
        trackio=experiment.trackio or None,
        first_step=start + 1,
    )
    stack.enter_context(log)
    if picture is not None:
        log.image(0, "data_sheet", picture)
    return log.log


class _Stop:
    """Whether, and by which signal, the run was asked to stop."""

    name = ""

    def after(self, number: int) -> bool:
        """Whether to stop after this step; every process of the job gets the same answer."""
        if processes.stops_here(number):
            self.name = signal.SIGTERM.name
        return bool(self.name)


@contextlib.contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn the first Ctrl-C or SIGTERM into a flag; a second one acts as usual.

    In a job of several processes SIGTERM is JAX's, which tells the others (`stops_here`).
    """
    stop = _Stop()
    previous: dict[int, Any] = {}
    alone = jax.process_count() == 1

    def ask(number: int, _: Any) -> None:
        name = signal.Signals(number).name
        progress.console.print(f"{name}: saving after this step, once more to stop at once")
        if alone:
            stop.name = name
        else:
            signal.raise_signal(signal.SIGTERM)
        for n, handler in previous.items():
            signal.signal(n, handler)

    with contextlib.suppress(ValueError):  # Handlers can be set in the main thread alone.
        for number in (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,):
            previous[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for n, handler in previous.items():
            signal.signal(n, handler)
