"""Give a student back: the folders openpi and LeRobot load, each checked before it is there.

`openpi` is a step folder of openpi's; `openpi-padded` the same at the teacher's depth, the layers
of the student at their teacher indices and zeros between them, which are exact identities, so that
an unchanged openpi runs it (at the teacher's cost); `openpi-pytorch` and `lerobot` hold
`model.safetensors`. An export is written under a temporary name, read back, compared with the
student parameter by parameter and action by action, and only then renamed into place.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import PyTree

from shallow_pi.checkpoints import run_folder, safetensors_file, weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.deploy import lerobot_folder, model_card, step_folder
from shallow_pi.deploy import policy as policies
from shallow_pi.models import batch as batches
from shallow_pi.models import observation as observations
from shallow_pi.models import parameters, pi0

Format = Literal["openpi", "openpi-padded", "openpi-pytorch", "lerobot"]
# Largest difference of a normalized action; 0 where the same program runs.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
# Sizes that the classes of openpi and LeRobot have built in.
BUILT_IN = ("action_dim", "backbone", "expert", "image", "image_size", "vocab_size")


def export(
    source: str | os.PathLike[str],
    format: Format,
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
      format: whose layout.
      output: the folder to make; None is `exports/<step>-<format>` beside the step.
      step: of a run: "last", "best" or a number.
      layers: for `openpi-padded`, the teacher layers of the student's, where no run says so.
      teacher_depth: for `openpi-padded`, layers of the padded model, where no run says so.
      any_size: export a model of other sizes than openpi's too, which their classes cannot load.
      num_steps: integration steps of the comparison.
      report: is told what is being done.

    Raises:
      ValueError: the student has other sizes than the format's classes, or no layer map; or what
        was written is not what was to be written.
      FileNotFoundError: no step folder, or an incomplete one.
      FileExistsError: the output exists: nothing is ever overwritten.
      OSError: the output cannot be written.
    """
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
    origin = _origin(folder)
    exported = assets
    if format == "openpi-padded":
        layers, depth = _layer_map(assets.model.depth, layers, teacher_depth, origin)
        exported = dataclasses.replace(assets, model=pi0.at_depth(assets.model, depth))

    report(f"Reading {folder}: {assets.model.kind}, {assets.model.depth} layers")
    params = weights.load_params(folder, pi0.abstract_params(assets.model), what="student")
    written = params if exported is assets else pad(params, layers, exported.model.depth)

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
        _write(format, partial, exported, written)
        report("Reading it back and comparing its actions with the student's")
        difference = _verify(partial, exported, written, assets, params, num_steps)
        card = model_card.text(
            format, assets, exported.model, target.name, origin, layers, difference
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(f"{target}: parameters equal, actions differ by at most {difference:.1e}")
    return target


def pad(params: PyTree, layers: Sequence[int], depth: int) -> PyTree:
    """The student's layers at these indices of a model of `depth` layers, zeros elsewhere.

    A layer of zeros adds nothing to the residual stream: the two models are the same function.
    """

    def place(path: Any, leaf: jax.Array) -> np.ndarray:
        values = np.asarray(leaf)
        if parameters.stack(weights.path_name(path)) != "layers":
            return values
        padded = np.zeros((depth, *values.shape[1:]), values.dtype)
        padded[list(layers)] = values
        return padded

    return jax.tree_util.tree_map_with_path(place, params)


def _origin(step: pathlib.Path) -> dict[str, Any]:
    """The resolved config of the run a step belongs to; empty for a step folder alone."""
    path = step.parent / run_folder.CONFIG_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            "name": str(content["name"]),
            "layer_map": content["layer_map"],
            "depth": int(content["model"]["depth"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a run's config ({error!r}): export a copy of the step folder from "
            "somewhere else, with --layers where it is to be padded"
        ) from error


def _layer_map(
    depth: int, layers: Sequence[int], teacher_depth: int, origin: dict[str, Any]
) -> tuple[tuple[int, ...], int]:
    """Where the student's layers go, and how many there are then."""
    recorded = origin.get("layer_map")
    if not layers and not recorded:
        raise ValueError(
            f"openpi-padded puts the student's {depth} layers back at their teacher indices, and "
            "no run's config.json lies beside this step folder to tell them: give them, such as "
            "--layers 0 3 7 10 14 17 (and --teacher-depth, if it is not 18)"
        )
    layers = tuple(layers) or tuple(recorded or ())
    teacher_depth = teacher_depth if not recorded else origin["depth"]
    increasing = list(layers) == sorted(set(layers))
    if len(layers) != depth or not increasing or not 0 <= layers[0] <= layers[-1] < teacher_depth:
        raise ValueError(
            f"--layers {' '.join(map(str, layers))} does not place a student of {depth} layers in "
            f"a teacher of {teacher_depth}: expected {depth} different indices in increasing "
            f"order, from 0 to {teacher_depth - 1}"
        )
    return layers, teacher_depth


def _check_sizes(model: pi0.Pi0Config) -> None:
    openpi = pi0.Pi0Config()
    different = [
        f"{name} is {getattr(model, name)}, theirs {getattr(openpi, name)}"
        for name in BUILT_IN
        if getattr(model, name) != getattr(openpi, name)
    ]
    if different:
        raise ValueError(
            "this student has sizes that the classes of openpi and LeRobot cannot have:\n  "
            + "\n  ".join(different)
            + "\nserve it from its step folder (shallow_pi.deploy.policy), or give --any-size to "
            "export it for classes you have changed"
        )


def _write(
    format: Format, folder: pathlib.Path, assets: policy_assets.Assets, params: PyTree
) -> None:
    """Parameters and everything beside them, in the format's layout."""
    assets.save(folder / "assets")
    if format in ("openpi", "openpi-padded"):
        weights.save_params(folder / "params", params)
        return
    model = assets.model
    is_lerobot = format == "lerobot"
    safetensors_file.write(
        folder / safetensors_file.NAME,
        weights.leaves(params),
        num_kv_heads=model.backbone.num_kv_heads,
        num_image_heads=model.image.num_heads,
        prefix="model." if is_lerobot else "",
        unused=not is_lerobot,
    )
    if is_lerobot:
        lerobot_folder.write(folder, assets)
        return
    content = {
        "action_dim": model.action_dim,
        "action_horizon": model.action_horizon,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "precision": model.dtype,
        "pi05": model.pi05,
        "depth": model.depth,
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _verify(
    folder: pathlib.Path,
    exported: policy_assets.Assets,
    written: PyTree,
    assets: policy_assets.Assets,
    params: PyTree,
    num_steps: int,
) -> float:
    """Read the folder as a policy; the largest difference of its actions from the student's."""
    expected = pi0.abstract_params(exported.model)
    read = weights.leaves(weights.load_params(folder, expected, what="export"))
    wrong = [
        path
        for path, leaf in weights.leaves(written).items()
        if read[path].dtype != leaf.dtype or not np.array_equal(read[path], leaf)
    ]
    del read
    stats = policy_assets.load(folder).stats
    for key, given in assets.stats.items():
        for field in dataclasses.fields(given):
            if not np.array_equal(getattr(stats[key], field.name), getattr(given, field.name)):
                wrong.append(f"statistics {key}.{field.name}")
    if wrong:
        raise ValueError(
            f"{folder} was read back with other numbers than were written: {wrong}. The disk "
            "may be full or failing; nothing was kept"
        )
    dtype = np.dtype(assets.model.dtype) if assets.model.dtype == "float32" else jax.numpy.bfloat16
    cast = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, dtype), params)
    student = policies.Policy(assets, cast, num_steps=num_steps)
    other = policies.Policy.from_checkpoint(folder, num_steps=num_steps, warm_up=False)
    observation, noise = _made_up(assets.model)
    want = np.asarray(student.sample(observation, noise))
    got = np.asarray(other.sample(observation, noise))
    difference = float(np.max(np.abs(got - want)))
    if not difference <= TOLERANCE[assets.model.dtype]:
        raise ValueError(
            f"the actions of {folder} differ from the student's by {difference:.3g}, more than "
            f"{TOLERANCE[assets.model.dtype]:g}: this is a defect of the export, please report it; "
            "nothing was kept"
        )
    return difference


def _made_up(model: pi0.Pi0Config) -> tuple[observations.Observation, np.ndarray]:
    """An observation whose prompt fills half its budget, and noise."""
    length, random = model.max_token_len, batches.noise(model, 1)
    half = np.arange(length)[None] < (length + 1) // 2
    observation = dataclasses.replace(random.observation, tokenized_prompt_mask=half)
    return observation, np.asarray(random.actions)
