"""Observations that openpi accepts are accepted, others are refused with the key's name."""

import dataclasses

import numpy as np
import pytest

from shallow_pi.data.robots import robot as robots
from shallow_pi.deploy import robot_observation

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
BASE = "observation.images.base"


@pytest.fixture
def seen():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (2, 12, 16, 3), np.uint8)
    return {
        BASE: images[0],
        "observation.images.wrist": images[1],
        "observation.state": np.array([1, 2, 3], np.float64),
        "task": "touch the red block",
    }


class OnDevice:
    """A tensor that NumPy cannot read."""

    def __array__(self, dtype=None, copy=None):
        raise TypeError("use .cpu()")


def clean(observation, robot=robots.TURNTABLE, **options):
    return robot_observation.clean(robot, CAMERAS, observation, **options)


def test_what_is_needed_comes_out_in_one_form_and_nothing_else(seen, capsys):
    found = clean({**seen, "action": np.zeros(3), "timestamp": 1.5})
    assert set(found) == set(seen)
    assert not capsys.readouterr().err
    np.testing.assert_array_equal(found[BASE], seen[BASE])
    assert found["observation.state"].dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_from_0_to_1_are_bytes_as_openpi_makes_them(seen, dtype):
    given = (seen[BASE] / 255).astype(dtype)
    found = clean({**seen, BASE: given})[BASE]
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, (255 * given).astype(np.uint8))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_that_a_resize_rounded_past_the_ends_are_the_nearest_bytes(seen, dtype):
    given = np.full((2, 2, 3), 0.5, dtype)
    given[0, 0], given[1, 1] = -1e-6, 1 + 2 * np.finfo(dtype).eps
    found = clean({**seen, BASE: given})[BASE]
    np.testing.assert_array_equal(found[..., 0], [[0, 127], [127, 255]])


def test_colours_may_come_first(seen):
    found = clean({**seen, BASE: np.moveaxis(seen[BASE], -1, 0)})
    np.testing.assert_array_equal(found[BASE], seen[BASE])
    # Three rows of pixels are an image as they stand.
    flat = seen[BASE][:3]
    np.testing.assert_array_equal(clean({**seen, BASE: flat})[BASE], flat)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (BASE, np.zeros((8, 8, 3), np.int64), "must be uint8, or floats in .0, 1., got int64"),
        (BASE, np.full((8, 8, 3), 200.0), "float64 image from 200 to 200: floats must lie in"),
        (BASE, np.full((8, 8, 3), -1.0), r"image from -1 to -1"),
        (BASE, np.full((8, 8, 3), 1.01), r"image from 1.01 to 1.01"),
        (BASE, np.full((8, 8, 3), np.nan), "image from nan to nan"),
        (BASE, np.zeros((8, 8), np.uint8), r"one RGB image.* got the shape \(8, 8\)"),
        (BASE, np.zeros((8, 8, 4), np.uint8), r"got the shape \(8, 8, 4\)"),
        (BASE, np.zeros((1, 8, 8, 3), np.uint8), r"got the shape \(1, 8, 8, 3\)"),
        (BASE, np.zeros((0, 8, 3), np.uint8), r"got the shape \(0, 8, 3\)"),
        (BASE, b"\xff\xd8\xff\xe0" + bytes(9), "got 13 bytes of a JPEG file: decode it"),
        (BASE, np.frombuffer(b"\x89PNG\r\n", np.uint8)[:, None], "got 6 bytes of a PNG file"),
        (BASE, bytes(5), "got 5 bytes: decode it, and send the pixels"),
        (BASE, "/9j/4AAQ", "got text: send the pixels"),
        (BASE, OnDevice(), r"an array of numbers, got a OnDevice .*: use \.cpu\(\)"),
        ("observation.state", np.zeros(4), r"must have 3 dimensions .* another robot's"),
        (
            "observation.state",
            np.zeros((1, 3)),
            r"vector of numbers, got float64 of shape \(1, 3\)",
        ),
        ("observation.state", ["a", "b", "c"], "must be a vector of numbers, got <U1"),
        ("observation.state", [0, np.nan, np.inf], r"not finite: nan in dimension \[1, 2\]"),
        ("task", ["touch the red block"], "'task' must be the instruction as a str, got list"),
    ],
)
def test_what_cannot_be_meant_names_its_key(seen, key, value, said):
    with pytest.raises(ValueError, match=said) as caught:
        clean({**seen, key: value})
    assert key in str(caught.value)


def test_everything_missing_is_named_at_once_with_what_is_there(seen):
    said = (
        r"lacks camera 'observation\.images\.base' \(the model's base_0_rgb\), state "
        r"'observation\.state', prompt 'task' \(or give the policy a prompt: .*--prompt\).* only "
        r"\['observation\.images\.wrist'\]"
    )
    with pytest.raises(ValueError, match=said):
        clean({"observation.images.wrist": seen["observation.images.wrist"]})
    with pytest.raises(ValueError, match=r"got list; for several at once there is infer_batch"):
        clean([seen])


def test_a_key_without_a_value_is_named(seen, capsys):
    said = r"lacks state 'observation\.state'; .*\]; it gives None for 'observation\.state'$"
    with pytest.raises(ValueError, match=said):
        clean({**seen, "observation.state": None})
    assert not capsys.readouterr().err


def test_keys_a_policy_does_not_use_are_named_once(seen, capsys):
    for _ in range(2):
        clean({**seen, "observation.images.top": seen[BASE], "gripper": 1.0})
    assert capsys.readouterr().err == (
        "warning: the observation has 'gripper', 'observation.images.top', which the policy of "
        "robot turntable does not use\n"
    )


def test_prompts_come_from_the_robot_or_the_observation_or_the_policy(seen):
    unsaid = {key: value for key, value in seen.items() if key != "task"}
    assert clean(unsaid, prompt="wait")["task"] == "wait"
    assert clean(seen, prompt="wait")["task"] == "touch the red block"
    assert clean({**seen, "task": np.array("go")})["task"] == "go"
    assert clean({**seen, "task": b"go"})["task"] == "go"
    assert clean({**seen, "task": np.array([["go"]])})["task"] == "go"
    assert clean({**unsaid, "prompt": "go"})["task"] == "go"
    always = dataclasses.replace(robots.TURNTABLE, prompt="dance")
    assert "task" not in clean(unsaid, always)


def test_a_text_for_a_missing_prompt_is_none(seen):
    assert clean({**seen, "task": "None"}, prompt="wait")["task"] == "wait"
    with pytest.raises(ValueError, match="'task' is 'None', which is no instruction"):
        clean({**seen, "task": "None"})


def test_uneven_lists_are_named_by_their_key(seen):
    for key in (BASE, "observation.state"):
        with pytest.raises(ValueError, match=f"'{key}' must be an array .* list that makes none"):
            clean({**seen, key: [[0], [1, 2]]})


def test_the_parts_of_a_state_are_checked():
    image = np.zeros((8, 8, 3), np.uint8)
    seen = dict.fromkeys(robots.DROID.cameras.values(), image) | {"task": "go"}
    parts = {"joint_position": np.arange(7), "gripper_position": 0.5}
    found = clean({**seen, **parts}, robots.DROID)
    np.testing.assert_array_equal(robots.DROID.state(found), [*range(7), 0.5])
    with pytest.raises(ValueError, match=r"'joint_position' \(6\) \+ .* expects .*\(7\)"):
        clean({**seen, **parts, "joint_position": np.arange(6)}, robots.DROID)


def test_a_robot_file_gives_keys_other_names(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import dataclasses\n"
        "from shallow_pi.data import robots\n"
        "ROBOT = dataclasses.replace(robots.ALOHA_SIM, name='mine', state_key='now/joints',\n"
        "    cameras={'base_0_rgb': 'eye'})\n"
    )
    image = np.zeros((8, 8, 3), np.uint8)
    seen = {"eye": image, "now": {"joints": np.zeros(14)}}
    found = clean(seen, robots.find(str(path)))
    assert set(found) == {"eye", "now/joints"}
