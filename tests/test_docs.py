"""The examples of the docs run: on a small dataset, with a model in miniature."""

import dataclasses
import pathlib
import re
import sys
import time
import types

import numpy as np
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.data import opening
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.data.robots import robot as robots
from shallow_pi.training import command_line

ROOT = pathlib.Path(__file__).parents[1]


def _examples(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The examples under the names on the pages, with recordings of that robot."""
    folder = tmp_path_factory.mktemp("my_arm")
    robot, variant, part, _ = _examples("robots.md")
    (folder / "my_arm.py").write_text(robot, encoding="utf-8")
    (folder / "variant.py").write_text(variant, encoding="utf-8")
    (folder / "part.py").write_text(part, encoding="utf-8")
    (config,) = _examples("configs.md")
    (folder / "my_arm_l6.py").write_text(config, encoding="utf-8")
    generator = np.random.default_rng(0)
    keys = robots.find(str(folder / "my_arm.py")).cameras.values()
    with lerobot_writer.Writer(folder / "recordings", 30) as writer:
        for length in (6, 5):
            images = {
                key.removeprefix("observation.images."): generator.integers(
                    0, 256, (length, 24, 24, 3), np.uint8
                )
                for key in keys
            }
            state, action = generator.uniform(0, 1, (2, length, 8)).astype(np.float32)
            writer.add_episode(images, state, action, "touch the red block")
    return folder


def test_the_robot_of_the_page_reads_its_recordings(folder):
    robot = robots.find(str(folder / "my_arm.py"))
    assert (robot.delta, len(robot.groups)) == ((True,) * 7 + (False,), 2)
    variant = robots.find(str(folder / "variant.py"))
    assert variant == dataclasses.replace(robots.UR5, name="ur5_slow", fps=10)


def test_the_actions_of_a_part_go_where_the_page_puts_them(folder):
    robot = robots.find(str(folder / "part.py"))
    places = list(robot.action_vector.places)
    assert (places[0], places[-1], robot.action_dim) == (22, 34, 13)

    class Client:
        def get_server_metadata(self):
            return {"action_indices": places}

    last, action = np.arange(44.0), np.arange(100.0, 113)
    names = {"policy": Client(), "last_command": last, "action": action}
    exec(_examples("robots.md")[-1], names)
    np.testing.assert_array_equal(names["command"], [*last[:22], *action, *last[35:]])


def test_the_robot_of_the_page_goes_on_from_the_chunk_it_executes(monkeypatch):
    """Every action is the next of a counter, which each chunk goes on with."""
    executed, told = [], []

    class Client:
        def __init__(self, host, port):
            pass

        def infer(self, observation):
            left = observation.pop("real_time_chunking", None)
            told.append(left)
            start = 0.0 if left is None else left["previous"][0, 0]
            return {"actions": start + np.arange(10.0)[:, None]}

    def execute(action):
        if len(executed) == 40:
            raise StopIteration
        time.sleep(0.002)
        executed.append(action.item())

    module = types.SimpleNamespace(WebsocketClientPolicy=Client)
    package = types.SimpleNamespace(websocket_client_policy=module)
    monkeypatch.setitem(sys.modules, "openpi_client", package)
    with pytest.raises(StopIteration):
        exec(_examples("speed.md")[-1], {"observe": dict, "execute": execute})
    np.testing.assert_array_equal(executed, np.arange(40))
    assert told[0] is None
    assert told[1]["delay"] == 3
    assert all(len(left["previous"]) == 5 for left in told[1:])


def test_the_config_of_the_page_opens_its_data_and_fits_its_teacher(
    folder, tiny_config, tiny_params, tiny_dataset
):
    experiment = command_line.load(ROOT / "train_configs", str(folder / "my_arm_l6.py"))
    assert experiment.name == "my_arm_l6"
    assert experiment.student_model.depth == 6
    small = tiny_config(depth=6, vocab_size=320, action_dim=8, action_horizon=50)
    data = dataclasses.replace(
        experiment.data, tokenizer=str(tiny_dataset[1]), held_out=0.5, norm_stats="dataset"
    )
    weights.save_params(pathlib.Path(experiment.teacher.path) / "params", tiny_params(small))
    found = opening.open_data(data, small, pathlib.Path(experiment.teacher.path))
    sample = found.train[0]
    assert sample.actions.shape == (50, 8)
    assert sorted(sample.observation.images) == ["base_0_rgb", "left_wrist_0_rgb"]
    assert found.assets.robot.name == "my_arm"
