"""Record what openpi's policies make of tests/data/openpi_policies.py, for the tests without it.

uv run --project tests/interop tests/interop/record_policies.py

Writes tests/data/openpi_policies.npz. Run it when the inputs change, and say so in the commit.
"""

import os
import pathlib
import sys
import tempfile

import numpy as np

TESTS = pathlib.Path(__file__).parents[1]
RECORDED = TESTS / "data" / "openpi_policies.npz"


def results(robot, pi05: bool, seed: int) -> dict[str, np.ndarray]:
    """A frame through openpi's inputs, and model actions through its outputs."""
    import openpi_policies as cases
    from openpi import transforms
    from openpi.shared import normalize

    group = _group(robot, pi05)
    stats = {key: normalize.NormStats(**value) for key, value in cases.stats(robot).items()}
    inputs = transforms.compose(
        [
            *group.inputs,
            transforms.Normalize(stats, use_quantiles=pi05),
            transforms.ResizeImages(cases.IMAGE_SIZE, cases.IMAGE_SIZE),
            transforms.PadStatesAndActions(cases.ACTION_DIM),
        ]
    )
    sample = inputs(_theirs(robot, cases.recording(robot, seed)))
    outputs = transforms.compose(
        [transforms.Unnormalize(stats, use_quantiles=pi05), *group.outputs]
    )
    acted = outputs({"state": sample["state"], "actions": cases.model_actions(robot, seed)})
    return {
        "state": np.asarray(sample["state"], np.float32),
        "actions": np.asarray(sample["actions"], np.float32),
        "mask": np.array([sample["image_mask"][name] for name in sorted(sample["image"])]),
        "images": np.stack([sample["image"][name] for name in sorted(sample["image"])]),
        "robot_actions": np.asarray(acted["actions"], np.float32),
    }


def _group(robot, pi05: bool):
    """openpi's data transforms for the robot of that name, as its configs put them together."""
    from openpi import transforms
    from openpi.models import pi0_config
    from openpi.policies import droid_policy
    from openpi.training import config

    model = pi0_config.Pi0Config(pi05=pi05)
    if robot.name.startswith("droid"):
        group = transforms.Group(
            inputs=[droid_policy.DroidInputs(model_type=model.model_type)],
            outputs=[droid_policy.DroidOutputs()],
        )
        if robot.name == "droid":
            return group
        mask = transforms.make_bool_mask(7, -1)
        return group.push(
            inputs=[transforms.DeltaActions(mask)], outputs=[transforms.AbsoluteActions(mask)]
        )
    factory = {
        "aloha": lambda: config.LeRobotAlohaDataConfig(),
        "aloha_sim": lambda: config.LeRobotAlohaDataConfig(use_delta_joint_actions=False),
        "libero": lambda: config.LeRobotLiberoDataConfig(extra_delta_transform=False),
        "libero_delta": lambda: config.LeRobotLiberoDataConfig(extra_delta_transform=True),
    }[robot.name]()
    return factory.create(pathlib.Path("/nowhere"), model).data_transforms


def _theirs(robot, recording: dict) -> dict:
    """The recording in the keys openpi's policies expect."""
    common = {"actions": recording["actions"].copy(), "prompt": "fold the towel"}
    if robot.name.startswith("aloha"):
        names = {key: key.rpartition(".")[2] for key in robot.cameras.values()}
        images = {
            "cam_high" if name == "top" else name: np.moveaxis(recording[key], -1, 0)
            for key, name in names.items()
        }
        return {**common, "images": images, "state": recording["observation.state"]}
    if robot.name.startswith("libero"):
        return {
            **common,
            "observation/image": recording["image"],
            "observation/wrist_image": recording["wrist_image"],
            "observation/state": recording["state"],
        }
    return {
        **common,
        "observation/exterior_image_1_left": recording["exterior_image_1_left"],
        "observation/wrist_image_left": recording["wrist_image_left"],
        "observation/joint_position": recording["joint_position"],
        "observation/gripper_position": recording["gripper_position"],
    }


def main() -> None:
    """Run every case through openpi."""
    sys.path[:0] = [str(TESTS / "data"), str(TESTS / "interop")]
    import openpi_policies as cases
    import stand_ins

    from shallow_pi.data.robots import robot as robots
    from shallow_pi.data.robots import tokenizer

    stand_ins.install()
    with tempfile.TemporaryDirectory() as home:
        # openpi's configs open their tokenizer, which nothing here depends on.
        os.environ["OPENPI_DATA_HOME"] = home
        tokens = pathlib.Path(home, "big_vision", "paligemma_tokenizer.model")
        tokenizer.train(["fold the towel"], tokens)
        recorded = {
            f"{name}/{'pi05' if pi05 else 'pi0'}/{seed}/{what}": value
            for name, pi05 in cases.CASES
            for seed in range(2)
            for what, value in results(robots.find(name), pi05, seed).items()
        }
    np.savez_compressed(RECORDED, **recorded)
    print(f"{RECORDED}: {len(recorded)} arrays, {RECORDED.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
