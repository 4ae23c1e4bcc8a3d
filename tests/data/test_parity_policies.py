"""Our pipelines are openpi's policies: recorded with openpi itself (tests/interop)."""

import pathlib

import numpy as np
import openpi_policies as cases
import pytest

from shallow_pi.data.robots import normalize, pipelines, tokenizer
from shallow_pi.data.robots import robot as robots

RECORDED = pathlib.Path(__file__).with_name("openpi_policies.npz")
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    tokenizer.train(["fold the towel"], path)
    return tokenizer.Tokenizer(path, 48)


@pytest.fixture(scope="module")
def recorded():
    return dict(np.load(RECORDED))


def _close(found, expected):
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("name", "pi05"), cases.CASES)
def test_inputs_and_outputs_are_openpis(name, pi05, seed, tokens, recorded):
    robot, kind = robots.find(name), "quantile" if pi05 else "z_score"
    stats = {key: normalize.NormStats(**value) for key, value in cases.stats(robot).items()}
    recording = cases.recording(robot, seed)
    sample = pipelines.inputs(
        robot,
        cameras=CAMERAS,
        image_size=cases.IMAGE_SIZE,
        action_dim=cases.ACTION_DIM,
        tokenizer=tokens,
        stats=stats,
        kind=kind,
    )(recording)
    prefix = f"{name}/{'pi05' if pi05 else 'pi0'}/{seed}/"
    expected = {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}
    _close(sample["state"], expected["state"])
    _close(sample["actions"], expected["actions"])
    masks = [sample["image_mask"][camera] for camera in CAMERAS]
    np.testing.assert_array_equal(masks, expected["mask"])
    for camera, image in zip(CAMERAS, expected["images"], strict=True):
        np.testing.assert_array_equal(sample["image"][camera], image)
    acted = pipelines.outputs(robot, stats=stats, kind=kind)(
        {"actions": cases.model_actions(robot, seed), "state": robot.state(recording)}
    )
    _close(acted["actions"], expected["robot_actions"])
