"""A robot's keys are found flat or nested, by LeRobot's names and by openpi's."""

import numpy as np
import pytest

from shallow_pi.data.robots import robot
from shallow_pi.deploy import observation_keys, robot_observation

STATE, HIGH = "observation.state", "observation.images.cam_high"


@pytest.mark.parametrize(
    ("observation", "expected"),
    [
        ({STATE: 1, HIGH: 2}, {STATE: STATE, HIGH: HIGH}),
        ({"state": 1, "images": {"cam_high": 2}}, {STATE: "state", HIGH: "images/cam_high"}),
        (
            {"observation": {"state": 1, "images": {"cam_high": 2}}},
            {STATE: "observation/state", HIGH: "observation/images/cam_high"},
        ),
        (
            {"observation/state": 1, "observation.images": {"cam_high": 2}},
            {STATE: "observation/state", HIGH: "observation.images/cam_high"},
        ),
        ({"cam_high": 2, "cam_low": 3}, {HIGH: "cam_high"}),
        ({STATE: None, "images": {}}, {}),
        # The robot's own spelling goes before another.
        ({STATE: 1, "state": 2}, {STATE: STATE}),
    ],
)
def test_a_key_is_found_in_any_spelling(observation, expected):
    assert observation_keys.find(observation, [STATE, HIGH]) == expected


def test_a_key_that_could_be_either_of_two_is_refused():
    observation = {"state": 1, "observation": {"state": 2}}
    with pytest.raises(ValueError, match="has 'state' and 'observation/state', and each could be"):
        observation_keys.find(observation, [STATE])


def test_another_name_is_taken_only_if_no_key_of_the_robot_has_it():
    top, high = "observation.images.top", HIGH
    seen = {"images": {"cam_high": 1}}
    assert observation_keys.find(seen, [top]) == {top: "images/cam_high"}
    assert observation_keys.find(seen, [top, high]) == {high: "images/cam_high"}
    assert observation_keys.find({"prompt": "go"}, ["task"]) == {"task": "prompt"}
    assert observation_keys.find({"task": "go"}, ["prompt"]) == {"prompt": "task"}


def test_no_two_keys_of_a_robot_are_taken_for_each_other():
    for one in robot.ROBOTS.values():
        keys = [*one.cameras.values(), *one.state_keys, one.prompt_key]
        nested = {key.replace(".", "/"): number for number, key in enumerate(keys)}
        found = observation_keys.find(nested, keys)
        assert [nested[found[key]] for key in keys] == list(range(len(keys)))


def test_the_chunk_that_is_sent_along_is_the_one_that_is_read():
    plain, chunk = {STATE: 1}, np.ones((3, 2))
    sent = observation_keys.with_previous(plain, chunk, 2)
    assert sent == {STATE: 1, "real_time_chunking": {"previous": chunk, "delay": 2}}
    assert plain == {STATE: 1}
    assert robot_observation.split_previous(sent) == (plain, chunk, 2)
