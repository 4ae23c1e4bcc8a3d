"""Observations, and the augmentation of their images."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.models import observation as observations

STILL = observations.NO_AUGMENTATION


def _observation(images):
    b = next(iter(images.values())).shape[0]
    return observations.Observation(
        images={name: jnp.asarray(image, jnp.float32) for name, image in images.items()},
        image_masks={name: jnp.ones(b, bool) for name in images},
        state=jnp.zeros((b, 4)),
        tokenized_prompt=jnp.zeros((b, 3), jnp.int32),
        tokenized_prompt_mask=jnp.ones((b, 3), bool),
    )


def _augment(images, seed=0, **changes):
    observation = _observation(images)
    augmentation = dataclasses.replace(STILL, **changes)
    augmented = observations.augment(jax.random.key(seed), observation, augmentation)
    return {name: np.asarray(image) for name, image in augmented.images.items()}


def _noise(b=3, size=16, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (b, size, size, 3)).astype(np.float32)


def _ramp(b=64, size=20):
    """Brightness rises along the columns by 0.02 a pixel."""
    row = 0.02 * (np.arange(size) - (size - 1) / 2)
    return np.broadcast_to(row[None, None, :, None], (b, size, size, 3))


def test_bytes_become_floats_between_minus_one_and_one():
    images = {"base_0_rgb": jnp.array([[[[0, 51, 255]]]], jnp.uint8)}
    seen = _observation(images).replace(images=images).as_float()
    values = seen.images["base_0_rgb"]
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values[0, 0, 0], [-1.0, -0.6, 1.0], atol=1e-6)
    np.testing.assert_array_equal(seen.as_float().images["base_0_rgb"], values)


def test_no_augmentation_changes_nothing(strict):
    images = {"base_0_rgb": _noise()}
    np.testing.assert_allclose(_augment(images)["base_0_rgb"], images["base_0_rgb"], atol=1e-6)


def test_augmentation_is_repeatable_and_differs_between_samples_and_keys():
    images = {"base_0_rgb": np.repeat(_noise(1), 2, 0)}
    varied = dataclasses.asdict(observations.Augmentation())
    one = _augment(images, **varied)["base_0_rgb"]
    np.testing.assert_array_equal(one, _augment(images, **varied)["base_0_rgb"])
    assert np.abs(one[0] - one[1]).max() > 0.05
    assert np.abs(one - _augment(images, seed=1, **varied)["base_0_rgb"]).max() > 0.05
    assert np.abs(one).max() <= 1.0


def test_wrist_cameras_do_not_move():
    images = {"base_0_rgb": _noise(), "left_wrist_0_rgb": _noise(seed=1)}
    moved = _augment(images, crop=0.8, rotate_degrees=10.0)
    np.testing.assert_allclose(moved["left_wrist_0_rgb"], images["left_wrist_0_rgb"], atol=1e-6)
    assert np.abs(moved["base_0_rgb"] - images["base_0_rgb"]).max() > 0.1


def test_a_crop_magnifies_and_stays_inside():
    cropped = _augment({"base_0_rgb": _ramp()}, crop=0.5)["base_0_rgb"][..., 0]
    slope = np.diff(cropped[:, 10, 5:15], axis=1)
    np.testing.assert_allclose(slope, 0.5 * 0.02, atol=1e-5)
    # The centre of the crop wanders a quarter of the image either way: ±5 pixels of 0.02.
    centre = cropped[:, 10, 9:11].mean(axis=1)
    assert np.abs(centre).max() <= 5 * 0.02 + 1e-5
    assert centre.min() < -0.07
    assert centre.max() > 0.07


def test_a_rotation_turns_by_no_more_than_its_limit():
    turned = _augment({"base_0_rgb": _ramp()}, rotate_degrees=5.0)["base_0_rgb"][..., 0]
    dy = (turned[:, 14, 10] - turned[:, 6, 10]) / 8
    dx = (turned[:, 10, 14] - turned[:, 10, 6]) / 8
    np.testing.assert_allclose(np.hypot(dy, dx), 0.02, atol=1e-5)
    degrees = np.rad2deg(np.arctan2(dy, dx))
    assert np.abs(degrees).max() <= 5.01
    assert degrees.min() < -3
    assert degrees.max() > 3


def test_jitter_scales_brightness_contrast_and_saturation():
    images = 0.1 * _noise(32) - 0.3  # Grey enough never to be clipped.
    light = images / 2 + 0.5

    def jittered(**changes):
        return _augment({"base_0_rgb": images}, **changes)["base_0_rgb"] / 2 + 0.5

    def grey(images):
        return images @ np.array([0.299, 0.587, 0.114])

    ratio = jittered(brightness=0.3) / light
    np.testing.assert_allclose(ratio, ratio[:, :1, :1, :1] * np.ones_like(ratio), rtol=1e-4)
    assert 0.7 <= ratio.min() < 0.8
    assert 1.2 < ratio.max() <= 1.3
    contrast = jittered(contrast=0.4)
    np.testing.assert_allclose(grey(contrast).mean((1, 2)), grey(light).mean((1, 2)), rtol=1e-4)
    assert np.std(contrast.std((1, 2, 3)) / light.std((1, 2, 3))) > 0.1
    saturation = jittered(saturation=0.5)
    np.testing.assert_allclose(grey(saturation), grey(light), atol=1e-5)
    assert np.abs(saturation - light).max() > 0.02


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": 0.0}, r"augmentation.crop is a share in \(0, 1\], got 0.0"),
        ({"crop": 1.5}, r"got 1.5"),
        ({"rotate_degrees": -1.0}, "augmentation.rotate_degrees must not be negative, got -1.0"),
        ({"saturation": -0.1}, "augmentation.saturation must not be negative"),
    ],
)
def test_a_bad_augmentation_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        observations.Augmentation(**changes)


@pytest.mark.parametrize(
    ("cameras", "size", "action_dim", "message"),
    [
        (["base_0_rgb", "left_wrist_0_rgb"], 16, 4, r"lacks \['left_wrist_0_rgb'\]; it has"),
        (["base_0_rgb"], 24, 4, "must be 24×24 pixels, got 16×16"),
        (["base_0_rgb"], 16, 32, "padded to action_dim 32, got 4 dimensions"),
    ],
)
def test_an_observation_of_another_model_raises(cameras, size, action_dim, message):
    with pytest.raises(ValueError, match=message):
        observations.check(_observation({"base_0_rgb": _noise()}), cameras, size, action_dim)
