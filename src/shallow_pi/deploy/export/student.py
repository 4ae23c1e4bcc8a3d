"""A student to export: its parameters and assets, and the facts its run recorded."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from shallow_pi.checkpoints import run_folder, weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.inference import quantize as quantization
from shallow_pi.models import layer_table, parameters, pi0

# Fields of a model whose values the classes of openpi and LeRobot have built in.
BUILT_IN: tuple[str, ...] = (
    "action_dim",
    "backbone",
    "expert",
    "image",
    "image_size",
    "vocab_size",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """A policy to be written in a format."""

    assets: policy_assets.Assets
    params: PyTree
    # Integration steps of the comparison and of a graph, where they are unrolled.
    num_steps: int = 10
    # ONNX operator set version.
    opset: int = 17
    # Products in 8 bits, and the bounds of activations where they are rounded.
    quantize: quantization.Scheme = "none"
    bounds: quantization.Bounds | None = None

    @property
    def model(self) -> pi0.Pi0Config:
        return self.assets.model


@dataclasses.dataclass(frozen=True)
class Origin:
    """Facts about the run a step belongs to; empty if the step is not in a run."""

    # Of the config.
    name: str = ""
    teacher: str = ""
    datasets: tuple[str, ...] = ()
    # Teacher layer of each student layer, and number of teacher layers.
    layer_map: tuple[int, ...] = ()
    teacher_depth: int = 0
    # Layers of the teacher's image tower.
    vision_depth: int = 0
    # Optimizer steps taken, of those planned.
    step: int = 0
    steps: int = 0
    # Error of sampled actions on held-out episodes at this step, and the reference actions.
    error: float | None = None
    against: str = ""


def origin(step: pathlib.Path) -> Origin:
    """Read the facts that a run recorded about one of its steps.

    Raises:
      ValueError: a config.json that was not written by a run.
    """
    path = step.parent / run_folder.CONFIG_FILE
    if not path.is_file():
        return Origin()
    number = step.resolve().name  # The run's `best` is a link.
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        data, teacher = config.get("data") or {}, config.get("teacher") or {}
        paths = [data.get("path", ""), *data.get("more", ())]
        return Origin(
            name=str(config["name"]),
            teacher=_public(teacher.get("path", "")),
            datasets=tuple(_public(path) for path in paths if path),
            layer_map=tuple(config["layer_map"] or ()),
            teacher_depth=int(config["model"]["depth"]),
            vision_depth=int((config["model"].get("image") or {}).get("depth", 0)),
            step=int(number) if number.isdigit() else 0,
            steps=int(config.get("num_train_steps", 0)),
            error=_error(step),
            against=str((config.get("validation") or {}).get("against", "")),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a run's config ({error!r}): export a copy of the step folder from "
            "somewhere else, with --layers where it is to be padded"
        ) from error


def other_sizes(model: pi0.Pi0Config, built_in: Iterable[str]) -> list[str]:
    """Sizes of a model that differ from those that a format's released classes have built in."""
    own, theirs = (
        run_folder.flatten({name: dataclasses.asdict(config)[name] for name in built_in})
        for config in (model, pi0.Pi0Config())
    )
    if model.image.depth < pi0.Pi0Config().image.depth:  # Exports fill a cut tower with zeros.
        own.pop("image.depth", None)
    return [
        f"{name} is {own[name]}, theirs {theirs[name]}" for name in own if own[name] != theirs[name]
    ]


def check_image_tokens(model: pi0.Pi0Config) -> None:
    """Raise if a model pools its image tokens or chooses among them: no released class does."""
    if tokens := model.scored_tokens:
        raise ValueError(
            f"this student chooses {tokens} of a camera's {model.patches} image tokens by "
            "a scorer (image_scorer/…), which the classes of openpi and LeRobot lack\n"
            "serve it from its step folder (shallow-pi serve), or give --format onnx or stablehlo"
        )
    if tokens := model.pooled_tokens:
        raise ValueError(
            f"this student pools a camera's {model.patches} image tokens to {tokens} "
            "(--student.image-tokens), which the classes of openpi and LeRobot cannot\n"
            "serve it from its step folder (shallow-pi serve), or give --format onnx or stablehlo"
        )


def in_whole_layers(student: Student) -> Student:
    """The student with zeros for the halves of layers that it lacks, as openpi computes them."""
    return dataclasses.replace(
        student, params=layer_table.zero_cut(student.model.layers, student.params)
    )


def with_whole_tower(student: Student, origin: Origin) -> Student:
    """The student with an image tower as deep as openpi's, or its teacher's, by layers of zeros."""
    image, openpis = student.model.image, pi0.SO400M_14
    is_openpis = dataclasses.replace(image, depth=openpis.depth) == openpis
    depth = openpis.depth if is_openpis else origin.vision_depth
    if image.depth >= depth:
        return student
    kept = np.round(np.linspace(0, depth - 1, image.depth)).astype(int)  # Where it was cut.
    whole = dataclasses.replace(student.model, image=dataclasses.replace(image, depth=depth))
    return dataclasses.replace(
        student,
        assets=dataclasses.replace(student.assets, model=whole),
        params=pad(student.params, "image_layers", kept, depth),
    )


def pad(params: PyTree, stack: str, layers: Iterable[int], depth: int) -> PyTree:
    """A stack's layers at these indices of a stack of `depth` layers, zeros elsewhere."""

    def place(path: jax.tree_util.KeyPath, leaf: jax.Array) -> np.ndarray:
        values = np.asarray(leaf)
        if parameters.stack(weights.path_name(path)) != stack:
            return values
        padded = np.zeros((depth, *values.shape[1:]), values.dtype)
        padded[list(layers)] = values
        return padded

    return jax.tree_util.tree_map_with_path(place, params)


def _error(step: pathlib.Path) -> float | None:
    path = step / run_folder.DATA / run_folder.DATA_FILE
    if not path.is_file():
        return None
    found: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return None if found.get("error") is None else float(found["error"])


def _public(address: str) -> str:
    """An address that is safe to publish: of a local path its last part alone.

    Of a step of a run, whose last part is a number, that is `<config>/<exp>/<step>`.
    """
    path = pathlib.Path(address)
    if "://" in address or not (path.is_absolute() or address.startswith(("~", "."))):
        return address
    is_step = path.name.isdigit() and (path.expanduser().parent / run_folder.CONFIG_FILE).is_file()
    return "/".join(path.parts[-3 if is_step else -1 :])
