"""Find a robot's keys in an observation, however its client spells them.

A key may be flat or nested and joined by dots or slashes, with or without the `observation` and
`images` in front: `observation.images.cam_high` is also found as `{"images": {"cam_high": ...}}` or
`observation/cam_high`. So openpi's example clients (LIBERO, DROID, ALOHA real and simulated, UR5)
and LeRobot's names drive the same policy. Names that differ altogether are in `ALIASES`; for any
others a robot file gives its own keys (`--policy.robot my.py`).

Beside them an observation for a server may have the key REAL_TIME_CHUNKING, a map of what
`Policy.infer` takes as `previous` and `delay`: `with_previous` writes it, and
`robot_observation.split_previous` reads it.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float

REAL_TIME_CHUNKING = "real_time_chunking"
# The last part of a robot's key → other names clients have for it.
ALIASES = {
    "task": ("prompt",),
    "prompt": ("task",),
    # The one camera of ALOHA's simulation, as openpi's client for it sends it.
    "top": ("cam_high",),
    # UR5 as openpi's example for it.
    "image": ("base_rgb",),
    "wrist_image": ("wrist_rgb",),
}


def with_previous(
    observation: Mapping[str, object],
    previous: Float[np.ndarray, "n rd"],
    delay: int,
) -> dict[str, object]:
    """An observation for a server, with the chunk that its answer goes on from.

    Args:
      observation: the robot's.
      previous: what is left of the chunk being executed, in the robot's units, its first row the
        action due now.
      delay: how many of these will have been executed when the answer arrives.
    """
    return {**observation, REAL_TIME_CHUNKING: {"previous": previous, "delay": delay}}


def flatten(observation: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested maps as one, names joined by a slash."""
    flat: dict[str, object] = {}
    for name, value in observation.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def find(observation: Mapping[str, object], keys: Iterable[str]) -> dict[str, str]:
    """Each robot's key that is there → its spelling in `flatten(observation)`.

    Raises:
      ValueError: a key is there under two spellings, none of them the robot's own.
    """
    keys = list(keys)
    flat = {name: value for name, value in flatten(observation).items() if value is not None}
    by_name: dict[str, list[str]] = {}
    for spelled in flat:
        by_name.setdefault(_name(spelled), []).append(spelled)
    taken = set(map(_name, keys))
    found = {}
    for key in keys:
        names = [_name(key), *(a for a in ALIASES.get(_name(key), ()) if a not in taken)]
        spellings = [key] if key in flat else [s for name in names for s in by_name.get(name, ())]
        if len(spellings) > 1:
            raise ValueError(
                f"the observation has {' and '.join(map(repr, spellings))}, and each could be "
                f"{key!r}: send one of them"
            )
        if spellings:
            found[key] = spellings[0]
    return found


def _name(key: str) -> str:
    """A key without what openpi and LeRobot put in front of it."""
    return key.replace(".", "/").removeprefix("observation/").removeprefix("images/")
