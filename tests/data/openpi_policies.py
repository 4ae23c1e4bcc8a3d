"""Recordings and statistics from seeds, for our pipelines and openpi's transforms alike.

tests/interop/record_policies.py runs openpi on them, test_parity_policies.py our code.
"""

import zlib

import numpy as np

HORIZON, ACTION_DIM, IMAGE_SIZE = 5, 32, 28
# (robot, pi05): the cases that are compared.
CASES = [
    (robot, pi05)
    for robot in ("aloha", "aloha_sim", "libero", "libero_delta", "droid", "droid_position")
    for pi05 in (False, True)
]


def generator(*words: object) -> np.random.Generator:
    """The same on every machine and version: seeded by the words themselves."""
    return np.random.default_rng(zlib.crc32(" ".join(map(str, words)).encode()))


def recording(robot, seed: int) -> dict:
    """One frame with its actions in the robot's keys; grippers lie between closed and open."""
    rng = generator("recording", robot.name, seed)
    sizes = {"joint_position": 7, "gripper_position": 1}
    image = {key: rng.integers(0, 256, (24, 32, 3), np.uint8) for key in robot.cameras.values()}
    state = {
        key: rng.uniform(-0.2, 1.2, sizes.get(key, robot.state_dim)).astype(np.float32)
        for key in robot.state_keys
    }
    actions = rng.uniform(-1.5, 1.5, (HORIZON, robot.action_dim)).astype(np.float32)
    return {**image, **state, "actions": actions, robot.prompt_key: "fold the towel"}


def stats(robot) -> dict[str, dict[str, np.ndarray]]:
    """Statistics of state and actions, field by field."""
    found = {}
    for key, dim in (("state", robot.state_dim), ("actions", robot.action_dim)):
        rng = generator("stats", robot.name, key)
        q01 = rng.uniform(-1.5, -0.5, dim)
        found[key] = {
            "mean": rng.normal(size=dim),
            "std": rng.uniform(0.1, 2, dim),
            "q01": q01,
            "q99": q01 + rng.uniform(0.5, 3, dim),
        }
    return found


def model_actions(robot, seed: int) -> np.ndarray:
    """A model's answer: normalized, in the model's action dimension."""
    shape = (HORIZON, ACTION_DIM)
    return generator("actions", robot.name, seed).normal(size=shape).astype(np.float32)
