"""The parameters of a π0 or π0.5 model: one table of paths, axes and initialisers.

Everything that describes the tree reads this table: the Linen modules, abstract shapes, sizes read
from a checkpoint, shardings, PyTorch names, the student cut, LoRA and FLOP counts. Paths are
openpi's, but for those of a scorer of image tokens. Axes have logical names, whose sizes a model's
config fixes (`pi0.axis_sizes`): a name has one size throughout a model. The first axis is `layers`
or `image_layers` where the layers of a stack are scanned.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

LAYERS = "PaliGemma/llm/layers"
ENCODER = "PaliGemma/img/Transformer/encoderblock"
# Leading axes over which scanned layers are stacked: the tower's, and the image encoder's.
STACKS = ("layers", "image_layers")

Init = Literal["zeros", "ones", "lecun", "xavier", "root", "tiny", "spread"]


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One leaf of the tree."""

    path: str
    axes: tuple[str, ...]
    # The axes a matrix product sums over; empty for vectors and lookup tables.
    inputs: tuple[str, ...] = ()
    init: Init = "zeros"
    # The models that have it: π0.5 (True), π0 (False) or both (None).
    pi05: bool | None = None

    @property
    def stack(self) -> str | None:
        """The leading axis of layers, if any."""
        return self.axes[0] if self.axes[0] in STACKS else None

    @property
    def layer_axes(self) -> tuple[str, ...]:
        """The axes of one layer's part."""
        return self.axes[1:] if self.stack else self.axes

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the whole leaf, given the size of every axis."""
        return tuple(sizes[axis] for axis in self.axes)

    def layer_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of one layer's part."""
        return tuple(sizes[axis] for axis in self.layer_axes)

    def initializer(self) -> nn.initializers.Initializer:
        """openpi's initialiser, for one layer's part."""
        inward = [i for i, axis in enumerate(self.layer_axes) if axis in self.inputs]
        outward = [i for i in range(len(self.layer_axes)) if i not in inward]
        match self.init:
            case "zeros":
                return nn.initializers.zeros_init()
            case "ones":
                return nn.initializers.ones_init()
            case "lecun":
                return nn.initializers.lecun_normal(inward, outward[-1:], outward[:-1])
            case "xavier":
                return nn.initializers.xavier_uniform(inward, outward)
            case "root":  # Standard deviation width^-1/2: scaled by √width, tokens have variance 1.
                return lambda key, shape, *dtype: nn.initializers.normal(shape[-1] ** -0.5)(
                    key, shape, *dtype
                )
            case "tiny":
                return nn.initializers.normal(1e-6)
            case "spread":
                return _spread


def _spread(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
    """Small numbers, exact in bfloat16, whose largest ones are evenly spaced, however many."""
    del key
    golden = jnp.arange(shape[-1]) * 0.6180339887 % 1.0
    ranks = jnp.argsort(jnp.argsort(golden)).astype(dtype)
    return jnp.broadcast_to(ranks / 1024, shape)


def _dense(
    path: str,
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    stack: tuple[str, ...] = (),
    *,
    init: Init = "lecun",
    bias: Init = "zeros",
    pi05: bool | None = None,
) -> list[Parameter]:
    return [
        Parameter(f"{path}/kernel", (*stack, *inputs, *outputs), inputs, init, pi05),
        Parameter(f"{path}/bias", (*stack, *outputs), (), bias, pi05),
    ]


def _layer_norm(path: str, stack: tuple[str, ...] = ()) -> list[Parameter]:
    axes = (*stack, "image_width")
    return [Parameter(f"{path}/scale", axes, (), "ones"), Parameter(f"{path}/bias", axes)]


def _rms_norm(path: str, width: str, stack: tuple[str, ...] = ()) -> list[Parameter]:
    """A plain norm; the expert's are adaptive in π0.5."""
    if width == "width":
        return [Parameter(f"{path}/scale", (*stack, width))]
    return [
        Parameter(f"{path}/scale", (*stack, width), pi05=False),
        *_dense(f"{path}/Dense_0", (width,), ("modulation",), stack, init="zeros", pi05=True),
    ]


def _stream(end: str, width: str, mlp: str) -> list[Parameter]:
    """The layers and the final norm of the backbone, or of the action expert (`end` "_1")."""

    def matrix(name: str, axes: tuple[str, ...], *inputs: str) -> Parameter:
        return Parameter(f"{LAYERS}/{name}", ("layers", *axes), inputs, "lecun")

    keys_values = ("keys_values", "kv_heads", width, "head_dim")
    return [
        matrix(f"attn/q_einsum{end}/w", ("heads", width, "head_dim"), width),
        matrix(f"attn/kv_einsum{end}/w", keys_values, width),
        matrix(f"attn/attn_vec_einsum{end}/w", ("heads", "head_dim", width), "heads", "head_dim"),
        matrix(f"mlp{end}/gating_einsum", ("gate_up", width, mlp), width),
        matrix(f"mlp{end}/linear", (mlp, width), mlp),
        *_rms_norm(f"{LAYERS}/pre_attention_norm{end}", width, ("layers",)),
        *_rms_norm(f"{LAYERS}/pre_ffw_norm{end}", width, ("layers",)),
        *_rms_norm(f"PaliGemma/llm/final_norm{end}", width),
    ]


def _image_encoder() -> list[Parameter]:
    stack, width, mlp = ("image_layers",), ("image_width",), ("image_mlp",)
    heads = ("image_heads", "image_head_dim")
    attention = f"{ENCODER}/MultiHeadDotProductAttention_0"
    patch = ("patch_height", "patch_width", "colours")
    dense = functools.partial(_dense, stack=stack, init="xavier")
    return [
        *_dense("PaliGemma/img/embedding", patch, width),
        Parameter("PaliGemma/img/pos_embedding", ("one", "image_tokens", *width), (), "root"),
        *_layer_norm(f"{ENCODER}/LayerNorm_0", stack),
        *dense(f"{attention}/query", width, heads),
        *dense(f"{attention}/key", width, heads),
        *dense(f"{attention}/value", width, heads),
        *dense(f"{attention}/out", heads, width),
        *_layer_norm(f"{ENCODER}/LayerNorm_1", stack),
        *dense(f"{ENCODER}/MlpBlock_0/Dense_0", width, mlp, bias="tiny"),
        *dense(f"{ENCODER}/MlpBlock_0/Dense_1", mlp, width, bias="tiny"),
        *_layer_norm("PaliGemma/img/Transformer/encoder_norm"),
        *_dense("PaliGemma/img/head", width, ("width",)),
    ]


_ACTION, _EXPERT, _HIDDEN = ("action_dim",), ("expert_width",), ("time_hidden",)
TABLE: tuple[Parameter, ...] = (
    Parameter("PaliGemma/llm/embedder/input_embedding", ("vocab", "width"), (), "root"),
    *_stream("", "width", "mlp"),
    *_stream("_1", "expert_width", "expert_mlp"),
    *_image_encoder(),
    *_dense("action_in_proj", _ACTION, _EXPERT),
    *_dense("action_out_proj", _EXPERT, _ACTION),
    *_dense("state_proj", _ACTION, _EXPERT, pi05=False),
    *_dense("action_time_mlp_in", ("action_and_time",), _HIDDEN, pi05=False),
    *_dense("action_time_mlp_out", _HIDDEN, _EXPERT, pi05=False),
    *_dense("time_mlp_in", _EXPERT, _HIDDEN, pi05=True),
    *_dense("time_mlp_out", _HIDDEN, _EXPERT, pi05=True),
)
# Those of a scorer of image tokens (`scorer`), which openpi's models do not have. It starts with
# evenly spaced patches.
SCORER: tuple[Parameter, ...] = (
    *_dense("image_scorer/hidden", ("width",), ("scorer_hidden",)),
    Parameter("image_scorer/prompt/kernel", ("width", "scorer_hidden"), ("width",)),
    Parameter("image_scorer/score/kernel", ("scorer_hidden", "one"), ("scorer_hidden",)),
    Parameter("image_scorer/position", ("image_tokens",), (), "spread"),
)
_BY_PATH = {parameter.path: parameter for parameter in (*TABLE, *SCORER)}


def find(path: str) -> Parameter | None:
    """The parameter whose path ends `path`, such as that of its moment in an optimizer's state."""
    while path not in _BY_PATH and "/" in path:
        path = path.partition("/")[2]
    return _BY_PATH.get(path)


def stack(path: str) -> str | None:
    """The leading layer axis of the leaf at a path, if any."""
    parameter = find(path)
    return None if parameter is None else parameter.stack


class Leaves(nn.Module):
    """The parameters below a path, which Linen creates and holds, as a tree."""

    root: str
    sizes: Mapping[str, int]
    pi05: bool | None = None
    # Stack the parts of all layers of a stack, instead of one layer's.
    stacked: bool = False

    @nn.compact
    def __call__(self) -> dict[str, PyTree[Array]]:
        return declare(self, self.root, self.sizes, self.pi05, stacked=self.stacked)


def declare(
    module: nn.Module,
    path: str,
    sizes: Mapping[str, int],
    pi05: bool | None = None,
    names: tuple[str, ...] | None = None,
    *,
    stacked: bool = False,
) -> dict[str, PyTree[Array]]:
    """The parameters of a Linen module at a path, as a tree; of stacked ones, one layer's.

    Args:
      module: the module, in whose compact method this is called.
      path: where the module is in openpi's tree.
      sizes: the size of every axis.
      pi05: π0.5's parameters (True) or π0's; None where it has the same as the other.
      names: the children of the path to take; None uses all.
      stacked: of stacked ones, all layers' parts.
    """
    tree: dict[str, PyTree[Array]] = {}
    for parameter in (*TABLE, *SCORER):
        if parameter.pi05 not in (None, pi05) or not parameter.path.startswith(f"{path}/"):
            continue
        name, _, deeper = parameter.path[len(path) + 1 :].partition("/")
        if name in tree or (names is not None and name not in names):
            continue
        if deeper:
            tree[name] = Leaves(f"{path}/{name}", sizes, pi05, stacked, name=name)()
        elif stacked:
            tree[name] = module.param(name, _each_layer(parameter), parameter.shape(sizes))
        else:
            shape = parameter.layer_shape(sizes)
            tree[name] = module.param(name, parameter.initializer(), shape)
    return tree


def _each_layer(parameter: Parameter) -> Callable[[Array, tuple[int, ...]], Array]:
    """The initialiser of a stack: each layer's part is drawn with a key of its own."""

    def init(key: Array, shape: tuple[int, ...]) -> Array:
        keys = jax.random.split(key, shape[0])
        return jnp.stack([parameter.initializer()(k, shape[1:]) for k in keys])

    return init


def abstract(sizes: Mapping[str, int], pi05: bool, scorer: bool = False) -> PyTree:
    """The shapes of all parameters in float32, as a tree."""
    tree: dict[str, PyTree] = {}
    for parameter in (*TABLE, *SCORER * scorer):
        if parameter.pi05 in (None, pi05):
            *folders, name = parameter.path.split("/")
            node = functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)
            node[name] = jax.ShapeDtypeStruct(parameter.shape(sizes), "float32")
    return tree


def count(sizes: Mapping[str, int], *paths: str) -> int:
    """Elements of the matrices whose paths start with one of `paths`."""
    return sum(
        math.prod(parameter.shape(sizes))
        for parameter in (*TABLE, *SCORER)
        if parameter.inputs and parameter.path.startswith(paths)
    )
