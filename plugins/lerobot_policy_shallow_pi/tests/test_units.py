"""The two unit conversion steps: they are exact inverses and leave other values unchanged.

Needs LeRobot 0.6 with torch, like the tests of the policies.
"""

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lerobot")

from lerobot.lerobot_types import TransitionKey  # noqa: E402 (after it is sure LeRobot is here)
from lerobot.processor import ProcessorStepRegistry  # noqa: E402
from lerobot_policy_shallow_pi import units_shallow_pi  # noqa: E402

UNITS = {
    "factor": [1.0, -2.0, 0.5],
    "offset": [0.0, 1.0, -0.25],
    "crank": [2],
    "closed": 0.01844,
    "open": 0.058,
    "arm": 0.036,
    "horn": 0.022,
}


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3)])
def test_to_robot_undoes_to_model(shape):
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found = units_shallow_pi.to_robot(units_shallow_pi.to_model(values, UNITS), UNITS)
    assert found.dtype == values.dtype
    torch.testing.assert_close(found, values, rtol=0, atol=1e-6)


def test_a_number_is_scaled_and_shifted_and_a_gripper_is_an_angle():
    """Fingers at √(arm² − horn²) stand at a servo angle of zero."""
    fingers = (UNITS["arm"] ** 2 - UNITS["horn"] ** 2) ** 0.5  # Then the servo's sine is 0.
    position = (fingers - UNITS["closed"]) / (UNITS["open"] - UNITS["closed"])
    found = units_shallow_pi.to_model(torch.tensor([3.0, 3.0, position]), UNITS)
    torch.testing.assert_close(found, torch.tensor([3.0, -5.0, -0.25]), rtol=0, atol=1e-6)


def test_the_steps_convert_state_action_and_prompt_and_nothing_else():
    step = ProcessorStepRegistry.get("shallow_pi_to_model")(state=UNITS, action=None, prompt="go")
    image, action = torch.zeros(1, 3, 2, 2), torch.ones(1, 4, 3)
    before = {
        TransitionKey.OBSERVATION: {"observation.state": torch.ones(1, 3), "image": image},
        TransitionKey.ACTION: action,
        TransitionKey.COMPLEMENTARY_DATA: {"task": ["stop"], "index": 7},
    }
    after = step(before)
    observation = after[TransitionKey.OBSERVATION]
    assert observation["image"] is image
    assert observation["observation.state"][0, 1] == -1
    assert after[TransitionKey.ACTION] is action
    assert after[TransitionKey.COMPLEMENTARY_DATA] == {"task": ["go"], "index": 7}
    # The caller's transition is unchanged.
    assert before[TransitionKey.OBSERVATION]["observation.state"][0, 1] == 1
    assert before[TransitionKey.COMPLEMENTARY_DATA]["task"] == ["stop"]


def test_a_step_comes_back_from_its_config():
    for name, fields in (
        ("shallow_pi_to_model", {"state": UNITS, "action": UNITS, "prompt": ""}),
        ("shallow_pi_to_robot", {"action": UNITS}),
    ):
        assert ProcessorStepRegistry.get(name)(**fields).get_config() == fields


def test_another_robots_numbers_raise():
    with pytest.raises(ValueError, match="has 3 dimensions, got 7"):
        units_shallow_pi.to_model(torch.zeros(7), UNITS)
