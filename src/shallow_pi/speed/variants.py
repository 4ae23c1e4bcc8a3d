"""Variants that `scripts/benchmark_all.py` measures, each in a process of its own.

A variant is plain values, so that it travels as JSON (see `commands.benchmark_variant`).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from shallow_pi import suggestions
from shallow_pi.inference import tuning
from shallow_pi.models import gemma, pi0, siglip

# Small enough for a test on a CPU, and large enough for ALOHA.
TINY = pi0.Pi0Config(
    depth=2,
    backbone=gemma.GemmaConfig(width=32, mlp_dim=64, num_heads=4, num_kv_heads=1, head_dim=16),
    expert=gemma.GemmaConfig(width=16, mlp_dim=32, num_heads=4, num_kv_heads=1, head_dim=16),
    image=siglip.SiglipConfig(width=32, depth=1, mlp_dim=64, num_heads=2, patch_size=14),
    image_size=28,
    vocab_size=512,
    dtype="float32",
)
# The prompt lengths and horizons of the tables in docs/speed.md.
PROMPTS = {"pi0": 48, "pi05": 200}
HORIZONS = {"pi0": 50, "pi05": 10}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One measurement."""

    name: str
    # "inference": one inference at batch 1. "policy": `Policy.infer` by stage, and `infer_batch`.
    # "openpi": openpi's own sampler. "step": a training step.
    kind: Literal["inference", "policy", "openpi", "step"] = "inference"
    model: Literal["pi0", "pi05"] = "pi05"
    depth: int = 6
    cameras: int = 2
    # Prompt tokens and actions; 0 is the table's.
    prompt: int = 0
    horizon: int = 0
    num_steps: int = 10
    # "inference": time image tower, prefix and one step by themselves, and the ceilings.
    parts: bool = False
    # Trace the kernels.
    profile: bool = False
    # "policy": the sizes of batches.
    sizes: tuple[int, ...] = (1, 2, 4, 8)
    # Changes of `InferenceOptions`, by field.
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # "step": the config and its flags.
    arguments: tuple[str, ...] = ()
    # Environment variables of the process, such as XLA_FLAGS.
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    repeats: int = 30
    # The variant that this one changes, and is compared with.
    base: str = ""

    def config(self, tiny: bool) -> pi0.Pi0Config:
        """The model's sizes."""
        full = TINY if tiny else pi0.Pi0Config()
        return dataclasses.replace(
            full,
            pi05=self.model == "pi05",
            depth=self.depth,
            cameras=full.cameras[: self.cameras],
            max_token_len=self.prompt or PROMPTS[self.model],
            action_horizon=self.horizon or HORIZONS[self.model],
        )

    def inference_options(self) -> tuning.InferenceOptions:
        """The default options with this variant's changes."""
        changes: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in self.options.items()
        }
        return dataclasses.replace(tuning.default(), **changes)


_FULL = ("pi0_aloha_l6", "--batch-size", "32")
_FROZEN = (*_FULL, "--student.freeze", "vision", "embedder")
# The most valuable first; training last, since it needs the memory that the others give back.
VARIANTS = (
    Variant("pi05_l6", parts=True, profile=True),
    Variant("pi05_l18", depth=18, parts=True, profile=True),
    Variant("openpi_pi05_l18", "openpi", depth=18, repeats=20),
    Variant("pi05_l6_policy", "policy"),
    Variant("pi0_l6", model="pi0", parts=True, profile=True),
    Variant("pi0_l18", model="pi0", depth=18),
    Variant("pi05_l6_2_steps", num_steps=2),
    Variant("pi05_l6_1_step", num_steps=1),
    Variant("pi05_l6_3_cameras", cameras=3),
    Variant("pi05_l9", depth=9),
    Variant("pi05_l4", depth=4),
    Variant("pi05_l2", depth=2),
    Variant("step_pi0_l6", "step", arguments=_FULL, repeats=6, profile=True),
    Variant("step_pi0_l6_frozen", "step", arguments=_FROZEN, repeats=6, profile=True),
)


def _choice(name: str, model: Literal["pi0", "pi05"] = "pi05", **options: Any) -> Variant:
    return Variant(name, model=model, options=options, base=f"{model}_l6", profile=True)


def _step_choice(name: str, base: str, *arguments: str) -> Variant:
    return Variant(name, "step", arguments=arguments, base=base, repeats=6, profile=True)


_CUDNN = ("--attention", "cudnn")
_WHOLE, _PART = ("step_pi0_l6", *_FULL), ("step_pi0_l6_frozen", *_FROZEN)
# Options to choose between on a device, each against the same model or step without it.
CHOICES = {
    "inference": (
        _choice("queries", step_buffers="joined with queries"),
        _choice("joined", step_buffers="joined"),
        _choice("tower_cudnn", tower_attention="cudnn"),
        _choice("tower_cudnn_queries", tower_attention="cudnn", step_buffers="joined with queries"),
        _choice("fp8", quantize="fp8"),
        _choice("int8", quantize="int8"),
        _choice("w8_expert", quantize="w8", quantized=["expert"]),
        _choice("fp8_prefix", quantize="fp8", quantized=["vision", "backbone"]),
        _choice("pi0_queries", "pi0", step_buffers="joined with queries"),
        _choice("pi0_joined", "pi0", step_buffers="joined"),
    ),
    "training": (
        _step_choice("step_xla_layers", *_WHOLE, "--attention", "xla", "--remat", "layers"),
        _step_choice("step_cudnn_layers", *_WHOLE, *_CUDNN, "--remat", "layers"),
        _step_choice("step_frozen_cudnn_none", *_PART, *_CUDNN, "--remat", "none"),
        _step_choice("step_cudnn_dots", *_WHOLE, *_CUDNN, "--remat", "dots"),
    ),
}


def tiny(variants: Sequence[Variant]) -> list[Variant]:
    """The same variants at a size that a CPU can run."""
    shrink = {"pi0_aloha_l6": "debug", "32": "8"}
    return [
        dataclasses.replace(
            one,
            depth=min(one.depth, 3),
            num_steps=min(one.num_steps, 2),
            sizes=one.sizes[:2],
            arguments=tuple(shrink.get(word, word) for word in one.arguments),
            repeats=2,
        )
        for one in variants
    ]


# The JSON that a field of this type takes.
_JSON = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    tuple: "a list",
    dict: "an object",
}


def parse(text: str, known: Sequence[Variant]) -> Variant:
    """A variant of JSON: its fields, and those of its `base` for the others.

    Raises:
      ValueError: not JSON; a field, option or base that does not exist, or no name.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--add must be JSON, got {text!r}: {error}") from error
    if not isinstance(values, dict) or not values.get("name"):
        raise ValueError(f"--add must be an object with a name, got {text!r}")
    _check(values, Variant, "a variant")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, value in values.items():
        expected = type(getattr(VARIANTS[0], name))
        if not isinstance(value, expected):
            raise ValueError(f"--add: {name} must be {_JSON[expected]}, got {value!r}")
    _check(values.get("options", {}), tuning.InferenceOptions, "an inference")
    bases = {one.name: one for one in known}
    base = values.get("base", "")
    if base and base not in bases:
        raise ValueError(f"--add: no variant {base!r} to change, only {list(bases)}")
    return dataclasses.replace(bases[base] if base else Variant(values["name"]), **values)


def _check(values: Mapping[str, Any], kind: type, what: str) -> None:
    fields = [field.name for field in dataclasses.fields(kind)]
    for name in values:
        if name not in fields:
            hint = suggestions.closest(name, fields)
            raise ValueError(f"--add: {what} has no field {name!r}, only {fields}{hint}")
