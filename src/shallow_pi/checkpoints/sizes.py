"""The sizes of a model, read from the shapes of its parameters.

A checkpoint in openpi's layout has no config, but its shapes determine most of a `Pi0Config`: `of`
reads them. Cameras, action horizon, prompt length, dtypes and `discrete_state_input` are in no
shape, and the caller gives them. `resolve` sets the tower sizes of a config from a checkpoint.
"""

import dataclasses
import math
from typing import Any

from jaxtyping import PyTree

from shallow_pi.checkpoints import run_folder, weights
from shallow_pi.models import gemma, parameters, pi0, siglip

# The fields of a Pi0Config that describe a checkpoint's towers. Kind, depth and action dimension
# are in its shapes too, but a config decides them: a difference there is a mistake.
TOWERS = ("backbone", "expert", "image", "image_size", "vocab_size")
# The axes that a config is made from.
_NEEDED = frozenset(
    (
        *("layers", "vocab", "width", "mlp", "heads", "kv_heads", "head_dim", "expert_width"),
        *("expert_mlp", "action_dim", "image_layers", "image_width", "image_mlp", "image_heads"),
        *("image_tokens", "patch_height"),
    )
)


def of(stored: PyTree) -> dict[str, Any]:
    """The fields of a `Pi0Config` that parameters determine, by name, from arrays or shapes.

    They are `pi05`, `depth`, `backbone`, `expert`, `image`, `image_size`, `vocab_size` and
    `action_dim`, so that `Pi0Config(**sizes.of(stored), action_horizon=…, max_token_len=…)` is the
    model of a checkpoint of unknown size.

    Raises:
      ValueError: these are not the parameters of a π0 or π0.5; names a path that is missing, has
        another number of axes or contradicts another one.
    """
    leaves = weights.leaves(stored)
    known: dict[str, tuple[int, str]] = {}
    for parameter in parameters.TABLE:
        path, axes = parameter.path, parameter.axes
        if path not in leaves:
            continue
        shape = tuple(leaves[path].shape)
        if len(shape) != len(axes):
            raise _other(parameter, f"it has the shape {shape}")
        for axis, size in zip(axes, shape, strict=True):
            before, where = known.setdefault(axis, (size, path))
            if before != size:
                raise ValueError(
                    f"the parameters contradict each other: {axis} is {before} in {where} and "
                    f"{size} in {path}; they are not of one checkpoint"
                )
    for parameter in parameters.TABLE:
        if not known.keys() >= _NEEDED & set(parameter.axes):
            raise _other(parameter, "it is missing")
    size = {axis: found for axis, (found, _) in known.items()}
    side = math.isqrt(size["image_tokens"])
    if side**2 != size["image_tokens"]:
        raise ValueError(
            f"PaliGemma/img/pos_embedding has {size['image_tokens']} image tokens: expected a "
            "square number, because images are square"
        )
    attention = {
        "num_heads": size["heads"],
        "num_kv_heads": size["kv_heads"],
        "head_dim": size["head_dim"],
    }
    return {
        "pi05": any(path.startswith("time_mlp_in/") for path in leaves),
        "depth": size["layers"],
        "backbone": gemma.GemmaConfig(size["width"], size["mlp"], **attention),
        "expert": gemma.GemmaConfig(size["expert_width"], size["expert_mlp"], **attention),
        "image": siglip.SiglipConfig(
            width=size["image_width"],
            depth=size["image_layers"],
            mlp_dim=size["image_mlp"],
            num_heads=size["image_heads"],
            patch_size=size["patch_height"],
        ),
        "image_size": side * size["patch_height"],
        "vocab_size": size["vocab"],
        "action_dim": size["action_dim"],
    }


def _other(parameter: parameters.Parameter, found: str) -> ValueError:
    return ValueError(
        f"these are not the parameters of a π0 or π0.5 in openpi's layout: expected "
        f"{parameter.path} with the axes ({', '.join(parameter.axes)}), {found}"
    )


def resolve(config: pi0.Pi0Config, stored: PyTree) -> pi0.Pi0Config:
    """The config with the tower sizes (`TOWERS`) of stored parameters.

    If a path is missing or misshapen the config is returned unchanged: `weights.check_tree` then
    names every such path.
    """
    try:
        found = of(stored)
        return dataclasses.replace(config, **{name: found[name] for name in TOWERS})
    except ValueError:
        return config


def differences(config: pi0.Pi0Config, other: pi0.Pi0Config) -> list[str]:
    """The fields that differ between two models, such as "backbone.width 2048 → 64"."""
    before, after = (run_folder.flatten(dataclasses.asdict(c)) for c in (config, other))
    return [
        f"{name} {value} → {after[name]}" for name, value in before.items() if value != after[name]
    ]
