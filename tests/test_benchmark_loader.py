"""The command measures every method on synthetic video and on a dataset, and marks slow ones."""

import json
import pathlib

import pytest

from shallow_pi.commands import benchmark_loader

ROOT = pathlib.Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "lerobot"


MADE_UP = ("--height", "48", "--width", "64", "--frames", "24", "--group", "2")
SMALL = [
    *("--image-size", "32", "--batch-size", "4", "--batches", "2"),
    *("--threads", "2", "--workers", "0", "--repeats", "2"),
]


def test_every_method_is_measured_on_synthetic_video(command, tmp_path):
    output = tmp_path / "new" / "numbers.json"
    asked = *SMALL, *MADE_UP, "--codec", "h264", "--step-ms", 100000, "--output", output
    _, shown, _ = command(benchmark_loader, *asked)
    assert "h264, group 2, images of 48 by 64" in shown
    assert shown.count("keeps up") == 5
    rows = json.loads(output.read_text())["rows"]
    assert list(rows) == [
        "PyAV, as it comes",
        "PyAV, decoders of one thread",
        "loader, 2 threads",
        "second epoch, memory, 2 threads",
        "second epoch, disk, 2 threads",
    ]
    for row in rows.values():
        assert len(row["all"]) == 2
        assert row["frames_per_second"] == pytest.approx(sum(row["all"]) / 2)
        assert row["batch_ms"] == pytest.approx(8000 / row["frames_per_second"])


def test_a_dataset_is_read_and_ways_that_are_too_slow_are_marked(command):
    path = "--path", FIXTURES / "pusht_v21_video", "--step-ms", "0.001"
    _, told, _ = command(benchmark_loader, *SMALL, "--repeats", "1", *path)
    assert told.count("too slow") == 5


def test_images_that_are_no_video_are_read_without_a_comparison(command):
    path = "--path", FIXTURES / "pusht_v30_image"
    _, told, _ = command(benchmark_loader, *SMALL, "--repeats", "1", *path)
    assert "loader, 2 threads" in told
    assert "PyAV, as it comes" not in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--path", "absent"], "absent: there is no such folder"),
        (
            ["--path", "x", "--height", "9"],
            "--height 9 has no effect: the images are those of --path x; give",
        ),
        (["--batches", "0"], "--batches must be at least 1, got 0"),
        (["--image-size", "0"], "--image-size must be at least 1, got 0"),
    ],
)
def test_bad_input_is_refused_in_one_line(command, arguments, message):
    assert message in command(benchmark_loader, *SMALL, *arguments)[2]
