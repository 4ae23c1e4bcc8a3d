"""A step folder of openpi at openpi's own depth, which an unchanged openpi runs (no faster).

The layers that the student lacks are zeros behind its own, in backbone, expert and image tower. A
layer of zeros adds nothing to the residual stream, so both models compute the same function.
"""

from shallow_pi.deploy.export import openpi
from shallow_pi.deploy.export import student as students

_USAGE = """\
A step folder of openpi with {depth} layers: first the student's, then zeros, which add nothing. The
actions are the student's; memory and time are of {depth} layers. {train_config}

{run}"""
_SERVER = """\
In a clone of openpi:

    uv run scripts/serve_policy.py policy:checkpoint --policy.config=CONFIG --policy.dir=/path/to/{folder}
"""  # noqa: E501 (a command)
_OTHER_STEPS = """\
openpi's `serve_policy.py` takes {theirs} integration steps, this student was trained for {own}.
In Python:

{python}"""

DTYPES = openpi.DTYPES
BUILT_IN = students.BUILT_IN | {"cameras", "depth", "image_size"}
check, write, verify = openpi.check, openpi.write, openpi.verify


def prepare(student: students.Student) -> students.Student:
    """The student at openpi's depth."""
    return students.filled(student, students.DEPTH)


def usage(folder: str, student: students.Student) -> str:
    """The command of openpi that serves it, or Python where it would take other steps."""
    own = student.assets.num_steps
    run = _SERVER.format(folder=folder)
    if own != openpi.NUM_STEPS:
        python = openpi.in_python(folder, student, "CONFIG")
        run = _OTHER_STEPS.format(theirs=openpi.NUM_STEPS, own=own, python=python)
    train_config = openpi.train_config(student, "CONFIG")
    return _USAGE.format(depth=student.model.depth, run=run, train_config=train_config)
