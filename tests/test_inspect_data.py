"""The command shows what a run would train on, warns of what is wrong, and refuses in one line."""

import pathlib

import exact_stats
import numpy as np
import pytest
from PIL import Image

from shallow_pi import figures
from shallow_pi.checkpoints import weights
from shallow_pi.commands import inspect_data
from shallow_pi.data import sheet, sources
from shallow_pi.data.lerobot import reader
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.data.robots import normalize, robot, tokenizer

LONG = "open the top drawer, take the red cup out, put it onto the left plate and close the drawer"
PROMPTS = ("pick up the red cup", "open the top drawer", LONG)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.model"
    tokenizer.train(PROMPTS[:2], path, vocab_size=320)
    return path


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Makes a LIBERO dataset of three episodes."""

    def make(prompts=PROMPTS[:2], length=40, black=(), cameras=("image", "wrist_image")):
        generator = np.random.default_rng(0)
        folder = tmp_path_factory.mktemp("libero") / "dataset"
        with lerobot_writer.Writer(folder, 10) as writer:
            for episode in range(3):
                shape = (length, 24, 32, 3)
                images = {
                    key: generator.integers(0, 1 if key in black else 256, shape, np.uint8)
                    for key in cameras
                }
                state, actions = (generator.uniform(-1, 1, (length, dim)) for dim in (8, 7))
                vectors = {"state": state.astype(np.float32), "actions": actions.astype(np.float32)}
                writer.add(images, vectors, [prompts[episode % len(prompts)]] * length)
        return folder

    return make


@pytest.fixture(scope="module")
def dataset(record):
    return record()


@pytest.fixture
def run(command, words, tmp_path, monkeypatch):
    """Runs the command in an empty folder; gives its output and its warnings, or errors."""
    monkeypatch.chdir(tmp_path)

    def call(name, *arguments):
        # Small images, so that augmenting them is compiled and run quickly.
        small = ("--model.image-size", 28, "--data.tokenizer", words)
        return command(inspect_data, name, *small, *arguments)[1:]

    return call


def test_a_sound_dataset_is_shown_without_a_warning(run, dataset):
    out, err = run("pi05_libero_l6", "--data.path", dataset, "--data.norm-stats", "dataset")
    folder = pathlib.Path("data_sheets/pi05_libero_l6")
    for name in ("sheet.png", "histogram.png"):
        assert f"{folder / name}" in out
        with Image.open(folder / name) as image:
            assert min(image.size) > 200
    assert "warning" not in err
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[2:17]] == [
        *(f"state[{i}]" for i in range(8)),
        *(f"actions[{i}]" for i in range(7)),
    ]
    assert any(line.endswith("× pick up the red cup") for line in lines)
    assert "camera right_wrist_0_rgb is absent: black and masked" in lines
    assert "of 200 tokens" in out


def test_doubtful_data_are_warned_of(run, record):
    spoiled = record(prompts=(LONG,), length=20, black=("wrist_image",))
    _, err = run("pi0_libero_l6", "--data.path", spoiled, "--samples", 9, "--output", "here")
    for line in (
        "warning: 9 of 9 images of left_wrist_0_rgb are black",
        "warning: 9 of 9 prompts are longer than 48 tokens and are cut",
        "warning: all 9 prompts are equal: 'open the top drawer, take",
        "of the actions lie beyond an episode's end: episodes are short for chunks of 50",
    ):
        assert line in err
    assert (pathlib.Path("here") / "sheet.png").is_file()


def test_statistics_and_sizes_are_the_teachers_where_it_is_here(
    run, dataset, tiny_config, tiny_params, tmp_path
):
    teacher = tmp_path / "teacher"
    one, asset_id = (
        exact_stats.of(np.random.default_rng(0).uniform(-0.01, 0.01, (99, 8))),
        "physical-intelligence/libero",
    )
    normalize.save(teacher / "assets" / asset_id, {"state": one, "actions": one})
    arguments = ("--data.path", dataset, "--teacher.path", teacher)
    _, err = run("pi0_libero_l6", *arguments)  # Its assets alone are enough.
    assert f"Statistics: {teacher / 'assets' / asset_id / 'norm_stats.json'}" in err
    assert "not on this machine" not in err
    assert "after normalization (" in err
    assert "are the statistics of this robot, in these units?" in err
    model = tiny_config(depth=18, vocab_size=320, action_dim=32)
    weights.save_params(teacher / "params", tiny_params(model))
    _, err = run("pi0_libero_l6", *arguments)
    assert "image_size 28 → 24" in err
    # One that a run refuses is refused here: its statistics would be read in another normalization.
    assert "error: " in run("pi05_libero_l6", *arguments)[1]


def test_a_teacher_that_is_not_there_is_told(run, dataset, tmp_path):
    (tmp_path / "run" / "29999").mkdir(parents=True)
    arguments = ("--data.path", dataset, "--teacher.path")
    step = tmp_path / "run" / "29999"
    _, err = run("pi0_libero_l6", *arguments, tmp_path / "run")
    assert f"it holds the steps 29999: name one, such as {step}" in err
    _, err = run("pi0_libero_l6", *arguments, "run/29998", "--strict")
    said = "the teacher run/29998 is not on this machine: sizes are the config's and statistics the"
    assert said in err


def test_synthetic_samples_and_given_statistics_are_named(run, dataset):
    out, _ = run("debug", "--model.image-size", 24)
    assert "synthetic" in out
    found = sources.norm_stats([reader.Dataset(dataset)], robot.LIBERO, 10)
    normalize.save("own", found)
    out, err = run("pi05_libero_l6", "--data.path", dataset, "--data.norm-stats", "own")
    assert "Statistics: own" in err
    assert "warning" not in err


def test_without_matplotlib_the_sheet_is_written_and_a_note(run, dataset, monkeypatch):
    def missing(*_):
        raise figures.PlotsMissingError("figures need matplotlib: uv sync --extra plots")

    monkeypatch.setattr(sheet, "histograms", missing)
    out, err = run("pi05_libero_l6", "--data.path", dataset)
    assert "note: figures need matplotlib" in err
    assert out.splitlines()[-1].endswith("sheet.png")


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"cameras": ("image",)}, (), "lacks camera 'wrist_image'; it has ['image']"),
        ({}, ("--model.action-dim", 7), "state dimension 8, more than the model's action_dim 7"),
        ({}, ("--samples", 0), "expected at least one sample to look at, got 0"),
        ({}, ("--data.path", ""), "no dataset: name the folder"),
        ({}, ("--data.tokenizer", "absent"), "no SentencePiece model at absent"),
    ],
    ids=["camera", "dimension", "samples", "path", "tokenizer"],
)
def test_bad_input_is_reported_in_one_line(run, record, dataset, changes, arguments, message):
    path = record(length=4, **changes) if changes else dataset
    _, said = run("pi05_libero_l6", "--data.path", path, *arguments)
    assert message in said
    assert "Traceback" not in said
    assert not pathlib.Path("data_sheets").exists()


def test_an_unknown_name_brings_the_closest(run):
    out, err = run("pi05_libro_l6")
    assert "did you mean 'pi05_libero_l6'?" in " ".join((out + err).split())


def test_help_lists_the_configs(run):
    said, _ = run("--help")
    assert "uv run scripts/inspect_data.py NAME" in said
    assert "pi0_aloha_l6" in said
