"""Images resized by matrix products are Pillow's within one grey level."""

import jax
import numpy as np
import pytest

from shallow_pi.data.robots import transforms
from shallow_pi.inference import resize


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (480, 640, 224),
        (96, 128, 64),
        (128, 96, 64),
        (24, 24, 32),
        (30, 17, 32),
        (64, 200, 64),
        (1, 200, 64),
        (33, 32, 32),
        (32, 32, 32),
    ],
)
def test_resized_images_are_pillows(height, width, size):
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (height, width, 3), np.uint8)
    ramp = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    images = np.stack([noise, ramp.astype(np.uint8), np.full_like(noise, 255)])
    found = np.asarray(jax.jit(resize.resize_with_pad, static_argnums=1)(images, size))
    expected = np.stack([transforms.resize_with_pad(one, size) for one in images])
    assert found.shape == expected.shape == (3, size, size, 3)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.03
