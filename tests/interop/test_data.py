"""openpi's own dataset and transforms as a source of ours, against our reader and robots."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import stand_in_lerobot
import stand_ins

stand_ins.install()

# ruff: noqa: E402 (openpi comes after the stand-ins)
import lerobot.common.datasets.lerobot_dataset as lerobot_dataset
from openpi import transforms as openpi_transforms
from openpi.models import gemma as openpi_gemma
from openpi.training import config as openpi_config

from shallow_pi.commands import inspect_data
from shallow_pi.data import loader, opening
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.data.robots import normalize
from shallow_pi.data.robots import robot as robots
from shallow_pi.interop import openpi as interop
from shallow_pi.interop import openpi_configs, openpi_data
from shallow_pi.models import pi0
from shallow_pi.training import config

MODEL = pi0.Pi0Config(pi05=True, action_horizon=10, max_token_len=200)
REPO = "physical-intelligence/libero"
PROMPTS = ("fold the towel", "touch the red block")


@pytest.fixture(scope="module")
def home(tmp_path_factory, data_home):
    """LIBERO in miniature where LeRobot would keep it; three episodes of 6, 7 and 8 frames."""
    folder = tmp_path_factory.mktemp("lerobot")
    rng = np.random.default_rng(0)
    (folder / REPO).parent.mkdir(parents=True)
    with lerobot_writer.Writer(folder / REPO, 10) as writer:
        for episode, length in enumerate((6, 7, 8)):
            pixels = rng.integers(0, 256, (2, length, 32, 32, 3), np.uint8)
            vectors = {
                "state": rng.normal(size=(length, 8)).astype(np.float32),
                "actions": rng.normal(size=(length, 7)).astype(np.float32),
            }
            images = {"image": pixels[0], "wrist_image": pixels[1]}
            writer.add(images, vectors, [PROMPTS[episode % 2]] * length)
    return folder


@pytest.fixture(autouse=True)
def reader(monkeypatch, home, tmp_path):
    """openpi finds the dataset by its name, and runs write their statistics aside."""
    monkeypatch.setenv("HF_LEROBOT_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    for name in ("LeRobotDataset", "LeRobotDatasetMetadata"):
        monkeypatch.setattr(lerobot_dataset, name, getattr(stand_in_lerobot, name))


@pytest.fixture
def teacher(tmp_path):
    """A step folder with statistics."""
    rng = np.random.default_rng(1)

    def stats(dim):
        low = rng.uniform(-2, -1, dim)
        return normalize.NormStats(rng.normal(size=dim), np.ones(dim), low, low + 3)

    both = {"state": stats(8), "actions": stats(7)}
    normalize.save(tmp_path / "teacher" / "assets" / REPO, both)
    return tmp_path / "teacher"


def _data(name="pi05_libero", **changes):
    data = openpi_configs.experiment(name).data
    tokenizer = "gs://big_vision/paligemma_tokenizer.model"
    return dataclasses.replace(data, tokenizer=tokenizer, **changes)


def _close(a, b):
    def close(one, other):
        # openpi cuts k / 255 · 255 off to whole numbers, which may be k − 1.
        atol = {"uint8": 1, "float32": 1e-5}.get(one.dtype.name, 0)
        difference = np.abs(np.subtract(one, other, dtype=np.float64))
        assert (difference <= atol + 1e-5 * np.abs(other) * (one.dtype == np.float32)).all()

    jax.tree.map(close, a, b)


def test_openpis_samples_are_those_of_our_reader_and_robot(home, teacher):
    theirs = opening.open_data(_data(), MODEL, teacher)
    ours = opening.open_data(
        _data(source="lerobot", path=str(home / REPO), robot="libero"), MODEL, teacher
    )
    assert len(theirs.train) == len(ours.train) == 21
    for i in (0, 5, 6, 20):
        _close(theirs.train[i], ours.train[i])
    assert theirs.assets.robot == robots.LIBERO


def test_held_out_episodes_are_those_of_our_reader(home, teacher):
    theirs = opening.open_data(_data(held_out=0.3), MODEL, teacher)
    ours = opening.open_data(
        _data(source="lerobot", path=str(home / REPO), robot="libero", held_out=0.3), MODEL, teacher
    )
    assert len(theirs.train) + len(theirs.held_out) == 21
    assert len(theirs.held_out) == len(ours.held_out)
    _close(theirs.held_out[0], ours.held_out[0])
    _close(theirs.train[len(theirs.train) - 1], ours.train[len(ours.train) - 1])


def test_batches_of_openpis_samples_resume(teacher):
    source = opening.open_data(_data(), MODEL, teacher).train
    first = loader.Loader(source, 4, seed=3)
    next(first)
    position, expected = first.state(), next(first)
    second = loader.Loader(source, 4, seed=3)
    second.restore(position)
    np.testing.assert_array_equal(next(second).actions, expected.actions)


def test_a_config_of_ones_own_transforms_is_taken_over_with_openpis_loader(
    monkeypatch, home, teacher
):
    """No robot of ours subsamples actions; openpi's own code does it, and serves it."""
    source = openpi_config.get_config("pi05_libero")
    factory = openpi_config.SimpleDataConfig(
        repo_id=REPO,
        assets=openpi_config.AssetsConfig(asset_id=REPO),
        data_transforms=lambda model: openpi_transforms.Group(
            inputs=[
                openpi_transforms.RepackTransform(
                    {
                        "image": {"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"},
                        "state": "state",
                        "actions": "actions",
                        "prompt": "prompt",
                    }
                ),
                _Mine(),
            ]
        ),
        base_config=openpi_config.DataConfig(prompt_from_task=True),
    )
    mine = dataclasses.replace(source, name="pi05_mine", data=factory)
    monkeypatch.setitem(openpi_config._CONFIGS_DICT, "pi05_mine", mine)
    experiment = openpi_configs.experiment("pi05_mine")
    found = opening.open_data(
        dataclasses.replace(experiment.data, tokenizer="gs://big_vision/paligemma_tokenizer.model"),
        MODEL,
        teacher,
    )
    plain = opening.open_data(_data(), MODEL, teacher)
    seen, expected = found.train[0].observation, plain.train[0].observation
    np.testing.assert_allclose(seen.state, expected.state, rtol=1e-5, atol=1e-5)
    assert not seen.image_masks["right_wrist_0_rgb"]
    robot = found.assets.robot
    assert (robot.state_dim, robot.action_dim, robot.fps) == (8, 7, 10)
    with pytest.raises(ValueError, match=r"pi05_mine.*scripts/serve_openpi\.py"):
        found.assets.inputs()
    # Its student speaks as that config does, at its own depth.
    sizes = {"depth": 6, "vocab_size": openpi_gemma.PALIGEMMA_VOCAB_SIZE}
    student = interop.train_config("student", dataclasses.replace(MODEL, **sizes), robot, REPO)
    made = student.data.create(student.assets_dirs, student.model)
    assert made.data_transforms.inputs[-1] == _Mine()
    assert (student.name, student.model.sizes.depth, made.asset_id) == ("student", 6, REPO)


@dataclasses.dataclass(frozen=True)
class _Mine(openpi_transforms.DataTransformFn):
    """Images with channels last, a black third camera, masks."""

    def __call__(self, data):
        image = {
            name: (255 * np.moveaxis(np.asarray(pixels), 0, -1)).astype(np.uint8)
            for name, pixels in data["image"].items()
        }
        image["right_wrist_0_rgb"] = np.zeros_like(image["base_0_rgb"])
        mask = {name: np.bool_(name != "right_wrist_0_rgb") for name in image}
        return {**data, "image": image, "image_mask": mask}


def test_statistics_are_asked_for_where_there_are_none():
    with pytest.raises(FileNotFoundError, match=r"compute_norm_stats\.py, or .*--data\.norm-stats"):
        opening.open_data(_data(), MODEL, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"base_config": openpi_config.DataConfig()},  # Its prompt is the task's otherwise.
            rf"does not fit frame 0 of {REPO} \(KeyError: 'prompt'\); the frame has actions,",
        ),
        (
            {"repo_id": "me/absent"},
            "LeRobot cannot open me/absent, the dataset of openpi's config mine",
        ),
    ],
)
def test_a_config_that_does_not_fit_its_recordings_is_refused(monkeypatch, teacher, changes, said):
    source = openpi_config.get_config("pi05_libero")
    factory = dataclasses.replace(source.data, **changes)
    mine = dataclasses.replace(source, name="mine", data=factory)
    monkeypatch.setitem(openpi_config._CONFIGS_DICT, "mine", mine)
    with pytest.raises(ValueError, match=said):
        opening.open_data(_data("mine", asset_id=REPO), MODEL, teacher)


def test_another_horizon_than_openpis_config_has_is_refused(teacher):
    model = dataclasses.replace(MODEL, action_horizon=12)
    with pytest.raises(ValueError, match=r"pi05_libero, 10, and --model\.action-horizon is 12"):
        opening.open_data(_data(), model, teacher)


def test_what_openpis_loader_gives_can_be_inspected(teacher, capsys):
    tokens = ("--data.tokenizer", "gs://big_vision/paligemma_tokenizer.model")
    small = ("--teacher.path", str(teacher), "--samples", "2", *tokens)
    inspect_data.main(["--openpi.config", "pi05_libero", *small])
    said = capsys.readouterr().out
    assert any(prompt in said for prompt in PROMPTS)
    assert pathlib.Path("data_sheets/pi05_libero_l6/sheet.png").is_file()


def test_a_folder_needs_our_reader(home, teacher):
    with pytest.raises(ValueError, match=r"--data\.source lerobot"):
        opening.open_data(_data(path=str(home / REPO)), MODEL, teacher)


def test_without_lerobot_our_reader_is_taken(monkeypatch):
    monkeypatch.setattr(openpi_data, "obstacle", lambda _: "no lerobot")
    data = openpi_configs.experiment("pi05_libero").data
    assert (data.source, data.path, data.robot) == ("lerobot", "", "libero")


def test_every_saved_config_is_plain(teacher):
    """The experiment goes into config.json: its data are text and numbers."""
    experiment = openpi_configs.experiment("pi05_libero")
    assert isinstance(experiment, config.DistillConfig)
    assert experiment.data.source == openpi_data.SOURCE
    assert pathlib.Path(experiment.data.path).name == "pi05_libero"
