"""Transforms by hand on small samples; inverses invert; missing keys are named."""

import numpy as np
import pytest
from PIL import Image

from shallow_pi.data.robots import transforms


def _image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_camera_the_robot_lacks_is_black_and_masked() -> None:
    image = _image(4, 6)
    cameras = transforms.Cameras(("base_0_rgb", "right_wrist_0_rgb"), {"base_0_rgb": "top"}, 8)
    sample = cameras({"top": image, "state": 1})
    np.testing.assert_array_equal(sample["image"]["base_0_rgb"], image)
    np.testing.assert_array_equal(
        sample["image"]["right_wrist_0_rgb"], np.zeros((8, 8, 3), np.uint8)
    )
    assert sample["image_mask"] == {"base_0_rgb": True, "right_wrist_0_rgb": False}
    assert sample["state"] == 1
    assert "top" not in sample


def test_camera_missing_from_the_sample_is_named() -> None:
    cameras = transforms.Cameras(("base_0_rgb",), {"base_0_rgb": "observation.images.top"}, 8)
    message = r"lacks camera 'observation.images.top' \(for base_0_rgb\).*'observation.images.side'"
    with pytest.raises(ValueError, match=message):
        cameras({"observation.images.side": _image(8, 8)})
    with pytest.raises(ValueError, match=r"must be a uint8 image .* got float64 \(8, 8, 3\)"):
        cameras({"observation.images.top": np.zeros((8, 8, 3))})


def test_resize_keeps_proportions_and_pads_with_black() -> None:
    wide = np.full((10, 20, 3), 200, np.uint8)
    resized = transforms.resize_with_pad(wide, 8)
    assert resized.shape == (8, 8, 3)
    np.testing.assert_array_equal(resized[:2], 0)
    np.testing.assert_array_equal(resized[2:6], 200)
    np.testing.assert_array_equal(resized[6:], 0)


def test_resize_is_pils_bilinear_and_the_identity_at_the_same_size() -> None:
    image = _image(16, 16)
    expected = np.asarray(Image.fromarray(image).resize((8, 8), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(transforms.resize_with_pad(image, 8), expected)
    assert transforms.resize_with_pad(image, 16) is image


def test_pad_refuses_more_dimensions_than_the_model_has() -> None:
    with pytest.raises(ValueError, match="actions has 14 dimensions but the model's action_dim is"):
        transforms.PadDimensions(8)({"actions": np.zeros((5, 14))})
