"""A step folder of openpi at the teacher's depth, which an unchanged openpi runs (no faster).

The student's layers are placed at their teacher indices and the others are zeros, and so are halves
of layers and layers of the image tower that the student lacks. A layer of zeros adds nothing to the
residual stream, so both models compute the same function.
"""

import dataclasses

from shallow_pi.deploy.export import openpi
from shallow_pi.deploy.export import student as students
from shallow_pi.models import pi0

_USAGE = """\
A step folder of openpi with {depth} layers: the student's at the indices {layers}, the others are
zeros, which add nothing. The actions are the student's; memory and time are of {depth} layers.
{who}{train_config}

{run}"""
_UNCHANGED = "An unchanged openpi runs it. "
_SERVER = """\
In a clone of openpi:

    uv run scripts/serve_policy.py policy:checkpoint --policy.config=CONFIG --policy.dir=/path/to/{folder}
"""  # noqa: E501 (a command)
_OTHER_STEPS = """\
openpi's `serve_policy.py` takes {theirs} integration steps, this student was trained for {own}.
In Python:

{python}"""


def check(student: students.Student, origin: students.Origin) -> None:
    """Raise if the teacher's layers are unknown or do not fit, and as for `openpi`."""
    openpi.check(student, origin)
    depth, layers, teacher_depth = student.model.depth, origin.layer_map, origin.teacher_depth
    if not layers:
        raise ValueError(
            f"openpi-padded needs the teacher's indices of the student's {depth} layers, and no "
            "run's config.json beside this step folder tells them\n"
            "give them, such as --layers 0 3 7 10 14 17 (and --teacher-depth, if it is not 18)"
        )
    increasing = list(layers) == sorted(set(layers))
    if len(layers) != depth or not increasing or not 0 <= layers[0] <= layers[-1] < teacher_depth:
        raise ValueError(
            f"--layers {' '.join(map(str, layers))} does not place {depth} layers in a teacher of "
            f"{teacher_depth}: expected {depth} increasing indices from 0 to {teacher_depth - 1}"
        )


def prepare(student: students.Student, origin: students.Origin) -> students.Student:
    """The student at the teacher's depth."""
    layers, teacher_depth = origin.layer_map, origin.teacher_depth
    whole = students.with_whole_tower(students.in_whole_layers(student), origin)
    model = pi0.at_depth(whole.model, teacher_depth)
    return dataclasses.replace(
        whole,
        assets=dataclasses.replace(whole.assets, model=model),
        params=students.pad(whole.params, "layers", layers, teacher_depth),
    )


DTYPES, BUILT_IN = openpi.DTYPES, openpi.BUILT_IN
write, verify = openpi.write, openpi.verify


def usage(folder: str, student: students.Student, origin: students.Origin) -> str:
    """The command of openpi that serves it, or Python where it would take other steps."""
    model, own = student.model, student.assets.num_steps
    is_openpis = model.depth == pi0.Pi0Config.depth and not students.other_sizes(model, BUILT_IN)
    run = _SERVER.format(folder=folder)
    if own != openpi.NUM_STEPS:
        python = openpi.in_python(folder, student, "CONFIG")
        run = _OTHER_STEPS.format(theirs=openpi.NUM_STEPS, own=own, python=python)
    return _USAGE.format(
        depth=model.depth,
        layers=" ".join(map(str, origin.layer_map)),
        run=run,
        train_config=openpi.train_config(student, "CONFIG"),
        who=_UNCHANGED if is_openpis else "",
    )
