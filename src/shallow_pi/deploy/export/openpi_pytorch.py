"""`model.safetensors` for openpi's PyTorch model, with the tensors that its loader requires."""

import json
import pathlib

from shallow_pi.checkpoints import run_folder, safetensors_file, weights
from shallow_pi.deploy.export import openpi
from shallow_pi.deploy.export import student as students

_USAGE = """\
`model.safetensors` for openpi's PyTorch model, with `assets/{asset_id}/norm_stats.json`. The class
reads its depth from `gemma.get_config`; replace that first (openpi's loader is strict, so a wrong
depth raises an error). With the Python of openpi:

    import dataclasses
    import openpi.models.gemma as gemma

    original = gemma.get_config
    gemma.get_config = lambda name: dataclasses.replace(original(name), depth={depth})
{python}
{train_config} openpi
requires `gemma_expert.lm_head.weight`, which no policy uses; here it is zeros.
"""

DTYPES = openpi.DTYPES
BUILT_IN = students.BUILT_IN | {"action_dim", "cameras", "image_size"}
check, verify = openpi.check, openpi.verify


def prepare(student: students.Student) -> students.Student:
    """The student in whole layers, and with an image tower of the depth that the class has."""
    return students.filled(student)


def write(folder: pathlib.Path, student: students.Student) -> None:
    """Write every tensor of openpi's class, and its config."""
    model = student.model
    safetensors_file.write(
        folder / safetensors_file.NAME,
        weights.leaves(student.params),
        num_kv_heads=model.backbone.num_kv_heads,
        num_image_heads=model.image.num_heads,
        unused=True,
    )
    content = {
        "action_dim": model.action_dim,
        "action_horizon": model.action_horizon,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": model.dtype,
        "pi05": model.pi05,
        "depth": model.depth,
    }
    text = json.dumps(content, indent=2) + "\n"
    (folder / run_folder.CONFIG_FILE).write_text(text, encoding="utf-8")


def usage(folder: str, student: students.Student) -> str:
    """The lines of Python that load it."""
    return _USAGE.format(
        asset_id=student.assets.asset_id,
        depth=student.model.depth,
        python=openpi.in_python(folder, student, "train_config"),
        train_config=openpi.train_config(student, "train_config"),
    )
