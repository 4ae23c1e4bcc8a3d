"""Transforms by hand on small samples; inverses invert; missing keys are named."""

import exact_stats
import numpy as np
import pytest
from PIL import Image

from shallow_pi.data.robots import normalize, transforms


def _image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_compose_applies_left_to_right() -> None:
    double = transforms.compose(lambda s: {"x": s["x"] * 2}, lambda s: {"x": s["x"] + 1})
    assert double({"x": 5}) == {"x": 11}


def test_repack_renames_and_drops_the_rest() -> None:
    sample = transforms.Repack({"a": "x", "b": "y"}, optional=("b",))({"x": 1, "z": 3})
    assert sample == {"a": 1}
    with pytest.raises(ValueError, match=r"sample lacks \['y'\].*got \['x'\]"):
        transforms.Repack({"a": "x", "b": "y"})({"x": 1})


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


@pytest.mark.parametrize("kind", ["z_score", "quantile"])
def test_unnormalize_inverts_normalize_and_leaves_other_keys(kind: normalize.Kind) -> None:
    values = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32)
    stats = {"state": exact_stats.of(values), "actions": exact_stats.of(values * 3)}
    sample = {"state": values[0], "actions": values[:5] * 3, "prompt": "go"}
    forward = transforms.Normalize(stats, kind)(sample)
    back = transforms.Unnormalize(stats, kind)(forward)
    assert not np.allclose(forward["state"], sample["state"])
    np.testing.assert_allclose(back["state"], sample["state"], atol=1e-5)
    np.testing.assert_allclose(back["actions"], sample["actions"], atol=1e-5)
    assert forward["prompt"] == "go"


def test_cut_inverts_pad() -> None:
    actions = np.ones((5, 3), np.float32)
    padded = transforms.PadDimensions(8)({"state": np.ones(3), "actions": actions})
    assert padded["state"].tolist() == [1, 1, 1, 0, 0, 0, 0, 0]
    assert padded["actions"].shape == (5, 8)
    np.testing.assert_array_equal(transforms.CutDimensions(3)(padded)["actions"], actions)


def test_pad_refuses_more_dimensions_than_the_model_has() -> None:
    with pytest.raises(ValueError, match="actions has 14 dimensions but the model's action_dim is"):
        transforms.PadDimensions(8)({"actions": np.zeros((5, 14))})
