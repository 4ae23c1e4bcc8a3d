"""The batched observation a policy sees, and the augmentation of its images.

Images travel as uint8 and become float32 in [-1, 1] on the device (`as_float`), before anything
is computed from them; `state` is normalized and padded to the model's action dimension.
`augment` follows openpi (models/model.py, preprocess_observation): jitter of colours on every
camera, a random crop and a small rotation on all but the wrist cameras. It is called once a step,
before either model runs, so that teacher and student see the same images.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Shaped

# An array: numpy's on the host, JAX's on devices, or one of their shapes (`batch.spec`).
AnyArray = Any


@flax.struct.dataclass
class Observation:
    """A batch of observations; every field has the leading axis b."""

    # Camera name → image, uint8 or in [-1, 1].
    images: dict[str, Shaped[AnyArray, "b h w 3"]]
    # Camera name → False where that camera is absent.
    image_masks: dict[str, Bool[AnyArray, " b"]]
    # Normalized robot state, zero-padded to the action dimension.
    state: Float[AnyArray, "b ad"]
    tokenized_prompt: Int[AnyArray, "b t"]
    tokenized_prompt_mask: Bool[AnyArray, "b t"]

    def as_float(self) -> "Observation":
        """The observation with its uint8 images in [-1, 1]; float ones are already."""
        return dataclasses.replace(
            self, images={name: _to_float(image) for name, image in self.images.items()}
        )


def _to_float(image: AnyArray) -> Float[AnyArray, "b h w 3"]:
    if image.dtype == jnp.uint8:
        return image.astype(jnp.float32) / 255.0 * 2.0 - 1.0
    return image


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Strength of the random changes to training images; the defaults are openpi's."""

    # Side of the random crop as a share of the image's (not on wrist cameras); 1 does not crop.
    crop: float = 0.95
    # Largest rotation in degrees, in either direction (not on wrist cameras).
    rotate_degrees: float = 5.0
    # Strength of the colour jitter; 0 turns that part off.
    brightness: float = 0.3
    contrast: float = 0.4
    saturation: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ValueError(f"augmentation.crop is a share in (0, 1], got {self.crop}.")
        for name in ("rotate_degrees", "brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(
                    f"augmentation.{name} must not be negative, got {getattr(self, name)}."
                )


def check(
    observation: Observation, cameras: Sequence[str], image_size: int, action_dim: int
) -> None:
    """Raise unless the observation has these cameras at this size and a padded state."""
    missing = [name for name in cameras if name not in observation.images]
    if missing:
        raise ValueError(
            f"the model has the cameras {list(cameras)}, the observation lacks {missing}; "
            f"it has {sorted(observation.images)}."
        )
    for name in cameras:
        size = observation.images[name].shape[1:3]
        if size != (image_size, image_size):
            raise ValueError(
                f"images of {name} must be {image_size}×{image_size} pixels, got "
                f"{size[0]}×{size[1]}; resize them in the input transforms."
            )
        if observation.images[name].dtype == jnp.uint8:
            raise ValueError(f"images of {name} must lie in [-1, 1], got uint8: call as_float.")
    if observation.state.shape[-1] != action_dim:
        raise ValueError(
            f"state must be padded to action_dim {action_dim}, got "
            f"{observation.state.shape[-1]} dimensions."
        )


NO_AUGMENTATION = Augmentation(
    crop=1.0, rotate_degrees=0.0, brightness=0.0, contrast=0.0, saturation=0.0
)


def augment(
    key: Key[Array, ""] | Array, observation: Observation, augmentation: Augmentation
) -> Observation:
    """Vary the images of a batch, each sample and camera on its own."""
    images = {}
    for index, (name, image) in enumerate(sorted(observation.images.items())):
        keys = jax.random.split(jax.random.fold_in(key, index), image.shape[0])
        moves = "wrist" not in name
        images[name] = jax.vmap(lambda k, x, m=moves: _augment_one(k, x, augmentation, m))(
            keys, image
        )
    return dataclasses.replace(observation, images=images)


def _augment_one(
    key: Array, image: Float[Array, "h w 3"], augmentation: Augmentation, moves: bool
) -> Float[Array, "h w 3"]:
    move_key, jitter_key = jax.random.split(key)
    image = image / 2.0 + 0.5
    if moves and (augmentation.crop < 1 or augmentation.rotate_degrees > 0):
        image = _crop_and_rotate(move_key, image, augmentation)
    image = _jitter(jitter_key, image, augmentation)
    return jnp.clip(image, 0.0, 1.0) * 2.0 - 1.0


def _crop_and_rotate(
    key: Array, image: Float[Array, "h w 3"], augmentation: Augmentation
) -> Float[Array, "h w 3"]:
    """Crop, resize back and rotate about the centre in one bilinear resampling."""
    height, width, _ = image.shape
    shift_key, angle_key = jax.random.split(key)
    slack = (1.0 - augmentation.crop) / 2.0
    shift = jax.random.uniform(shift_key, (2,), minval=-slack, maxval=slack)
    limit = jnp.deg2rad(augmentation.rotate_degrees)
    angle = jax.random.uniform(angle_key, (), minval=-limit, maxval=limit)
    rows = jnp.arange(height) - (height - 1) / 2.0
    columns = jnp.arange(width) - (width - 1) / 2.0
    y, x = jnp.meshgrid(rows, columns, indexing="ij")
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    source_y = (cos * y - sin * x) * augmentation.crop + shift[0] * height + (height - 1) / 2.0
    source_x = (sin * y + cos * x) * augmentation.crop + shift[1] * width + (width - 1) / 2.0

    def resample(channel: Float[Array, "h w"]) -> Float[Array, "h w"]:
        return jax.scipy.ndimage.map_coordinates(
            channel, [source_y, source_x], order=1, mode="nearest"
        )

    return jax.vmap(resample, in_axes=-1, out_axes=-1)(image)


def _jitter(
    key: Array, image: Float[Array, "h w 3"], augmentation: Augmentation
) -> Float[Array, "h w 3"]:
    def factor(index: int, strength: float) -> Array:
        return 1.0 + jax.random.uniform(
            jax.random.fold_in(key, index), (), minval=-strength, maxval=strength
        )

    grey_weights = jnp.array([[[0.299, 0.587, 0.114]]])
    image = image * factor(0, augmentation.brightness)
    mean = jnp.mean(jnp.sum(image * grey_weights, axis=-1))
    image = (image - mean) * factor(1, augmentation.contrast) + mean
    grey = jnp.sum(image * grey_weights, axis=-1, keepdims=True)
    return (image - grey) * factor(2, augmentation.saturation) + grey
