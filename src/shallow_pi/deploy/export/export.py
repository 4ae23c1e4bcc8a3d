"""Export a student: write a folder, read it back, compare, and only then rename it into place.

An export is written under a temporary name and compared with the student parameter by parameter and
action by action; an existing folder is never overwritten.
"""

import dataclasses
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence

import jax
import numpy as np

from shallow_pi.checkpoints import weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.deploy import policy as policies
from shallow_pi.deploy import step_folder
from shallow_pi.deploy.export import card, formats
from shallow_pi.deploy.export import student as students
from shallow_pi.models import batch as batches
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0

# Largest difference of a normalized action; 0 where the same program runs.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def export(
    source: str | os.PathLike[str],
    format: str,
    output: str | os.PathLike[str] | None = None,
    *,
    step: str | int = "last",
    layers: Sequence[int] = (),
    teacher_depth: int = 18,
    any_size: bool = False,
    num_steps: int = 10,
    report: Callable[[str], None] = lambda _: None,
) -> pathlib.Path:
    """Write a student in another project's layout, and return the folder.

    Args:
      source: a step folder, or a run's folder; `gs://`, `hf://` too.
      format: a name in `formats.FORMATS`.
      output: the folder to make; None is `exports/<step>-<format>` beside the step.
      step: of a run: "last", "best" or a number.
      layers: for `openpi-padded`, the teacher layers of the student's, where no run says so.
      teacher_depth: for `openpi-padded`, layers of the padded model, where no run says so.
      any_size: export a model of other sizes than openpi's too, which their classes cannot load.
      num_steps: integration steps of the comparison.
      report: is told what is being done.

    Raises:
      ValueError: an unknown format, a student that it cannot hold, or numbers that were read back
        otherwise than they were written.
      FileNotFoundError: no step folder, or an incomplete one.
      FileExistsError: the output exists: nothing is ever overwritten.
      OSError: the output cannot be written.
    """
    chosen = formats.find(format)
    folder = step_folder.find(source, step)
    target = pathlib.Path(output or folder.parent / "exports" / f"{folder.name}-{format}")
    target = target.expanduser().absolute()
    if target.exists():
        raise FileExistsError(
            f"{target} already exists and an export never overwrites: move it away or give "
            "another --output"
        )
    assets = policy_assets.load(folder)
    if not any_size:
        _check_sizes(assets.model)
    origin = students.origin(folder)
    if layers:
        depth = origin.teacher_depth or teacher_depth
        origin = dataclasses.replace(origin, layer_map=tuple(layers), teacher_depth=depth)

    report(f"Reading {folder}: {assets.model.kind}, {assets.model.depth} layers")
    params = weights.load_params(folder, pi0.abstract_params(assets.model), what="student")
    student = students.Student(assets, params)
    exported = chosen.prepare(student, origin)

    partial = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
    try:
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise OSError(
                f"{target} cannot be made ({type(error).__name__}: {error}): give an --output "
                "below a folder you can write to"
            ) from error
        report(f"Writing {format}")
        exported.assets.save(partial / "assets")
        chosen.write(partial, exported)
        report("Reading it back and comparing its actions with the student's")
        difference = _verify(partial, exported, student, num_steps)
        usage = chosen.usage(target.name, exported, origin)
        readme = card.text(usage, target.name, student, origin, difference)
        (partial / "README.md").write_text(readme, encoding="utf-8")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(f"{target}: parameters equal, actions differ by at most {difference:.1e}")
    return target


def _check_sizes(model: pi0.Pi0Config) -> None:
    if different := students.other_sizes(model):
        raise ValueError(
            "this student has sizes that the classes of openpi and LeRobot cannot have:\n  "
            + "\n  ".join(different)
            + "\nserve it from its step folder (shallow-pi serve), or give --any-size to export it "
            "for classes you have changed"
        )


def _verify(
    folder: pathlib.Path, exported: students.Student, student: students.Student, num_steps: int
) -> float:
    """Read the folder as a policy; the largest difference of its actions from the student's."""
    expected, model = pi0.abstract_params(exported.model), student.model
    read = weights.leaves(weights.load_params(folder, expected, what="export"))
    wrong = [
        path
        for path, leaf in weights.leaves(exported.params).items()
        if read[path].dtype != leaf.dtype or not np.array_equal(read[path], leaf)
    ]
    del read
    stats = policy_assets.load(folder).stats
    for key, given in student.assets.stats.items():
        found = dict(stats[key].items())
        for name, values in given.items():
            if name not in found or not np.array_equal(found[name], values):
                wrong.append(f"statistics {key}.{name}")
    if wrong:
        raise ValueError(
            f"{folder} was read back with other numbers than were written: {wrong}. The disk "
            "may be full or failing; nothing was kept"
        )
    dtype = np.dtype(model.dtype) if model.dtype == "float32" else jax.numpy.bfloat16
    cast = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, dtype), student.params)
    ours = policies.Policy(student.assets, cast, num_steps=num_steps)
    other = policies.Policy.from_checkpoint(folder, num_steps=num_steps, warm_up=False)
    observation, noise = _made_up(model)
    want = np.asarray(ours.sample(observation, noise))
    got = np.asarray(other.sample(observation, noise))
    difference = float(np.max(np.abs(got - want)))
    if not difference <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"the actions of {folder} differ from the student's by {difference:.3g}, more than "
            f"{TOLERANCE[model.dtype]:g}: this is a defect of the export, please report it; "
            "nothing was kept"
        )
    return difference


def _made_up(model: pi0.Pi0Config) -> tuple[observations.Observation, np.ndarray]:
    """An observation whose prompt fills half its budget, and noise."""
    length, random = model.max_token_len, batches.noise(model, 1)
    half = np.arange(length)[None] < (length + 1) // 2
    observation = dataclasses.replace(random.observation, tokenized_prompt_mask=half)
    return observation, np.asarray(random.actions)
