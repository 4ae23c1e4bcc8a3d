"""openpi's parameters as PyTorch names them: one table, read both ways.

openpi's `model.safetensors` and LeRobot's (the same names behind `model.`) hold one tensor a layer
and matrix, outputs before inputs, under transformers' names for PaliGemma and Gemma. `RULES` has a
line for every leaf of the JAX tree. Each line's equation gives the leaf's axes and the tensor's:
"ndh->nh,d" is a leaf (n, d, h) that PyTorch keeps as a matrix of n·h rows and d columns. Letters:
n heads, k kv heads, m heads of the image encoder, h and e their head dims, u an axis of 1.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

WITH_EXPERT = "paligemma_with_expert."
PALIGEMMA = f"{WITH_EXPERT}paligemma.model."
IMAGES = f"{PALIGEMMA}vision_tower.vision_model."
BACKBONE = f"{PALIGEMMA}language_model."
EXPERT = f"{WITH_EXPERT}gemma_expert.model."
EMBEDDING = f"{BACKBONE}embed_tokens.weight"
# The backbone's output matrix is its embedding, and a file may hold it under either name.
TIED = f"{WITH_EXPERT}paligemma.lm_head.weight"
# What the classes have and no policy uses.
UNUSED = (TIED, f"{WITH_EXPERT}gemma_expert.lm_head.weight")


@dataclasses.dataclass(frozen=True)
class Rule:
    """One leaf of the JAX tree and the tensors it is made of."""

    # Path of the leaf.
    path: str
    # The tensors, `{}` being the layer; of several the leaf has an axis, in this order.
    names: tuple[str, ...]
    # "leaf axes->tensor axes", for one layer and one of the names.
    equation: str

    @property
    def layered(self) -> bool:
        """Whether the leaf has a leading layer axis."""
        return "{}" in self.names[0]

    @property
    def axes(self) -> str:
        return self.equation.partition("->")[0]

    @property
    def groups(self) -> list[str]:
        """The tensor's axes, each as the leaf's axes it is made of."""
        return self.equation.partition("->")[2].split(",")

    def tensor(self, leaf: np.ndarray) -> np.ndarray:
        """A leaf's part (one layer, one name) as its tensor."""
        order = [self.axes.index(letter) for letter in "".join(self.groups)]
        sizes = dict(zip(self.axes, leaf.shape, strict=True))
        shape = [math.prod(sizes[letter] for letter in group) for group in self.groups]
        return np.ascontiguousarray(leaf.transpose(order).reshape(shape))

    def sizes(self, shape: tuple[int, ...], known: Mapping[str, int]) -> dict[str, int]:
        """The leaf's axes, from the tensor's shape; one axis of a group may be unknown."""
        if len(shape) != len(self.groups):
            raise ValueError(
                f"{self.names[0]} has shape {shape}, expected {len(self.groups)} dimensions"
            )
        found: dict[str, int] = {}
        for group, size in zip(self.groups, shape, strict=True):
            given = math.prod(known[letter] for letter in group if letter in known)
            unknown = [letter for letter in group if letter not in known]
            if size % given or len(unknown) > 1 or (not unknown and size != given):
                raise ValueError(
                    f"{self.names[0]} has shape {shape}: {size} does not split into {group} with "
                    f"{dict(known)} (n heads, k kv heads, m heads of the image encoder)"
                )
            found |= {letter: known.get(letter, size // given) for letter in group}
        return found

    def part(self, tensor: np.ndarray, known: Mapping[str, int]) -> np.ndarray:
        """The inverse of `tensor`."""
        sizes = self.sizes(tensor.shape, known)
        letters = "".join(self.groups)
        split = tensor.reshape([sizes[letter] for letter in letters])
        return split.transpose([letters.index(letter) for letter in self.axes])


def _dense(path: str, name: str, kernel: str = "io->o,i", bias: str = "o->o") -> list[Rule]:
    return [
        Rule(f"{path}/kernel", (f"{name}.weight",), kernel),
        Rule(f"{path}/bias", (f"{name}.bias",), bias),
    ]


def _norm(path: str, name: str) -> list[Rule]:
    """A plain norm, or an adaptive one; a model has one of the two."""
    scale = Rule(f"{path}/scale", (f"{name}.weight",), "d->d")
    return [scale, *_dense(f"{path}/Dense_0", f"{name}.dense")]


def _layer_norm(path: str, name: str) -> list[Rule]:
    scale = Rule(f"{path}/scale", (f"{name}.weight",), "d->d")
    return [scale, Rule(f"{path}/bias", (f"{name}.bias",), "d->d")]


def _tower(suffix: str, model: str) -> list[Rule]:
    ours, theirs = "PaliGemma/llm/layers", f"{model}layers.{{}}"
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    keys_values = (f"{attention}.k_proj.weight", f"{attention}.v_proj.weight")
    gate_up = (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
    return [
        Rule(f"{ours}/attn/q_einsum{suffix}/w", (f"{attention}.q_proj.weight",), "ndh->nh,d"),
        Rule(f"{ours}/attn/kv_einsum{suffix}/w", keys_values, "kdh->kh,d"),
        Rule(
            f"{ours}/attn/attn_vec_einsum{suffix}/w", (f"{attention}.o_proj.weight",), "nhd->d,nh"
        ),
        Rule(f"{ours}/mlp{suffix}/gating_einsum", gate_up, "df->f,d"),
        Rule(f"{ours}/mlp{suffix}/linear", (f"{mlp}.down_proj.weight",), "fd->d,f"),
        *_norm(f"{ours}/pre_attention_norm{suffix}", f"{theirs}.input_layernorm"),
        *_norm(f"{ours}/pre_ffw_norm{suffix}", f"{theirs}.post_attention_layernorm"),
        *_norm(f"PaliGemma/llm/final_norm{suffix}", f"{model}norm"),
    ]


def _image_encoder() -> list[Rule]:
    ours, theirs = "PaliGemma/img/Transformer/encoderblock", f"{IMAGES}encoder.layers.{{}}"
    attention = f"{ours}/MultiHeadDotProductAttention_0"
    projections = [
        rule
        for name, short in (("query", "q"), ("key", "k"), ("value", "v"))
        for rule in _dense(
            f"{attention}/{name}", f"{theirs}.self_attn.{short}_proj", "wme->me,w", "me->me"
        )
    ]
    return [
        *_dense("PaliGemma/img/embedding", f"{IMAGES}embeddings.patch_embedding", "yxio->o,i,y,x"),
        Rule(
            "PaliGemma/img/pos_embedding",
            (f"{IMAGES}embeddings.position_embedding.weight",),
            "usw->us,w",
        ),
        *_layer_norm(f"{ours}/LayerNorm_0", f"{theirs}.layer_norm1"),
        *_layer_norm(f"{ours}/LayerNorm_1", f"{theirs}.layer_norm2"),
        *projections,
        *_dense(f"{attention}/out", f"{theirs}.self_attn.out_proj", "mew->w,me", "w->w"),
        *_dense(f"{ours}/MlpBlock_0/Dense_0", f"{theirs}.mlp.fc1"),
        *_dense(f"{ours}/MlpBlock_0/Dense_1", f"{theirs}.mlp.fc2"),
        *_layer_norm("PaliGemma/img/Transformer/encoder_norm", f"{IMAGES}post_layernorm"),
        *_dense("PaliGemma/img/head", f"{PALIGEMMA}multi_modal_projector.linear"),
    ]


_PROJECTIONS = ("action_in_proj", "action_out_proj", "state_proj", "time_mlp_in", "time_mlp_out")
RULES: tuple[Rule, ...] = (
    Rule("PaliGemma/llm/embedder/input_embedding", (EMBEDDING,), "vd->v,d"),
    *_tower("", BACKBONE),
    *_tower("_1", EXPERT),
    *_image_encoder(),
    *(
        rule
        for name in (*_PROJECTIONS, "action_time_mlp_in", "action_time_mlp_out")
        for rule in _dense(name, name)
    ),
)
