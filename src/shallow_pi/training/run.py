"""A run: a config, opened once.

`open_run` checks the cheap things first: all that needs no file of a dataset or teacher (`check`),
then the dataset, then the teacher, which may be a long download. It writes nothing: `claimed` then
makes the run's folder and keeps other processes out, and training saves the config there. A `Run`
needs no further checks.
"""

import contextlib
import dataclasses
import pathlib
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from shallow_pi import flags, progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.data import inspection, loader, opening
from shallow_pi.data.robots import assets
from shallow_pi.distill import layer_map, layer_scores, step, student
from shallow_pi.distill import spec as specs
from shallow_pi.models import pi0
from shallow_pi.parallel import agreement, processes, sharding
from shallow_pi.planning import memory
from shallow_pi.training import config, metrics, setup


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """Everything that training needs but the teacher's parameters, which it loads itself."""

    # The config with the teacher's sizes, as `save_config` writes it.
    experiment: config.DistillConfig
    folder: pathlib.Path
    mesh: jax.sharding.Mesh
    # The static part of the step, with the layer map.
    spec: specs.Spec
    # Samples for training and validation, and the policy's assets.
    data: opening.Data
    # A few of the training samples, for the data sheet; doubtful ones have been warned of.
    samples: inspection.Samples
    # The teacher's step folder; None without a teacher on disk.
    teacher_step: pathlib.Path | None

    def load_teacher(self) -> PyTree:
        """The teacher's parameters on the mesh; None without a teacher.

        A run does not keep them, so that they leave the devices once nobody needs them.
        """
        return setup.load_teacher(self.experiment, self.teacher_step, self.mesh)

    def save_config(self) -> None:
        """Write the config into the run's folder; a resumed run must fit the one saved there."""
        if run_folder.read_config(self.folder) is not None:
            newer = _compare(self.folder, self.experiment, self.spec.layer_map)
            if newer:
                named = ", ".join(map(flags.as_flag, newer))
                progress.say(f"Config: newer than this run, and at their defaults: {named}")
        run_folder.save_config(self.folder, _values(self.experiment, self.spec.layer_map))

    def save_assets(self, folder: pathlib.Path) -> None:
        """Write the files that make a step folder deployable; none for synthetic samples."""
        if self.data.assets is not None:
            student = self.experiment.student
            dataclasses.replace(
                self.data.assets, num_steps=student.num_steps, quantize=student.quantize
            ).save(folder)

    def feed(self) -> loader.Prefetch:
        """Training batches on the mesh, starting with the first."""
        experiment = self.experiment
        batches = loader.Loader(
            self.data.train,
            experiment.batch_size,
            seed=experiment.seed,
            num_threads=experiment.data.num_threads,
            num_workers=experiment.data.num_workers,
        )
        return loader.Prefetch(batches, sharding.batch_sharding(self.mesh))


def check(experiment: config.DistillConfig) -> None:
    """Check a config without opening a dataset and without downloading anything.

    Raises:
      ValueError, FileNotFoundError: mesh, attention, batch size, losses, paths, a local teacher
        that does not fit, or a tracker that is not installed.
    """
    mesh = setup.make_mesh(experiment, jax.devices())
    setup.kernels(experiment, mesh.devices.flat[0])
    setup.check_teacher_here(experiment)
    if processes.is_main():
        metrics.trackers(experiment.wandb or None, experiment.trackio or None)
    steps = experiment.student.num_steps
    if (
        experiment.teacher is not None
        and steps < step.TEACHER_STEPS
        and not experiment.losses.reflow
    ):
        progress.warn(
            f"--student.num-steps {steps} without --losses.reflow: nothing teaches the student to "
            f"act in fewer than the teacher's {step.TEACHER_STEPS} integration steps"
        )


@contextlib.contextmanager
def claimed(experiment: config.DistillConfig) -> Iterator[None]:
    """Make the run's folder, or resume or rename the old one, and keep other processes out of it.

    Of processes that claim a folder at once, one gets it. Ctrl-C in the block, or an error before
    the config is saved, says that --resume goes on with what is in the folder.

    Raises:
      ValueError, OSError: there is a run, another process works there, or it is not writable.
    """
    folder, resume, overwrite = experiment.folder, experiment.resume, experiment.overwrite
    run_folder.prepare(folder, resume, overwrite, meet=processes.sync)
    with run_folder.held(folder):
        try:
            yield
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt("interrupted; go on with --resume") from error
        except ValueError as error:
            if run_folder.read_config(folder) is not None:
                raise
            raise ValueError(f"{error}\n{folder} is kept: go on with --resume") from error


def open_run(experiment: config.DistillConfig, *, is_claimed: bool = False) -> Run:
    """Open a config; writes nothing.

    Args:
      experiment: the config.
      is_claimed: True if the caller has `claimed` the folder.

    Raises:
      ValueError, FileNotFoundError, OSError: something does not fit, is missing or not writable.
    """
    folder = experiment.folder
    agreement.check_shared(folder.parent)
    if not is_claimed:
        run_folder.check(folder, experiment.resume, experiment.overwrite)
    saved = run_folder.read_config(folder) if is_claimed or experiment.resume else None
    if saved is not None:  # Fields that depend on the teacher's checkpoint are compared later.
        later = {"model", *(() if experiment.fixed_layer_map() else ("layer_map",))}
        _compare(folder, experiment, experiment.fixed_layer_map(), later)
    last, end = max(run_folder.steps(folder), default=0), experiment.num_train_steps
    if experiment.resume and last > end:
        raise ValueError(
            f"{folder} is at step {last} already, beyond --num-train-steps {end}: raise it, or use "
            "another --exp-name"
        )
    check(experiment)
    recordings = opening.open_recordings(experiment.data, experiment.model.action_dim)
    teacher_step = setup.find_teacher(experiment)
    experiment = setup.resolve(experiment, teacher_step)
    if teacher_step is not None:
        _warn_of_lengths(experiment.model, teacher_step)
    data = opening.open_data(experiment.data, experiment.student_model, teacher_step, recordings)
    agreement.check(dataclasses.asdict(experiment), data.train)
    samples = _inspect(data, experiment)
    mesh = setup.make_mesh(experiment, jax.devices())
    spec = setup.make_spec(experiment, mesh)
    run = Run(experiment, folder, mesh, spec, data, samples, teacher_step)
    with memory.explained(experiment.batch_size):
        run = _with_layers(run, saved)
    if experiment.teacher is not None:
        progress.say(f"Teacher: {experiment.teacher.path}")
    for line in (*setup.describe_mesh(experiment, mesh), *describe_layers(run.spec)):
        progress.say(line)
    return run


def _inspect(data: opening.Data, experiment: config.DistillConfig) -> inspection.Samples:
    """A few training samples, with warnings of what is doubtful; the loader's order stays."""
    samples = inspection.draw(
        data.train,
        data.assets,
        seed=experiment.seed,
        masks_padding=experiment.losses.mask_padded_actions,
    )
    for line in inspection.doubtful(samples, inspection.ranges(samples)):
        progress.warn(line)
    return samples


def _warn_of_lengths(model: pi0.Pi0Config, teacher_step: pathlib.Path) -> None:
    """Warn of a horizon or prompt length that is not the one the teacher was trained with."""
    own = assets.told(teacher_step)
    for field in ("action_horizon", "max_token_len"):
        given = getattr(model, field)
        expected = own.get(field, given)
        if given != expected:
            progress.warn(
                f"the teacher in {teacher_step} was trained with {field} {expected}, but this "
                f"run uses {given}: give --model.{field.replace('_', '-')} {expected}"
            )


def variant(run: Run, experiment: config.DistillConfig, folder: pathlib.Path) -> Run:
    """A run of another config with the same opened data, model, teacher, layers and devices.

    It resumes the run in its folder, if there is one, which is made if there is none.
    """
    spec = setup.make_spec(experiment, run.mesh, run.spec.layer_map)
    run_folder.prepare(folder, resume=True, overwrite=False, meet=processes.sync)
    return dataclasses.replace(run, experiment=experiment, folder=folder, spec=spec)


def describe_layers(spec: specs.Spec) -> list[str]:
    """The layers of the student, and where its streams and its image tower lack some."""
    if spec.teacher is None or spec.layer_map is None:
        return [f"Layers: {spec.student.depth}, without a teacher"]
    layers, kinds = spec.layer_map.layers, spec.student.layers

    def listed(stream: str, *halves: str) -> str:
        found = [
            n for n, kind in zip(layers, kinds, strict=True) if getattr(kind, stream) in halves
        ]
        return f"{len(found)} ({' '.join(map(str, found))})"

    chosen = " ".join(map(str, layers))
    lines = [f"Layers: {spec.student.depth} of the teacher's {spec.teacher.depth}: {chosen}"]
    if not spec.student.is_even:
        lines.append(
            f"Whole backbone layers: {listed('backbone', 'whole')}, keys and values alone: "
            f"{listed('backbone', 'keys_values')}; expert layers: {listed('expert', 'whole')}"
        )
    if spec.cuts_tower:
        tower = " ".join(map(str, student.vision_layers(spec.teacher, spec.student)))
        lines.append(
            f"Image tower: {spec.student.image.depth} of the teacher's {spec.teacher.image.depth} "
            f"layers: {tower}; loss on its tokens: --losses.vision {spec.losses.vision:g}"
        )
    if spec.student.pooled_tokens:
        lines.append(
            f"Image tokens: {spec.student.pooled_tokens} of {spec.student.patches} a camera, means "
            "of neighbours"
        )
    if spec.student.scored_tokens:
        lines.append(
            f"Image tokens: {spec.student.scored_tokens} of {spec.student.patches} a camera, "
            f"chosen by a scorer: --losses.scorer {spec.losses.scorer:g}"
        )
    return lines


def _values(
    experiment: config.DistillConfig, layers: layer_map.LayerMap | None
) -> dict[str, object]:
    """The content of config.json."""
    chosen = None if layers is None else list(layers.layers)
    return {**dataclasses.asdict(experiment), "layer_map": chosen}


def _compare(
    folder: pathlib.Path,
    experiment: config.DistillConfig,
    layers: layer_map.LayerMap | None,
    later: Collection[str] = (),
) -> list[str]:
    values, safe = _values(experiment, layers), config.SAFE_TO_CHANGE.union(later)
    return run_folder.compare_config(folder, values, safe, config.defaults(experiment))


def _with_layers(run: Run, saved: dict[str, Any] | None) -> Run:
    """The run with a layer map if it has a teacher: from config or saved run, or measured.

    Strategies that depend on the teacher measure it on the first batch.
    """
    experiment = run.experiment
    if experiment.teacher is None or run.spec.layer_map is not None:
        return run
    if saved is not None and saved.get("layer_map"):
        chosen = layer_map.explicit(saved["layer_map"], experiment.model.depth)
    else:
        chosen = measure_layers(run)
    return dataclasses.replace(run, spec=setup.make_spec(experiment, run.mesh, chosen))


def measure_layers(run: Run) -> layer_map.LayerMap:
    """The layers by a strategy that depends on the teacher, measured on the first batch."""
    experiment, strategy = run.experiment, run.experiment.student.strategy
    assert strategy in layer_map.MEASURED, "the others need no teacher (`fixed_layer_map`)"
    feed = run.feed()
    try:
        spec = dataclasses.replace(run.spec, draws=1)
        draw = jax.jit(step.draw_inputs, static_argnums=0)
        inputs = draw(spec, jax.random.key(experiment.seed), next(feed))
    finally:
        feed.close()
    progress.say(f"Measuring the {strategy} of {experiment.model.depth} layers")
    measure = jax.jit(layer_scores.measure, static_argnums=(0, 1))
    single = (x[:, 0] for x in (inputs.x_t, inputs.t, inputs.u))
    scores = measure(strategy, experiment.model, run.load_teacher(), inputs.observation, *single)
    return layer_map.measured(strategy, experiment.student.total_depth, np.asarray(scores))
