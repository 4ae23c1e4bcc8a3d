"""The sizes of a model, read off the shapes of its parameters.

A checkpoint in openpi's layout has no config beside it, but most of a `Pi0Config` is in its shapes:
`of` reads them. What no shape tells is left to the caller: cameras, action horizon, prompt length,
whether the state is in the prompt, and dtypes. `resolve` gives a config the towers of a checkpoint.
"""

import dataclasses
import math
from typing import Any

from shallow_pi.checkpoints import weights
from shallow_pi.models import gemma, pi0, siglip

# The fields of a Pi0Config that are facts about a checkpoint's towers. Kind, depth and action
# dimension are in its shapes too, but are what a config decides: there a difference is a mistake.
TOWERS = ("backbone", "expert", "image", "image_size", "vocab_size")

_ENCODER = "PaliGemma/img/Transformer/encoderblock/"
# Path → its axes; an axis of one name has one size throughout.
_AXES = {
    "PaliGemma/llm/embedder/input_embedding": ("vocabulary", "width"),
    f"{weights.LAYERS}attn/q_einsum/w": ("depth", "heads", "width", "head dim"),
    f"{weights.LAYERS}attn/kv_einsum/w": ("depth", "2", "kv heads", "width", "head dim"),
    f"{weights.LAYERS}mlp/linear": ("depth", "mlp dim", "width"),
    f"{weights.LAYERS}attn/q_einsum_1/w": ("depth", "heads", "expert width", "head dim"),
    f"{weights.LAYERS}attn/kv_einsum_1/w": ("depth", "2", "kv heads", "expert width", "head dim"),
    f"{weights.LAYERS}mlp_1/linear": ("depth", "expert mlp dim", "expert width"),
    "PaliGemma/img/embedding/kernel": ("patch size", "patch size", "colours", "image width"),
    "PaliGemma/img/pos_embedding": ("1", "image tokens", "image width"),
    f"{_ENCODER}MlpBlock_0/Dense_0/kernel": ("image depth", "image width", "image mlp dim"),
    f"{_ENCODER}MultiHeadDotProductAttention_0/query/bias": (
        "image depth",
        "image heads",
        "image head dim",
    ),
    "action_in_proj/kernel": ("action dim", "expert width"),
}


def of(stored: weights.Tree) -> dict[str, Any]:
    """The fields of a `Pi0Config` that parameters fix, by name.

    They are `pi05`, `depth`, `backbone`, `expert`, `image`, `image_size`, `vocab_size` and
    `action_dim`, so that `Pi0Config(**sizes.of(stored), action_horizon=…, max_token_len=…)` is the
    model of a checkpoint of unknown size.

    Args:
      stored: arrays or their shapes in openpi's tree, such as `weights.stored_params` gives.

    Raises:
      ValueError: they are not the parameters of a π0 or π0.5: a path that is missing, has another
        number of axes or contradicts another one is named.
    """
    leaves = weights.leaves(stored)
    known: dict[str, tuple[int, str]] = {}
    for path, axes in _AXES.items():
        shape = tuple(leaves[path].shape) if path in leaves else None
        if shape is None or len(shape) != len(axes):
            there = "it is missing" if shape is None else f"it has the shape {shape}"
            raise ValueError(
                f"these are not the parameters of a π0 or π0.5 in openpi's layout: expected {path} "
                f"with the axes ({', '.join(axes)}), {there}"
            )
        for axis, size in zip(axes, shape, strict=True):
            before, where = known.setdefault(axis, (size, path))
            if before != size:
                raise ValueError(
                    f"the parameters contradict each other: {axis} is {before} in {where} and "
                    f"{size} in {path}; they are not of one checkpoint"
                )
    size = {axis: found for axis, (found, _) in known.items()}
    side = math.isqrt(size["image tokens"])
    if side**2 != size["image tokens"]:
        raise ValueError(
            f"PaliGemma/img/pos_embedding has {size['image tokens']} image tokens: expected a "
            "square number, because pictures are square"
        )
    attention = {
        "num_heads": size["heads"],
        "num_kv_heads": size["kv heads"],
        "head_dim": size["head dim"],
    }
    return {
        "pi05": any(path.startswith("time_mlp_in/") for path in leaves),
        "depth": size["depth"],
        "backbone": gemma.GemmaConfig(size["width"], size["mlp dim"], **attention),
        "expert": gemma.GemmaConfig(size["expert width"], size["expert mlp dim"], **attention),
        "image": siglip.SiglipConfig(
            width=size["image width"],
            depth=size["image depth"],
            mlp_dim=size["image mlp dim"],
            num_heads=size["image heads"],
            patch_size=size["patch size"],
        ),
        "image_size": side * size["patch size"],
        "vocab_size": size["vocabulary"],
        "action_dim": size["action dim"],
    }


def resolve(config: pi0.Pi0Config, stored: weights.Tree) -> pi0.Pi0Config:
    """The config with the tower sizes (`TOWERS`) of stored parameters; all else stays.

    Parameters that have no sizes of their own, because a path is missing or misshapen, leave the
    config as it is: `weights.check_tree` then names every path.
    """
    try:
        found = of(stored)
        return dataclasses.replace(config, **{name: found[name] for name in TOWERS})
    except ValueError:
        return config


def differences(config: pi0.Pi0Config, other: pi0.Pi0Config) -> list[str]:
    """What differs between two models, such as "backbone.width 2048 → 64"."""
    before, after = _flat(dataclasses.asdict(config)), _flat(dataclasses.asdict(other))
    return [
        f"{name} {value} → {after[name]}" for name, value in before.items() if value != after[name]
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        is_part = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{name}.") if is_part else {f"{prefix}{name}": value}
    return flat
