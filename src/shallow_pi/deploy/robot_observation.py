"""A robot's observation, checked: errors name the robot's own key.

Everything is accepted that openpi accepts: its clients' names for the keys (`observation_keys`),
images as uint8 or as floats in [0, 1], with the colours last or first. The result has uint8
images (height, width, 3), float32 vectors and a prompt, under the robot's keys, and nothing else.
"""

import reprlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from shallow_pi import progress
from shallow_pi.data.robots import robot as robots
from shallow_pi.data.robots import tokenizer
from shallow_pi.deploy import observation_keys
from shallow_pi.inference import real_time

# First bytes of images in files.
_FILES = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"RIFF": "WebP"}
# Keys that rows of a dataset have beside an observation.
_BOOKKEEPING = {"timestamp", "frame_index", "episode_index", "index", "task_index"}


def clean(
    robot: robots.Robot,
    cameras: tuple[str, ...],
    observation: Mapping[str, object],
    prompt: str | None = None,
) -> dict[str, object]:
    """The parts of an observation a policy needs, each in its one form.

    Args:
      robot: whose observation it is.
      cameras: the model's cameras; those the robot does not have are not asked for.
      observation: the robot's keys in any spelling (`observation_keys`); others are left behind,
        with a warning.
      prompt: what to do where the observation does not say.

    Raises:
      ValueError: something is missing, or of a kind that cannot be meant; names the key.
    """
    if not isinstance(observation, Mapping):
        raise ValueError(
            f"expected one observation, a mapping with the keys of robot {robot.name}, got "
            f"{type(observation).__name__}; for several at once there is infer_batch"
        )
    keys = {robot.cameras[name]: name for name in cameras if name in robot.cameras}
    wanted = {key: f"camera {key!r} (the model's {name})" for key, name in keys.items()}
    wanted |= {key: f"state {key!r}" for key in robot.state_keys}
    if not robot.prompt:
        wanted[robot.prompt_key] = (
            f"prompt {robot.prompt_key!r} (or give the policy a prompt: serve_policy's --prompt)"
        )
    flat = observation_keys.flatten(observation)
    spelled = observation_keys.find(observation, wanted)
    nones = sorted(name for name, value in flat.items() if value is None)
    flat = {name: value for name, value in flat.items() if value is not None}
    _warn_of_unused(robot, flat, spelled)
    if prompt is not None:
        wanted.pop(robot.prompt_key, None)
    observation = {key: flat[spelling] for key, spelling in spelled.items()}
    missing = [what for key, what in wanted.items() if key not in observation]
    if missing:
        raise ValueError(
            f"the observation lacks {', '.join(missing)}; robot {robot.name} sends these, and "
            f"there are only {sorted(flat)}"
            + (f"; it gives None for {', '.join(map(repr, nones))}" if nones else "")
        )
    cleaned: dict[str, object] = {key: image(observation[key], key) for key in keys}
    cleaned |= _state(robot, observation)
    if not robot.prompt:
        given = observation.get(robot.prompt_key)
        text = None if given is None else _prompt(given, robot.prompt_key)
        if text is None or tokenizer.is_absent(text):
            if prompt is None:
                raise ValueError(
                    f"{robot.prompt_key!r} is {text!r}, which is no instruction: send one, or give "
                    "the policy a prompt (serve_policy's --prompt)"
                )
            text = prompt
        cleaned[robot.prompt_key] = text
    return cleaned


def split_previous(
    observation: Mapping[str, object],
) -> tuple[Mapping[str, object], Any, int]:
    """An observation without what it says of the chunk being executed; what is left of that; d.

    What is left is unchecked, and None where the observation says nothing; d is the delay.

    Raises:
      ValueError: it says something else than these two, or the delay is no number of actions.
    """
    key = observation_keys.REAL_TIME_CHUNKING
    if not isinstance(observation, Mapping) or key not in observation:
        return observation, None, 0
    rest = dict(observation)
    if (said := rest.pop(key)) is None:
        return rest, None, 0
    if not isinstance(said, Mapping) or set(said) != {"previous", "delay"}:
        got = (
            reprlib.repr(sorted(map(str, said)))
            if isinstance(said, Mapping)
            else type(said).__name__
        )
        raise ValueError(
            f"{key!r} must be a map of 'previous' (the actions left of the chunk being executed) "
            f"and 'delay' (how many of them will be executed before the answer is there), got {got}"
        )
    return rest, said["previous"], real_time.check_delay(said["delay"])


def _warn_of_unused(
    robot: robots.Robot, flat: Mapping[str, object], spelled: Mapping[str, str]
) -> None:
    used = {*spelled.values(), *robot.action_keys, *_BOOKKEEPING}
    if unused := sorted(set(flat) - used):
        progress.warn(
            f"the observation has {', '.join(map(repr, unused))}, which the policy of robot "
            f"{robot.name} does not use"
        )


def image(value: Any, key: str) -> UInt8[np.ndarray, "h w 3"]:
    """An image as uint8 with its colours last; `key` names it in errors."""
    found = _array(value, key)
    if found.ndim == 3 and found.shape[0] == 3 != found.shape[-1]:
        found = np.moveaxis(found, 0, -1)
    if found.ndim != 3 or found.shape[-1] != 3 or not found.size:
        raise ValueError(
            f"{key!r} must be one RGB image, (height, width, 3) or (3, height, width), got "
            f"{_encoded(value, found) or f'the shape {np.shape(value)}'}"
        )
    if np.issubdtype(found.dtype, np.floating):
        # As openpi rounds; so what a resize left just outside becomes the nearest byte.
        levels = 255 * found
        if not (levels.min() > -1 and levels.max() < 256):
            raise ValueError(
                f"{key!r} is a {found.dtype} image from {found.min():g} to {found.max():g}: "
                "floats must lie in [0, 1], or give the bytes as uint8"
            )
        found = levels.astype(np.uint8)
    if found.dtype != np.uint8:
        raise ValueError(f"{key!r} must be uint8, or floats in [0, 1], got {found.dtype}")
    return found


def _encoded(value: object, found: np.ndarray) -> str:
    """The form of an image that came as a file or text, and advice; empty for any other."""
    if isinstance(value, str):
        return "text: send the pixels as an array of uint8"
    content = value if isinstance(value, bytes) else b""
    if found.dtype == np.uint8 and found.size == max(found.shape, default=0):
        content = found.tobytes()
    kind = next((kind for start, kind in _FILES.items() if content.startswith(start)), "")
    if not kind and not isinstance(value, bytes):
        return ""
    file = f" of a {kind} file" if kind else ""
    return f"{len(content)} bytes{file}: decode it, and send the pixels as an array of uint8"


def _array(value: object, key: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        # Lists of unequal lengths, and tensors that are on a device or have gradients.
        raise ValueError(
            f"{key!r} must be an array of numbers, got a {type(value).__name__} that makes none: "
            f"{error}"
        ) from error


def _state(robot: robots.Robot, observation: Mapping[str, object]) -> dict[str, object]:
    """The vectors of the state by key, the state they make up checked as a whole."""
    for key in robot.state_keys:
        found = _array(observation[key], key)
        if found.dtype.kind not in "fiu" or found.ndim > 1:
            raise ValueError(
                f"{key!r} must be a vector of numbers, got {found.dtype} of shape {found.shape}"
            )
    named, state = robot.state_vector.named, robot.state(observation)
    if state.shape != (robot.state_dim,):
        raise ValueError(
            f"{named} must have {robot.state_dim} dimensions for robot {robot.name}, got the "
            f"shape {state.shape}; is this another robot's observation?"
        )
    if not np.isfinite(state).all():
        wrong = np.flatnonzero(~np.isfinite(state))
        places = [robot.state_vector.places[i] for i in wrong]
        raise ValueError(
            f"{named} is not finite: {state[wrong[0]]} in dimension {places}; the policy "
            "was not asked, because its actions would mean nothing"
        )
    return {key: np.asarray(observation[key], np.float32) for key in robot.state_keys}


def _prompt(value: object, key: str) -> str:
    # As openpi's policies take an array of one text, of any number of dimensions.
    text = value.item() if isinstance(value, np.ndarray | np.generic) and value.size == 1 else value
    if isinstance(text, bytes):  # As openpi's policy for DROID takes it.
        text = text.decode(errors="replace")
    if not isinstance(text, str):
        raise ValueError(f"{key!r} must be the instruction as a str, got {type(value).__name__}")
    return text
