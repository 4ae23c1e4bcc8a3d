"""How a model runs fastest on this device, as `scripts/benchmark.py --tune` measured and kept it.

Whether layers and steps are written out or looped, and which kernel computes attention, is a matter
of the device and of the compiler. What was found is a small JSON file in the user's cache, one for
each device kind, version of JAX and set of sizes. A file that is damaged, or of another content
than its name says, is told of and left alone.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

import jax

from shallow_pi import user_cache
from shallow_pi.inference import attention, prepare
from shallow_pi.models import pi0


def best(config: pi0.Pi0Config) -> prepare.Savings:
    """The fastest that was measured here, else the fastest as far as is known without."""
    return load(config) or prepare.best()


def key(config: pi0.Pi0Config) -> dict[str, Any]:
    """What a measurement holds for. Cameras and prompt change from one observation to the next."""
    sizes = dataclasses.asdict(config)
    for name in ("cameras", "max_token_len"):
        del sizes[name]
    kind = jax.devices()[0].device_kind
    # As they come back from a file.
    found = json.loads(json.dumps({"device": kind, "jax": jax.__version__, "sizes": sizes}))
    return dict(found)


def path(config: pi0.Pi0Config) -> pathlib.Path:
    """Where the measurement for a model is kept: `$SHALLOW_PI_CACHE/tuning`, by default at home."""
    content = key(config)
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    device = re.sub(r"[^a-z0-9]+", "-", content["device"].lower()).strip("-")
    name = f"{device}-jax-{jax.__version__}-{'pi05' if config.pi05 else 'pi0'}-l{config.depth}"
    return user_cache.folder("tuning") / f"{name}-{digest}.json"


def store(
    config: pi0.Pi0Config, savings: prepare.Savings, milliseconds: Mapping[str, float]
) -> pathlib.Path:
    """Keep the fastest, with everything that was measured; returns the file.

    Args:
      config: the model.
      savings: the fastest.
      milliseconds: of each candidate, by its name.
    """
    file = path(config)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "key": key(config),
        "savings": dataclasses.asdict(savings),
        "milliseconds": dict(milliseconds),
    }
    # Complete under its name, or not there: a robot may be reading.
    partial = file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)
    return file


def load(config: pi0.Pi0Config) -> prepare.Savings | None:
    """What `store` kept for this model, device and JAX; None, with a warning, if damaged."""
    file = path(config)
    try:
        return _savings(config, json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{file} is ignored: {error}. Delete it, or measure anew with "
            f"`scripts/benchmark.py --tune`.",
            stacklevel=2,
        )
        return None


def _savings(config: pi0.Pi0Config, content: Any) -> prepare.Savings:
    """A file's choice; ValueError where it makes no sense."""
    if not isinstance(content, dict) or content.get("key") != key(config):
        raise ValueError("it is of another model, device or version of JAX")
    given, fields = content.get("savings"), dataclasses.asdict(prepare.ALL)
    if not isinstance(given, dict) or set(given) != set(fields):
        raise ValueError(f"'savings' must hold {', '.join(fields)}")
    wrong = [name for name in prepare.ALL.on if not isinstance(given[name], bool)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} must be true or false")
    attention.check(given["attention"], config.dtype)
    return prepare.Savings(**given)
