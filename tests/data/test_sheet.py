"""The sheet shows the images the model gets, marks what is absent or cut, and is the run's."""

import builtins
import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image, ImageColor

from shallow_pi import figures
from shallow_pi.data import inspection, sheet, sources
from shallow_pi.data.lerobot import reader
from shallow_pi.data.robots import assets, robot
from shallow_pi.models import observation


@pytest.fixture(scope="module")
def own(tiny_config, tiny_dataset):
    dataset, words = tiny_dataset
    model = tiny_config(
        vocab_size=320, max_token_len=24, cameras=("base_0_rgb", "left_wrist_0_rgb", "other")
    )
    stats = sources.norm_stats([reader.Dataset(dataset)], robot.TURNTABLE, model.action_horizon)
    return assets.Assets(model, robot.TURNTABLE, words, stats, "turntable")


@pytest.fixture(scope="module")
def source(own, tiny_dataset):
    dataset = reader.Dataset(tiny_dataset[0])
    return sources.DatasetSource(dataset, own.robot, own.model.action_horizon, own.inputs())


@pytest.fixture(scope="module")
def samples(source, own):
    return inspection.draw(source, own, 8)


def test_without_augmentation_the_images_are_the_batchs(samples):
    """Enlarged without blur, so each of the model's pixels is a block."""
    image = sheet.sheet(samples, observation.NO_AUGMENTATION)
    block = 192 // 24
    left, top = sheet._GAP, 2 * sheet._LINE
    for column, camera in enumerate(("base_0_rgb", "left_wrist_0_rgb")):
        x = left + column * (192 + sheet._GAP)
        shown = image[top : top + 192 : block, x : x + 192 : block]
        np.testing.assert_array_equal(shown, samples.batch.observation.images[camera][0])


def test_an_absent_camera_is_not_shown_as_black(samples):
    assert not samples.batch.observation.images["other"].any()
    image = sheet.sheet(samples, observation.NO_AUGMENTATION)
    x = sheet._GAP + 2 * (192 + sheet._GAP)
    tile = image[2 * sheet._LINE :][:192, x : x + 192]
    assert np.median(tile) > 150


def test_augmentation_shows_and_depends_on_the_seed(samples):
    sheets = [
        sheet.sheet(samples, strength, seed)
        for strength, seed in (
            (observation.NO_AUGMENTATION, 0),
            (observation.Augmentation(), 0),
            (observation.Augmentation(), 0),
            (observation.Augmentation(), 1),
        )
    ]
    np.testing.assert_array_equal(sheets[1], sheets[2])
    assert not np.array_equal(sheets[0], sheets[1])
    assert not np.array_equal(sheets[1], sheets[3])


def test_what_is_doubtful_is_in_red(samples):
    red = np.array([0xC0, 0x39, 0x2B])

    def has_red(one):
        image = sheet.sheet(one, observation.NO_AUGMENTATION)
        below = image[2 * sheet._LINE + 6 * 200 :]  # Images have any colour.
        return (below == red).all(axis=-1).any()

    assert not has_red(samples)
    far = samples.batch.observation.replace(state=samples.batch.observation.state * 100)
    assert has_red(dataclasses.replace(samples, batch=samples.batch.replace(observation=far)))


def test_the_legend_has_the_colour_of_every_action_dimension(samples):
    image = sheet.sheet(samples, observation.NO_AUGMENTATION)
    legend = image[2 * sheet._LINE :, -sheet._LEGEND : -sheet._LEGEND + 10]
    shown = {tuple(pixel) for pixel in legend.reshape(-1, 3).tolist()}
    expected = [ImageColor.getrgb(color) for color in sheet._COLORS[:4]]
    assert [color in shown for color in expected] == [True, True, True, False]


def test_the_sheet_of_a_run_lies_in_its_folder(samples, tmp_path):
    drawn = sheet.write(tmp_path / "run" / "data_sheet.png", samples, observation.Augmentation())
    with Image.open(tmp_path / "run" / "data_sheet.png") as written:
        np.testing.assert_array_equal(np.asarray(written), drawn)
    assert drawn.dtype == np.uint8


def test_a_sheet_that_the_disk_has_no_room_for_leaves_the_one_before(samples, tmp_path, small_disk):
    path = tmp_path / "sheet.png"
    path.write_text("before")
    with small_disk(100), pytest.raises(OSError, match="File too large"):
        sheet.write(path, samples, observation.Augmentation())
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(path.name, "before")]


def test_synthetic_samples_have_a_sheet_too(tmp_path, tiny_config):
    made_up = sources.SyntheticSource(tiny_config(), length=3)
    path = tmp_path / "sheet.png"
    sheet.write(path, inspection.draw(made_up, None), observation.Augmentation())
    assert path.is_file()


def test_histograms_are_drawn_and_say_what_they_need(samples, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    spoiled = jax.tree.map(np.copy, samples.batch)
    spoiled.observation.state[0, 0] = np.nan
    for name, batch in (("sound", samples.batch), ("spoiled", spoiled)):
        sheet.histograms(tmp_path / f"{name}.png", dataclasses.replace(samples, batch=batch))
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 100
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(figures.PlotsMissingError, match="uv sync --extra plots"):
        sheet.histograms(tmp_path / "absent.png", samples)
    assert not (tmp_path / "absent.png").exists()
