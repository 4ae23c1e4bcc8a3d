"""Options of inference, and the fastest of them measured on this device.

Layers and steps run fastest unrolled or scanned, and attention fastest in one kernel or another,
depending on device and compiler. `scripts/benchmark.py --tune` measures the combinations and keeps
the fastest as a small JSON file in the user's cache, one for each device kind, JAX version and set
of sizes. A damaged file, or one of another model, is ignored with a warning.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax

from shallow_pi import atomic, user_cache
from shallow_pi.inference import attention as attentions
from shallow_pi.inference import quantize as quantization
from shallow_pi.models import pi0


@dataclasses.dataclass(frozen=True)
class InferenceOptions:
    """Optimizations that change no result, all on by default, attention kernels, and bits.

    Products in 8 bits alone change the result, so they are never chosen unless asked for.
    """

    # One matrix for query, key and value, one for gate and up.
    fused: bool = True
    # Everything that depends on time alone is computed once, into tables.
    time_tables: bool = True
    # π0's state token runs once, not at every integration step.
    state_once: bool = True
    # Layers are unrolled instead of scanned: no unread prefix work in the last layer, and no
    # copies of weights out of their stacks.
    unrolled_layers: bool = True
    # Integration steps are unrolled too.
    unrolled_steps: bool = True
    # The image tower's MLP is widened with zeros to a multiple of 128, once: XLA would pad weights
    # and activations at every call.
    padded_tower: bool = True
    # The kernels that compute attention: in the image tower, the prefix, and the steps.
    tower_attention: attentions.Kernel = "xla"
    prefix_attention: attentions.Kernel = "xla"
    step_attention: attentions.Kernel = "xla"
    # The steps' buffers: "joined" has one write a layer and step where "apart" has two, and "joined
    # with queries" one kernel that rotates and writes all three.
    step_buffers: attentions.Buffers = "apart"
    # Products in 8 bits: of weights and activations (int8, fp8), or with 8-bit weights alone (w8,
    # wf8); in these parts of the model.
    quantize: quantization.Scheme = "none"
    quantized: tuple[quantization.Part, ...] = quantization.PARTS

    def __post_init__(self) -> None:
        quantization.check(self.quantize, self.quantized)
        attentions.check_buffers(self.step_buffers, self.step_attention)

    @property
    def on(self) -> tuple[str, ...]:
        """Names of the optimizations that are on."""
        return tuple(name for name, value in dataclasses.asdict(self).items() if value is True)


ALL_ON = InferenceOptions()
ALL_OFF = InferenceOptions(False, False, False, False, False, False)
ATTENTION = "tower_attention", "prefix_attention", "step_attention"
# On CPUs unrolled programs take longer to compile, and small ones longer to run.
SCANNED = dataclasses.replace(
    ALL_ON, unrolled_layers=False, unrolled_steps=False, padded_tower=False
)


def default() -> InferenceOptions:
    """The options expected to be fastest on JAX's default backend, before any measurement."""
    return SCANNED if jax.default_backend() == "cpu" else ALL_ON


def best(config: pi0.Pi0Config) -> InferenceOptions:
    """The options measured as fastest on this device, else the default ones."""
    return load(config) or default()


def key(config: pi0.Pi0Config) -> dict[str, Any]:
    """Device, JAX and sizes of a measurement; cameras and prompt vary with observations.

    A state in the prompt is words like any others, and no part of the program.
    """
    sizes = dataclasses.asdict(config)
    for name in ("cameras", "max_token_len", "discrete_state_input"):
        del sizes[name]
    kind = jax.devices()[0].device_kind
    # Through JSON, as a file gives it back.
    found = json.loads(json.dumps({"device": kind, "jax": jax.__version__, "sizes": sizes}))
    return dict(found)


def path(config: pi0.Pi0Config) -> pathlib.Path:
    """The file of a model's measurement, in `tuning` of the user's cache."""
    content = key(config)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    device = re.sub(r"[^a-z0-9]+", "-", content["device"].lower()).strip("-")
    name = f"{device}-jax-{jax.__version__}-{'pi05' if config.pi05 else 'pi0'}-l{config.depth}"
    return user_cache.folder("tuning") / f"{name}-{digest}.json"


def store(
    config: pi0.Pi0Config,
    options: InferenceOptions,
    milliseconds: Mapping[str, float],
    scheme: quantization.Scheme | None = None,
) -> pathlib.Path:
    """Keep the fastest options and all measurements; returns the file.

    `options` are the fastest that change no result. `scheme` is the fastest of products in 8 bits,
    which `fastest_scheme` gives whoever asks for it; None: not measured.
    """
    file = path(config)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "key": key(config),
        "options": dataclasses.asdict(options),
        "quantize": scheme,
        "milliseconds": dict(milliseconds),
    }
    atomic.write(file, json.dumps(content, indent=2) + "\n")  # A robot may be reading.
    return file


def load(config: pi0.Pi0Config) -> InferenceOptions | None:
    """The options kept by `store`, for this device and JAX; None, with a warning, if damaged."""
    found = _load(config)
    return None if found is None else found[0]


def fastest_scheme(config: pi0.Pi0Config) -> quantization.Scheme | None:
    """The scheme of products in 8 bits measured as fastest on this device; None: not measured."""
    found = _load(config)
    return None if found is None else found[1]


def _load(config: pi0.Pi0Config) -> tuple[InferenceOptions, quantization.Scheme | None] | None:
    file = path(config)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        options, scheme = _options(config, content), content.get("quantize")
        if scheme is not None:
            quantization.check(scheme)
        return options, scheme
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError) as error:
        warnings.warn(
            f"{file} is ignored: {error}. Delete it, or measure again with "
            f"`scripts/benchmark.py --tune`.",
            stacklevel=2,
        )
        return None


def _options(config: pi0.Pi0Config, content: Any) -> InferenceOptions:
    """The options of a file; ValueError if they are invalid."""
    if not isinstance(content, dict) or content.get("key") != key(config):
        raise ValueError("it is of another model, device or version of JAX")
    given, fields = content.get("options"), dataclasses.asdict(ALL_ON)
    if not isinstance(given, dict) or set(given) != set(fields):
        raise ValueError(f"'options' must hold {', '.join(fields)}")
    wrong = [name for name in ALL_ON.on if not isinstance(given[name], bool)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} must be true or false")
    for name in ATTENTION:
        attentions.check(given[name], config.dtype)
    return InferenceOptions(**{**given, "quantized": tuple(given["quantized"])})
