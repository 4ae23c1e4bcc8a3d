"""A student to export: its parameters and assets, and the facts its run recorded."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Set
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from shallow_pi.checkpoints import run_folder, weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.inference import quantize as quantization
from shallow_pi.models import layer_table, parameters, pi0

# Sizes that the classes of openpi and LeRobot have built in; some have more.
BUILT_IN = frozenset({"backbone", "expert", "image", "vocab_size"})
# Layers of openpi's two streams, and of the image tower of its classes and LeRobot's.
DEPTH, TOWER_DEPTH = pi0.Pi0Config.depth, pi0.SO400M_14.depth


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """A policy to be written in a format."""

    assets: policy_assets.Assets
    params: PyTree
    # Integration steps; a graph may have others than the student was trained for.
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
            step=int(number) if number.isdigit() else 0,
            steps=int(config.get("num_train_steps", 0)),
            error=_error(step),
            against=str((config.get("validation") or {}).get("against", "")),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not a run's config ({error!r}): export a copy of the step folder from "
            "somewhere else"
        ) from error


def other_sizes(model: pi0.Pi0Config, built_in: Set[str]) -> list[str]:
    """Sizes of a model that differ from those that a format's released classes have built in.

    Fewer layers than theirs do not: `filled` adds layers of zeros.
    """
    usual = pi0.Pi0Config()
    image = dataclasses.replace(model.image, depth=max(model.image.depth, usual.image.depth))
    deep = pi0.at_depth(model, max(model.depth, usual.depth))
    own, theirs = (
        run_folder.flatten(dataclasses.asdict(config))
        for config in (dataclasses.replace(deep, image=image), usual)
    )
    return [
        f"{name} is {size}, theirs {theirs[name]}"
        for name, size in own.items()
        if built_in & {name, name.partition(".")[0]} and size != theirs[name]
    ]


def check_image_tokens(model: pi0.Pi0Config) -> None:
    """Raise if a model reads fewer image tokens than it has patches: no released class does."""
    if (tokens := model.scored_tokens) and tokens < model.patches:
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


def as_openpi(student: Student) -> Student:
    """The student as openpi computes it, which has every half of a layer and no scorer.

    The halves that it lacks are zeros; a scorer is left out, which keeps every image token.
    """
    model, params = student.model, layer_table.zero_cut(student.model.layers, student.params)
    if model.scored_tokens == model.patches:
        model = dataclasses.replace(model, scored_tokens=0)
        params = {name: part for name, part in params.items() if name != "image_scorer"}
    assets = dataclasses.replace(student.assets, model=model)
    return dataclasses.replace(student, assets=assets, params=params)


def filled(student: Student, depth: int = 0) -> Student:
    """The student as openpi computes it, and behind its layers ones of zeros, which add nothing.

    Its image tower becomes as deep as that of the classes, and its streams have `depth` layers, if
    they have fewer.
    """
    student = as_openpi(student)
    model, params = student.model, student.params
    if model.depth < depth:
        model, params = pi0.at_depth(model, depth), pad(params, "layers", depth)
    if model.image.depth < TOWER_DEPTH:
        image = dataclasses.replace(model.image, depth=TOWER_DEPTH)
        model = dataclasses.replace(model, image=image)
        params = pad(params, "image_layers", TOWER_DEPTH)
    assets = dataclasses.replace(student.assets, model=model)
    return dataclasses.replace(student, assets=assets, params=params)


def pad(params: PyTree, stack: str, depth: int) -> PyTree:
    """The layers of a stack, and zeros behind them up to `depth`."""

    def fill(path: jax.tree_util.KeyPath, leaf: jax.Array) -> np.ndarray:
        values = np.asarray(leaf)
        if parameters.stack(weights.path_name(path)) != stack:
            return values
        more = np.zeros((depth - len(values), *values.shape[1:]), values.dtype)
        return np.concatenate([values, more])

    return jax.tree_util.tree_map_with_path(fill, params)


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
