"""`make_demonstrations` writes a readable dataset; wrong arguments are refused first."""

import numpy as np
import pytest

from shallow_pi.commands import make_demonstrations
from shallow_pi.data.lerobot import reader


def test_the_dataset_reads_back_with_its_robot_and_tasks(command, tmp_path):
    target = tmp_path / "demos"
    options = "--sim", "turntable", "--option", "tasks=touch", "image_size=16"
    asked = *options, "--episodes", 2, "--workers", 1, "--output", target
    assert command(make_demonstrations, *asked)[:2] == (0, f"{target}\n")
    dataset = reader.Dataset(target)
    assert dataset.info["robot_type"] == "turntable"
    assert dataset.info["fps"] == 20
    assert dataset.info["total_episodes"] == 2
    frame = dataset[0]
    assert np.shape(frame["observation.images.base"]) == (16, 16, 3)
    assert frame["task"].split()[0] in ("touch", "tap")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--sim", "turntabel", "--crf", "9"],
            "--crf 9 has no effect: --images png writes no video; give --im",
        ),
        (["--sim", "turntabel"], "unknown simulator 'turntabel'"),
        (["--sim", "turntable", "--option", "tasks"], "--option: expected NAME=VALUE, got 'tasks'"),
        (["--sim", "turntable", "--option", "tasks=tuch"], "expected some of"),
    ],
)
def test_what_does_not_exist_ends_the_command(command, arguments, message, tmp_path):
    _, _, err = command(make_demonstrations, *arguments, "--output", tmp_path / "none")
    assert message in err
    assert not list(tmp_path.iterdir())
