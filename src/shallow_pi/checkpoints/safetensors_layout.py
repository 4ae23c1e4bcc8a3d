"""The mapping between openpi's JAX parameters and their PyTorch names, in both directions.

openpi's `model.safetensors` and LeRobot's (the same names behind `model.`) hold one tensor a layer
and matrix under transformers' names for PaliGemma and Gemma. A tensor has the axes of its parameter
(`parameters.TABLE`) in PyTorch's order: a matrix has one axis of all outputs, then one of all
inputs; a vector has one axis.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from shallow_pi.models import parameters

WITH_EXPERT = "paligemma_with_expert."
PALIGEMMA = f"{WITH_EXPERT}paligemma.model."
IMAGES = f"{PALIGEMMA}vision_tower.vision_model."
BACKBONE = f"{PALIGEMMA}language_model."
EXPERT = f"{WITH_EXPERT}gemma_expert.model."
EMBEDDING = f"{BACKBONE}embed_tokens.weight"
# The backbone's output matrix is its embedding, and a file may hold it under either name.
TIED = f"{WITH_EXPERT}paligemma.lm_head.weight"
# Tensors of the PyTorch classes that no policy uses.
UNUSED = (TIED, f"{WITH_EXPERT}gemma_expert.lm_head.weight", f"{EXPERT}embed_tokens.weight")
# Tensors that are no parameters: constants of transformers, and the statistics that LeRobot's
# policies held before they had processor files.
CONSTANTS = re.compile(r".*\.(position_ids|inv_freq)")
STATISTICS = re.compile(r"(normalize_inputs|normalize_targets|unnormalize_outputs)\.buffer_.*")
# Axes that the tensors lack: each index is a separate tensor.
SPLIT = ("keys_values", "gate_up")
# Other spellings, and the one used here: PyTorch adds a level (DistributedDataParallel, compile),
# transformers before 4.52 had the three parts of PaliGemma on one level, and transformers 5
# has no level `vision_model`.
_SPELLINGS = [
    (re.compile(pattern), spelling)
    for pattern, spelling in (
        (r"(?<![^.])(module|_orig_mod)\.", ""),
        (r"^model\.(?=paligemma_with_expert\.|action_|state_proj\.|time_mlp_)", ""),
        (r"\.paligemma\.language_model\.lm_head\.", ".paligemma.lm_head."),
        (r"\.paligemma\.language_model\.model\.", ".paligemma.model.language_model."),
        (r"\.paligemma\.(vision_tower|multi_modal_projector)\.", r".paligemma.model.\1."),
        (r"\.vision_tower\.(?!vision_model\.)", ".vision_tower.vision_model."),
    )
]

_ENCODER_NAMES = {
    "LayerNorm_0": "layer_norm1",
    "LayerNorm_1": "layer_norm2",
    "MultiHeadDotProductAttention_0/query": "self_attn.q_proj",
    "MultiHeadDotProductAttention_0/key": "self_attn.k_proj",
    "MultiHeadDotProductAttention_0/value": "self_attn.v_proj",
    "MultiHeadDotProductAttention_0/out": "self_attn.out_proj",
    "MlpBlock_0/Dense_0": "mlp.fc1",
    "MlpBlock_0/Dense_1": "mlp.fc2",
}
_STREAM_NAMES = {
    "attn/q_einsum{}/w": ("self_attn.q_proj.weight",),
    "attn/kv_einsum{}/w": ("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attn/attn_vec_einsum{}/w": ("self_attn.o_proj.weight",),
    "mlp{}/gating_einsum": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp{}/linear": ("mlp.down_proj.weight",),
    "pre_attention_norm{}": ("input_layernorm",),
    "pre_ffw_norm{}": ("post_attention_layernorm",),
}


def spelled(name: str) -> str:
    """A tensor's name as openpi's class has it, from that of LeRobot's or of another version."""
    for pattern, spelling in _SPELLINGS:
        name = pattern.sub(spelling, name)
    return name


def _named() -> dict[str, tuple[str, ...]]:
    """PyTorch names of leaves and of the modules around them; `{}` stands for the layer."""
    found: dict[str, tuple[str, ...]] = {
        "PaliGemma/llm/embedder/input_embedding": (EMBEDDING,),
        "PaliGemma/img/embedding": (f"{IMAGES}embeddings.patch_embedding",),
        "PaliGemma/img/pos_embedding": (f"{IMAGES}embeddings.position_embedding.weight",),
        "PaliGemma/img/Transformer/encoder_norm": (f"{IMAGES}post_layernorm",),
        "PaliGemma/img/head": (f"{PALIGEMMA}multi_modal_projector.linear",),
    }
    for ours, theirs in _ENCODER_NAMES.items():
        found[f"{parameters.ENCODER}/{ours}"] = (f"{IMAGES}encoder.layers.{{}}.{theirs}",)
    for end, model in (("", BACKBONE), ("_1", EXPERT)):
        found[f"PaliGemma/llm/final_norm{end}"] = (f"{model}norm",)
        for ours, parts in _STREAM_NAMES.items():
            names = tuple(f"{model}layers.{{}}.{part}" for part in parts)
            found[f"{parameters.LAYERS}/{ours.format(end)}"] = names
    return found


_NAMES = _named()
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Tensors of more than two axes, and tables.
_GROUPS = {
    "PaliGemma/img/embedding/kernel": "image_width, colours, patch_height, patch_width",
    "PaliGemma/llm/embedder/input_embedding": "vocab, width",
    "PaliGemma/img/pos_embedding": "one image_tokens, image_width",
}


def _names(path: str) -> tuple[str, ...]:
    if path in _NAMES:
        return _NAMES[path]
    module, _, leaf = path.rpartition("/")
    norm = module.removesuffix("/Dense_0")
    if norm != module and norm in _NAMES:  # The projection of an adaptive norm's condition.
        return tuple(f"{name}.dense.{_LEAVES[leaf]}" for name in _NAMES[norm])
    return tuple(f"{name}.{_LEAVES[leaf]}" for name in _NAMES.get(module, (module,)))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A parameter and its PyTorch tensors."""

    parameter: parameters.Parameter
    # Names of the tensors, `{}` for the layer; one per index of a `SPLIT` axis.
    names: tuple[str, ...]

    @property
    def layered(self) -> bool:
        """True if there is one set of tensors per layer."""
        return self.parameter.stack is not None

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of one tensor, in the parameter's order."""
        return tuple(axis for axis in self.parameter.layer_axes if axis not in SPLIT)

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """The parameter's axes that each axis of the tensor merges."""
        if self.parameter.path in _GROUPS:
            return [tuple(group.split()) for group in _GROUPS[self.parameter.path].split(",")]
        inputs = self.parameter.inputs
        outputs = tuple(axis for axis in self.axes if axis not in inputs)
        return [outputs, inputs] if inputs else [outputs]

    def tensor(self, leaf: np.ndarray) -> np.ndarray:
        """The tensor of one layer and one name of a parameter."""
        order = [self.axes.index(axis) for group in self.groups for axis in group]
        sizes = dict(zip(self.axes, leaf.shape, strict=True))
        shape = [math.prod(sizes[axis] for axis in group) for group in self.groups]
        return np.ascontiguousarray(leaf.transpose(order).reshape(shape))

    def sizes(self, shape: tuple[int, ...], known: Mapping[str, int]) -> dict[str, int]:
        """The sizes of the axes, from the tensor's shape; one axis of a group may be unknown."""
        if len(shape) != len(self.groups):
            raise ValueError(
                f"{self.names[0]} has shape {shape}, expected {len(self.groups)} dimensions"
            )
        found: dict[str, int] = {}
        for group, size in zip(self.groups, shape, strict=True):
            given = math.prod(known[axis] for axis in group if axis in known)
            unknown = [axis for axis in group if axis not in known]
            if size % given or len(unknown) > 1 or (not unknown and size != given):
                raise ValueError(
                    f"{self.names[0]} has shape {shape}: {size} does not split into "
                    f"{' × '.join(group)} with {dict(known)}"
                )
            found |= {axis: known.get(axis, size // given) for axis in group}
        return found

    def part(self, tensor: np.ndarray, known: Mapping[str, int]) -> np.ndarray:
        """The inverse of `tensor`."""
        sizes = self.sizes(tensor.shape, known)
        order = [axis for group in self.groups for axis in group]
        split = tensor.reshape([sizes[axis] for axis in order])
        return split.transpose([order.index(axis) for axis in self.axes])


RULES: tuple[Rule, ...] = tuple(
    Rule(parameter, _names(parameter.path)) for parameter in parameters.TABLE
)
