"""Small pure transforms from sample to sample, and their inverses.

A sample is a plain dict without batch axis. Robot side: LeRobot's flat keys. Model side: `image`
and `image_mask` (dicts by model camera), `state`, `prompt`, in training also `actions` and
`action_mask`. Every transform is a frozen dataclass that returns a new dict; unknown keys pass
through, and `actions` may be missing (inference).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from shallow_pi import progress
from shallow_pi.data.robots import normalize, tokenizer
from shallow_pi.inference import resize

Sample = dict[str, Any]
Transform = Callable[[Sample], Sample]


@dataclasses.dataclass(frozen=True)
class Composed:
    """Transforms that are applied from left to right."""

    parts: tuple[Transform, ...]

    def __call__(self, sample: Sample) -> Sample:
        for part in self.parts:
            sample = part(sample)
        return sample


@dataclasses.dataclass(frozen=True)
class Cameras:
    """Collect images under `image` by model camera; `keys` maps model camera to sample key.

    A model camera that no key is given for becomes a black image with mask False.
    """

    cameras: tuple[str, ...]
    keys: Mapping[str, str]
    image_size: int

    def __call__(self, sample: Sample) -> Sample:
        missing = [
            f"{key!r} (for {camera})"
            for camera, key in self.keys.items()
            if camera in self.cameras and key not in sample
        ]
        if missing:
            there = sorted(key for key in sample if "image" in key)
            raise ValueError(f"sample lacks camera {', '.join(missing)}; images there: {there}")
        black = np.zeros((self.image_size, self.image_size, 3), np.uint8)
        used = set(self.keys.values())
        return {
            **{key: value for key, value in sample.items() if key not in used},
            "image": {
                camera: _image(sample[self.keys[camera]], self.keys[camera])
                if camera in self.keys
                else black
                for camera in self.cameras
            },
            "image_mask": {camera: np.bool_(camera in self.keys) for camera in self.cameras},
        }


def _image(value: object, key: str) -> np.ndarray:
    image = np.asarray(value)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"{key!r} must be a uint8 image (height, width, 3), got {image.dtype} {image.shape}"
        )
    return image


@dataclasses.dataclass(frozen=True)
class Resize:
    """Resize every image to a square of `size`, keeping its proportions, padded with black."""

    size: int

    def __call__(self, sample: Sample) -> Sample:
        images = {name: resize_with_pad(x, self.size) for name, x in sample["image"].items()}
        return {**sample, "image": images}


def resize_with_pad(image: UInt8[np.ndarray, "h w 3"], size: int) -> UInt8[np.ndarray, "s s 3"]:
    """PIL bilinear, rounded as openpi's client rounds; the same array if the size fits."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    new_height, new_width = resize.fit(height, width, size)
    scaled = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    padded = np.zeros((size, size, 3), np.uint8)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    padded[top : top + new_height, left : left + new_width] = np.asarray(scaled)
    return padded


@dataclasses.dataclass(frozen=True, eq=False)
class Normalize:
    """Physical units to the model's scale for every key of `stats` that is there.

    A `state` is made steady first (`normalize.steady`).
    """

    stats: Mapping[str, normalize.NormStats]
    kind: normalize.Kind

    def __call__(self, sample: Sample) -> Sample:
        if "state" in sample and "state" in self.stats:
            sample = {**sample, "state": normalize.steady(sample["state"], self.stats["state"])}
        there = {key: own for key, own in self.stats.items() if key in sample}
        scaled = {k: normalize.normalize(sample[k], own, self.kind) for k, own in there.items()}
        return {**sample, **scaled}


def delta(
    actions: Float[np.ndarray, "*n ah rd"],
    state: Float[np.ndarray, "*n sd"],
    mask: tuple[bool, ...],
) -> Float[np.ndarray, "*n ah rd"]:
    """Actions minus state in the dimensions of `mask`, which lead in both."""
    width = len(mask)
    if width > min(actions.shape[-1], state.shape[-1]):
        raise ValueError(
            f"delta actions in {width} dimensions need as many in state and actions, got "
            f"{state.shape[-1]} and {actions.shape[-1]}"
        )
    shift = np.zeros((*state.shape[:-1], 1, actions.shape[-1]), np.float32)
    shift[..., 0, :width] = np.where(mask, state[..., :width], 0)
    return np.asarray(actions, np.float32) - shift


@dataclasses.dataclass(frozen=True)
class TokenizePrompt:
    """Replace `prompt` by tokens; with `discrete_state` the normalized state goes into the text."""

    tokenizer: tokenizer.Tokenizer
    discrete_state: bool = False

    def __call__(self, sample: Sample) -> Sample:
        rest = {key: value for key, value in sample.items() if key != "prompt"}
        if "prompt" not in sample:
            raise ValueError(f"sample has no 'prompt'; got {sorted(sample)}")
        prompt = sample["prompt"]
        if not isinstance(prompt, str):
            raise ValueError(
                f"the instruction must be a str, got {type(prompt).__name__} ({prompt!r}): name it "
                "in the recording, or give the robot a fixed prompt"
            )
        if not prompt.strip():
            progress.warn("an instruction is empty: the policy is not told what to do")
        state = sample["state"] if self.discrete_state else None
        tokens, mask = self.tokenizer.tokenize(prompt, state)
        return {**rest, "tokenized_prompt": tokens, "tokenized_prompt_mask": mask}


@dataclasses.dataclass(frozen=True)
class PadDimensions:
    """Zero-pad the last axis of `state` and `actions` to the model's action dimension."""

    dim: int

    def __call__(self, sample: Sample) -> Sample:
        there = [key for key in ("state", "actions") if key in sample]
        return {**sample, **{key: _pad_last(sample[key], self.dim, key) for key in there}}


def _pad_last(value: np.ndarray, dim: int, what: str) -> np.ndarray:
    """Zero-pad the last axis to `dim`, as float32."""
    value = np.asarray(value, np.float32)
    if value.shape[-1] > dim:
        raise ValueError(
            f"{what} has {value.shape[-1]} dimensions but the model's action_dim is {dim}; "
            "use a model with a larger action_dim or select fewer dimensions"
        )
    return np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, dim - value.shape[-1])])
