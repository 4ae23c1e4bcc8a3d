"""The products of a model that run in 8 bits, and its prepared matrices rounded for them.

Only the large products of the layers are rounded: query, key and value, the way out of the heads,
and the MLP, in image tower, backbone and action expert, each of which can be left out. Norms,
attention itself, the token and patch embeddings, the projections of state, time and actions and the
image tower's head keep the model's dtype. `calibration` measures the bounds of activations.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from shallow_pi.models import parameters, pi0, quantized, siglip

# "int8" and "fp8" round weights and activations, "w8" (int8) and "wf8" (fp8) weights alone.
Scheme = Literal["none", "int8", "fp8", "w8", "wf8"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
Part = Literal["vision", "backbone", "expert"]
PARTS: tuple[Part, ...] = get_args(Part)
# The fields of a layer that are matrices: each is multiplied with one kind of activations.
PRODUCTS: dict[Part, tuple[str, ...]] = {
    "vision": ("qkv", "out", "up", "down"),
    "backbone": ("qkv", "out", "gate_up", "down"),
    "expert": ("qkv", "out", "gate_up", "down"),
}
# Largest magnitude of the activations of every product of a part, one for each layer.
Bounds = Mapping[str, Mapping[str, Float[Array | np.ndarray, " l"]]]

_Layer = TypeVar("_Layer", bound=tuple[Any, ...])
# Makes the new matrix from its layer (None: a stack), its field and the old one.
Change = Callable[[int | None, str, Any], Any]


def check(scheme: str, parts: tuple[str, ...] = PARTS) -> None:
    """Raise ValueError unless scheme and parts exist."""
    if scheme not in SCHEMES:
        raise ValueError(f"quantize must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if unknown := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"parts to quantize are {', '.join(PARTS)}, got {', '.join(unknown)}")
    if scheme != "none" and not parts:
        raise ValueError(f"quantize is {scheme!r} and no part is named; there are {PARTS}")


def format_of(scheme: Scheme) -> quantized.Format:
    """The format of a scheme's weights."""
    return "int8" if scheme in ("int8", "w8") else "fp8"


def rounds_activations(scheme: Scheme) -> bool:
    """True if a scheme needs calibrated bounds of activations."""
    return scheme in ("int8", "fp8")


def weights_alone(scheme: Scheme) -> Scheme:
    """The scheme with the same weights, and activations that are not rounded."""
    only: dict[Scheme, Scheme] = {"int8": "w8", "fp8": "wf8"}
    return only.get(scheme, scheme)


def stack(
    stack: list[_Layer] | _Layer,
    part: Part,
    scheme: Scheme,
    parts: tuple[Part, ...],
    bounds: Bounds | None,
) -> list[_Layer] | _Layer:
    """The layers of one part, their matrices rounded if the part is among those to round.

    Raises:
      ValueError: the scheme rounds activations and there are no bounds.
    """
    if scheme == "none" or part not in parts:
        return stack
    if rounds_activations(scheme) and bounds is None:
        raise ValueError(
            f"quantize {scheme!r} rounds activations, and their scales are not known: calibrate "
            f"the policy (scripts/calibrate.py), or round weights alone: {weights_alone(scheme)!r}"
        )
    if not rounds_activations(scheme):
        bounds = None

    def change(index: int | None, name: str, matrix: Array) -> quantized.Quantized:
        bound = None if bounds is None else jnp.asarray(bounds[part][name])
        if bound is not None and index is not None:
            bound = bound[index]
        return quantized.quantize(matrix, format_of(scheme), bound)

    return map_matrices(stack, change)


def map_matrices(stack: list[_Layer] | _Layer, change: Change) -> list[_Layer] | _Layer:
    """The layers (or stack of them) with every matrix changed."""
    if isinstance(stack, list):
        return [_map_layer(layer, functools.partial(change, i)) for i, layer in enumerate(stack)]
    return _map_layer(stack, functools.partial(change, None))


def _map_layer(layer: _Layer, change: Callable[[str, Any], Any]) -> _Layer:
    found: dict[str, Any] = {}
    given: Any = layer
    if not isinstance(layer, siglip.Layer):
        for name in PRODUCTS["backbone"]:
            found[name] = jax.tree.map(functools.partial(change, name), getattr(given, name))
        return given._replace(**found)  # type: ignore[no-any-return]
    for name in PRODUCTS["vision"]:
        pairs = layer.qkv if name == "qkv" else (getattr(given, name),)
        changed = tuple((change(name, kernel), bias) for kernel, bias in pairs)
        found[name] = changed if name == "qkv" else changed[0]
    return given._replace(**found)  # type: ignore[no-any-return]


def depths(config: pi0.Pi0Config) -> dict[Part, int]:
    """Layers of each part."""
    return {"vision": config.image.depth, "backbone": config.depth, "expert": config.depth}


def made_up_bounds(config: pi0.Pi0Config) -> Bounds:
    """Bounds of the right shapes, to measure speed with: no time depends on them."""
    return {
        part: {name: jnp.full(depth, 4.0) for name in PRODUCTS[part]}
        for part, depth in depths(config).items()
    }


def straight_through(params: PyTree, scheme: Scheme, parts: tuple[Part, ...] = PARTS) -> PyTree:
    """A model's parameters in openpi's tree as a quantized policy has them (see `quantized`).

    Gradients pass as if nothing were rounded, so that a student can be trained with it.
    """
    if scheme == "none":
        return params
    format = format_of(scheme)

    def change(path: jax.tree_util.KeyPath, leaf: Array) -> Array:
        found = parameters.find("/".join(str(getattr(key, "key", key)) for key in path))
        if found is None or part_of(found) not in parts:
            return leaf
        inputs = tuple(i for i, axis in enumerate(found.axes) if axis in found.inputs)
        return quantized.straight_through(leaf, format, inputs)

    return jax.tree_util.tree_map_with_path(change, params)


def part_of(parameter: parameters.Parameter) -> Part | None:
    """The part in which a parameter is rounded; None: it never is."""
    path = parameter.path
    if not parameter.inputs or parameter.stack is None:
        return None
    if path.startswith(f"{parameters.ENCODER}/"):
        return "vision"
    name = path.removeprefix(f"{parameters.LAYERS}/").removeprefix("attn/").partition("/")[0]
    if name.startswith("pre_"):  # Adaptive norms.
        return None
    return "expert" if name.endswith("_1") else "backbone"
