"""openpi's example clients, with the keys and images they send, drive a served policy unchanged.

The observations are made as openpi's examples make them (examples/libero/main.py,
examples/droid/main.py, examples/aloha_real/env.py, examples/aloha_sim/env.py and
examples/simple_client/main.py), with openpi's own client and image tools.
"""

import concurrent.futures
import contextlib

import numpy as np
import pytest
import serving
from openpi_client import image_tools

from shallow_pi.data.robots import assets, normalize, robot
from shallow_pi.deploy import executors, policy

pytestmark = pytest.mark.filterwarnings(serving.OPENPI_WARNS)

RAW = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
HWC = image_tools.convert_to_uint8(image_tools.resize_with_pad(RAW, 24, 24))
CHW = np.transpose(HWC, (2, 0, 1))

LIBERO = {
    "observation/image": HWC,
    "observation/wrist_image": HWC,
    "observation/state": np.full(8, 0.1),
    "prompt": "touch the red block",
}
DROID = {
    "observation/exterior_image_1_left": HWC,
    "observation/wrist_image_left": HWC,
    "observation/joint_position": np.full(7, 0.1),
    "observation/gripper_position": np.full(1, 0.1),
    "prompt": "touch the red block",
}
ALOHA = {
    "state": np.full(14, 0.1),
    "images": dict.fromkeys(["cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"], CHW),
}
ALOHA_SIM = {"state": np.full(14, 0.1), "images": {"cam_high": CHW}}
UR5 = {
    "base_rgb": HWC,
    "wrist_rgb": HWC,
    "joints": np.full(6, 0.1),
    "gripper": np.full(1, 0.1),
    "prompt": "touch the red block",
}


class AtOnce(concurrent.futures.ThreadPoolExecutor):
    """Every plan is there when it is asked for."""

    def submit(self, function, /, *arguments, **options):
        future = super().submit(function, *arguments, **options)
        concurrent.futures.wait([future])
        return future


@pytest.fixture(scope="module")
def served(own, tiny_config, tiny_params):
    """Makes a tiny policy for a robot, with a default prompt, and its server; one a robot."""
    model = tiny_config(depth=1, vocab_size=320, action_dim=14)
    params = tiny_params(model)
    started = {}
    with contextlib.ExitStack() as stack:

        def start(name):
            if name not in started:
                chosen = robot.find(name)
                both = {
                    what: normalize.NormStats(np.zeros(d), np.ones(d), -np.ones(d), np.ones(d))
                    for what, d in (("state", chosen.state_dim), ("actions", chosen.action_dim))
                }
                one = assets.Assets(model, chosen, own.tokenizer, both, name)
                tiny = policy.Policy(one, params, num_steps=1, prompt="touch the blue block")
                started[name] = tiny, stack.enter_context(serving.running(tiny))
            return started[name]

        yield start


def both(served, name, sent, expected):
    """Actions that openpi's client gets for one observation, and the policy's for another."""
    tiny, running = served(name)
    client = serving.openpi(running)
    tiny.reset()
    actions = client.infer(sent)["actions"]
    tiny.reset()
    return actions, tiny.infer(expected)["actions"]


def lerobot(name):
    """An observation by the robot's own keys."""
    one = robot.find(name)
    found = dict.fromkeys(one.cameras.values(), HWC)
    if len(one.state_keys) == 1:
        return {**found, one.state_key: np.full(one.state_dim, 0.1)}
    more = dict.fromkeys(one.state_more, 0.1)
    return {**found, one.state_key: np.full(one.state_dim - len(more), 0.1), **more}


@pytest.mark.parametrize(
    ("name", "observation", "action_dim"),
    [
        ("libero", LIBERO, 7),
        ("droid", DROID, 8),
        ("aloha", ALOHA, 14),
        ("aloha_sim", ALOHA_SIM, 14),
        ("ur5", UR5, 7),
    ],
)
def test_openpis_example_clients_get_the_actions_of_the_robots_own_keys(
    served, name, observation, action_dim
):
    prompt = {"task": observation["prompt"]} if "prompt" in observation else {}
    actions, expected = both(served, name, observation, lerobot(name) | prompt)
    assert actions.shape == (5, action_dim)
    np.testing.assert_array_equal(actions, expected)


def nested(flat):
    found = {}
    for key, value in flat.items():
        *folders, last = key.split("/")
        at = found
        for folder in folders:
            at = at.setdefault(folder, {})
        at[last] = value
    return found


@pytest.mark.parametrize(
    "change",
    [
        nested,
        # As LeRobot's images: colours first, floats from 0 to 1.
        lambda o: {k: CHW.astype(np.float32) / 255 if v is HWC else v for k, v in o.items()},
        lambda o: {k: CHW if v is HWC else v for k, v in o.items()},
        lambda o: {k.replace("/", "."): v for k, v in o.items()},
        lambda o: {**o, "prompt": o["prompt"].encode()},
    ],
    ids=["nested", "floats", "colours first", "dots", "bytes"],
)
def test_every_form_of_an_observation_gives_the_same_actions(served, change):
    # A float image loses one level at times, as in openpi.
    np.testing.assert_allclose(*both(served, "libero", change(LIBERO), LIBERO), atol=0.02)


def test_a_robot_behind_a_server_goes_on_from_the_chunk_it_executes(served, monkeypatch):
    """Through openpi's client as in one process: the same actions, with the same noise."""
    tiny, running = served("droid")
    with pytest.raises(ValueError, match="or a server started with --real-time-chunking; others"):
        executors.RealTimeChunking(serving.openpi(running), 2)
    monkeypatch.setattr(tiny, "is_guided", True)
    generator = np.random.default_rng(1)
    seen = [{**DROID, "observation/joint_position": generator.random(7)} for _ in range(7)]

    def drive(policy, kind=executors.RealTimeChunking):
        tiny.reset()
        with AtOnce(1) as worker, kind(policy, 2, worker=worker) as executor:
            return np.array([executor.infer(one)["actions"] for one in seen])

    with serving.running(tiny) as running:
        through = drive(serving.openpi(running))
        np.testing.assert_allclose(through, drive(tiny), atol=1e-4)
        assert np.abs(through - drive(tiny, executors.SkipLateActions)).max() > 1e-3


def test_without_a_prompt_the_policys_own_is_taken(served):
    unsaid = {key: value for key, value in LIBERO.items() if key != "prompt"}
    said = {**LIBERO, "prompt": "touch the blue block"}
    np.testing.assert_array_equal(*both(served, "libero", unsaid, said))
