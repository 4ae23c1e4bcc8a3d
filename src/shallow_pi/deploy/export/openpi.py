"""A step folder of openpi: `params/` and `assets/<asset_id>/norm_stats.json`.

openpi's configs have the teacher's depth, so one with the student's depth is registered first
(`interop.openpi`, `shallow-pi serve-openpi`).
"""

import pathlib

from shallow_pi.checkpoints import run_folder, weights
from shallow_pi.deploy.export import read_back
from shallow_pi.deploy.export import student as students
from shallow_pi.models import pi0

_USAGE = """\
A step folder of openpi: `params/` and `assets/{asset_id}/norm_stats.json`. openpi's configs
have another depth; this project registers one with {depth} layers, then runs openpi's own
`serve_policy.py`. With the Python of openpi, in a clone of it (after `uv sync`):

    uv pip install /path/to/shallow_pi          # its wheel, or a clone of its repository
    .venv/bin/shallow-pi serve-openpi policy:checkpoint --policy.config=student --policy.dir=/path/to/{folder}
"""  # noqa: E501 (a command)

DTYPES: tuple[str, ...] = ()
# The registered config has all other sizes (`interop.openpi.model_config`).
BUILT_IN = frozenset({"cameras", "image.patch_size", "image_size", "vocab_size"})
# Integration steps that openpi's server takes.
NUM_STEPS = 10
verify = read_back.verify


def check(student: students.Student) -> None:
    """Raise for fewer image tokens, which openpi's classes cannot have."""
    students.check_image_tokens(student.model)


def prepare(student: students.Student) -> students.Student:
    """The student with zeros for halves of layers it lacks, and without an idle scorer."""
    return students.as_openpi(student)


def write(folder: pathlib.Path, student: students.Student) -> None:
    """Write the parameters in openpi's tree."""
    weights.save_params(folder / run_folder.PARAMS, student.params)


def usage(folder: str, student: students.Student) -> str:
    """The command that serves it with openpi's server."""
    return _USAGE.format(
        asset_id=student.assets.asset_id,
        depth=student.model.depth,
        folder=folder,
    )


def train_config(student: students.Student, name: str) -> str:
    """A sentence that says what openpi's config of a student has."""
    model = student.model
    fields = ["pi05", "action_horizon", "max_token_len", *["discrete_state_input"] * model.pi05]
    usual = pi0.Pi0Config()
    fields += [one for one in ("action_dim", "dtype") if getattr(model, one) != getattr(usual, one)]
    given = ", ".join(f"{field}={getattr(model, field)!r}" for field in fields)
    asset_id = student.assets.asset_id
    return (
        f"`{name}` is an openpi config with\n`Pi0Config({given})`,\n"
        f'this robot\'s transforms and `asset_id="{asset_id}"`.'
    )


def in_python(folder: str, student: students.Student, name: str) -> str:
    """Lines of Python that load a folder in openpi with the student's integration steps."""
    return f"""\
    from openpi.policies import policy_config

    policy = policy_config.create_trained_policy(
        {name}, "/path/to/{folder}", sample_kwargs=dict(num_steps={student.assets.num_steps})
    )
"""
