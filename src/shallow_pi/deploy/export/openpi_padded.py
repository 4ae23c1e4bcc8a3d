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
zeros, which add nothing. The actions are the student's; memory and time are those of {depth} layers.
{who}In a clone of openpi, with a config that has this model ({kind},
action horizon {horizon}), this robot's transforms and `asset_id="{asset_id}"`:

    uv run scripts/serve_policy.py policy:checkpoint --policy.config=CONFIG --policy.dir=/path/to/{folder}
"""  # noqa: E501 (a command)
_UNCHANGED = "An unchanged openpi runs it. "


def prepare(student: students.Student, origin: students.Origin) -> students.Student:
    """The student at the teacher's depth.

    Raises:
      ValueError: the layers are unknown, or they do not fit.
    """
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
    whole = students.with_whole_tower(students.in_whole_layers(student), origin)
    model = pi0.at_depth(whole.model, teacher_depth)
    return dataclasses.replace(
        whole,
        assets=dataclasses.replace(whole.assets, model=model),
        params=students.pad(whole.params, "layers", layers, teacher_depth),
    )


DTYPES, write, verify = openpi.DTYPES, openpi.write, openpi.verify


def usage(folder: str, student: students.Student, origin: students.Origin) -> str:
    """The command of openpi that serves it."""
    model = student.model
    return _USAGE.format(
        asset_id=student.assets.asset_id,
        depth=model.depth,
        folder=folder,
        horizon=model.action_horizon,
        kind=model.kind,
        layers=" ".join(map(str, origin.layer_map)),
        who="" if students.other_sizes(model) else _UNCHANGED,
    )
