"""Values taken from columns: as if there were no others, in statistics, samples and errors."""

import dataclasses
import json

import numpy as np
import pytest

from shallow_pi.commands import compute_norm_stats
from shallow_pi.data import data_config, fit, inspection, opening
from shallow_pi.data.lerobot import reader
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.data.robots import conversions, normalize, vector
from shallow_pi.data.robots import robot as robots

STATE, ACTION = (6, 2, 0), (1, 5, 4)
# As the narrow recordings have them: the taken values alone.
PLAIN = robots.Robot(
    name="arm",
    cameras={"base_0_rgb": "observation.images.base"},
    state_dim=3,
    action_dim=3,
    fps=20,
    state_key="joints",
    delta=robots.mask(2, -1),
    state_conversion=conversions.Conversion((1, -1, 2)),
    action_conversion=conversions.Conversion((1, -1, 2)),
    groups=(robots.Group("arm", 2), robots.Group("gripper", 1)),
)
TAKING = dataclasses.replace(
    PLAIN, state_more=("hand",), state_indices=STATE, action_indices=ACTION
)


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """The same episodes with all values, and with those that the robot takes."""
    folder, rng = tmp_path_factory.mktemp("recordings"), np.random.default_rng(0)
    names = {"joints": list("abcde"), "hand": ["f", "g"], "action": list("uvwxyz")}
    taken = {"joints": ["g", "c", "a"], "action": ["v", "z", "y"]}
    with (
        lerobot_writer.Writer(folder / "wide", 20, names=names) as wide,
        lerobot_writer.Writer(folder / "narrow", 20, names=taken) as narrow,
    ):
        for n in (9, 7):
            images = {PLAIN.cameras["base_0_rgb"]: np.zeros((n, 8, 8, 3), np.uint8)}
            state, action = (rng.normal(size=(n, k)).astype(np.float32) for k in (7, 6))
            vectors = {"joints": state[:, :5], "hand": state[:, 5:], "action": action}
            wide.add(images, vectors, ["go"] * n)
            vectors = {"joints": state[:, STATE], "action": action[:, ACTION]}
            narrow.add(images, vectors, ["go"] * n)
    return folder


def _open(folder, robot, tiny_dataset, tiny_config, monkeypatch):
    monkeypatch.setitem(robots.ROBOTS, "arm", robot)
    data = data_config.DataConfig(
        path=str(folder), robot="arm", tokenizer=str(tiny_dataset[1]), norm_stats="dataset"
    )
    return opening.open_data(data, tiny_config(vocab_size=320), None)


def test_taking_values_is_recording_no_others(recordings, tiny_dataset, tiny_config, monkeypatch):
    """Statistics, names, training samples, what was recorded: bit for bit."""
    wide = _open(recordings / "wide", TAKING, tiny_dataset, tiny_config, monkeypatch)
    narrow = _open(recordings / "narrow", PLAIN, tiny_dataset, tiny_config, monkeypatch)
    assert wide.assets.names == narrow.assets.names
    assert wide.assets.names == {"state": ("g", "c", "a"), "actions": ("v", "z", "y")}
    assert wide.assets.robot.state_sizes == (5, 2)
    assert wide.assets.robot.action_sizes == (6,)
    for key, stats in narrow.assets.stats.items():
        for found, expected in zip(
            dataclasses.astuple(wide.assets.stats[key]), dataclasses.astuple(stats), strict=True
        ):
            np.testing.assert_array_equal(found, expected)
    for i in range(len(narrow.train)):
        found, expected = wide.train[i], narrow.train[i]
        np.testing.assert_array_equal(found.observation.state, expected.observation.state)
        np.testing.assert_array_equal(found.actions, expected.actions)
    drawn = [inspection.draw(data.train, data.assets, 4) for data in (wide, narrow)]
    assert inspection.ranges(drawn[0]) == inspection.ranges(drawn[1])
    # By hand: the first joint's difference, in the model's units, unnormalized.
    columns = reader.Dataset(recordings / "wide").columns
    stats = wide.assets.stats["actions"]
    seen = wide.train[2].actions[1, 1] * (stats.std[1] + 1e-6) + stats.mean[1]
    np.testing.assert_allclose(seen, -columns["action"][3, 5] + columns["joints"][2, 2], atol=1e-5)


def test_the_command_writes_the_statistics_of_the_values_taken(
    recordings, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(robots.ROBOTS, "arm", TAKING)
    compute_norm_stats.main(
        ["--data.robot", "arm", "--data.path", str(recordings / "wide"), "--horizon", "1"]
    )
    found = normalize.load(tmp_path / "norm_stats" / "wide" / "arm")
    columns = reader.Dataset(recordings / "wide").columns
    state = np.concatenate([columns["joints"], columns["hand"]], 1)[:, STATE] * (1, -1, 2)
    np.testing.assert_allclose(found["state"].mean, state.mean(0), atol=1e-6)
    np.testing.assert_allclose(found["state"].std, state.std(0), atol=1e-6)


def test_a_robot_comes_back_from_a_checkpoint_and_an_older_one_takes_all() -> None:
    saved = json.loads(json.dumps(dataclasses.asdict(TAKING)))
    assert robots.from_dict(saved) == TAKING
    older = json.loads(json.dumps(dataclasses.asdict(PLAIN)))
    del older["state_indices"], older["action_indices"]
    assert robots.from_dict(older) == PLAIN


def test_what_is_taken_is_told_as_slices() -> None:
    indices = (*range(7, 14), 20, 3, 4, 0)
    found = vector.Vector("arm", "action", ("a", "b"), 11, indices=indices)
    assert found.taken == "7:14, 20, 3:5, 0 of 'a' + 'b'"
    assert TAKING.taken == "state 6, 2, 0 of 'joints' + 'hand', actions 1, 5, 4 of 'action'"
    assert PLAIN.taken == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_indices": (0, 1)}, "arm: state_indices takes 2 dimensions, state_dim is 3"),
        ({"action_indices": (4, 0, 4)}, r"got \(4, 0, 4\) \(4 more than once\)"),
        ({"action_indices": (0, 1, -1)}, r"whole numbers from 0 that differ, .* got \(0, 1, -1\)"),
        ({"action_indices": (True, False, 2)}, r"whole numbers from 0 .* got \(True, False, 2\)"),
        ({"action_indices": range(3)}, r"action_indices must be a tuple, got range\(0, 3\); .*,\)"),
        ({"state_indices": [0, 1, 2]}, r"state_indices must be a tuple, got \[0, 1, 2\]"),
        ({"state_more": "hand"}, "state_more must be a tuple, got 'hand'; a tuple of one ends"),
        ({"groups": robots.Group("arm", 3)}, "groups must be a tuple, got Group"),
        (
            {"state_sizes": (4, 2)},
            r"state_indices has 6, but 'joints' \+ 'hand' has 6 values, 0 to 5",
        ),
        ({"state_sizes": (7,)}, r"state_sizes are \[7\], expected one for each of .*'hand'\]$"),
    ],
)
def test_what_cannot_be_taken_is_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TAKING, **changes)


def test_a_place_beyond_the_column_names_its_parts(recordings, tmp_path) -> None:
    dataset = reader.Dataset(recordings / "wide")
    robot = dataclasses.replace(TAKING, action_indices=(0, 9, 6))
    with pytest.raises(ValueError, match=r"wide: robot arm: .* has 6, 9, but 'action' has 6 va"):
        fit.check(dataset, robot)
    whole = dataclasses.replace(PLAIN, state_indices=(), state_more=("hand",), action_indices=())
    message = (
        r"has shape \(7,\), robot arm expects \(3,\)\nto take a part of 'joints' \+ 'hand', copy "
        r"it from these into the robot's state_indices \(docs/robots.md\):\n    0,  # a\n"
    )
    with pytest.raises(ValueError, match=rf"{message}(.*\n)*    6,  # g$"):
        fit.check(dataset, whole)
    sizes = dataclasses.replace(TAKING, state_sizes=(6, 2))
    message = r"got 'joints' \(5\) .* 'hand' \(2\) and takes 6, 2, 0 of 'joints'"
    with pytest.raises(ValueError, match=message):
        fit.check(dataset, sizes)


def test_slices_of_gr00t_are_printed_to_be_copied(tmp_path) -> None:
    folder = tmp_path / "gr1"
    with lerobot_writer.Writer(folder, 20) as writer:
        images = {PLAIN.cameras["base_0_rgb"]: np.zeros((4, 8, 8, 3), np.uint8)}
        values = np.arange(4 * 44, dtype=np.float32).reshape(4, 44)
        writer.add(images, {"observation.state": values, "action": values}, ["go"] * 4)
    slices = {
        "state": {"left_arm": {"start": 0, "end": 7}, "left_hand": {"start": 7, "end": 13}},
        "action": {"waist": {"start": 41, "end": 44, "original_key": "action", "absolute": True}},
        "video": {"base": {"original_key": "observation.images.base"}},
    }
    (folder / "meta" / "modality.json").write_text(json.dumps(slices))
    dataset = reader.Dataset(folder)
    robot = robots.Robot("gr1", PLAIN.cameras, state_dim=44, action_dim=44, fps=20)
    fit.check(dataset, robot)
    with pytest.raises(ValueError, match="state dimension 44, more than the model's") as raised:
        fit.check_sizes(dataset, robot, 32)
    lines = str(raised.value).splitlines()
    assert lines[0].endswith(
        "(--model.action-dim, as the teacher's): take some with its state_indices"
    )
    assert [line.strip() for line in lines[2:]] == [
        "*range(0, 7),  # left_arm",
        "*range(7, 13),  # left_hand",
    ]
    # Copied as they are, they are indices.
    copied = eval("(" + "\n".join(lines[2:]) + "\n)")
    arm = dataclasses.replace(robot, state_dim=13, state_indices=copied)
    with pytest.raises(
        ValueError, match=r"action dimension 44(.*\n)+    \*range\(41, 44\),  # wai"
    ):
        fit.check_sizes(dataset, arm, 32)
    np.testing.assert_array_equal(
        arm.state(dataset.columns), dataset.columns[arm.state_key][:, :13]
    )
    short = dataclasses.replace(robot, state_dim=13)
    with pytest.raises(ValueError, match=r"has shape \(44,\), .* expects \(13,\)\n.*\n    \*range"):
        fit.check(dataset, short)
