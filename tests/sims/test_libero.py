"""LIBERO behind our interface: the episodes, images and states of openpi's evaluation."""

import math
import os
import pathlib

import numpy as np
import pytest
from openpi_client import image_tools

from shallow_pi.data.lerobot import reader
from shallow_pi.data.robots import robot as robots
from shallow_pi.sims import recording, simulator

pytest.importorskip("libero.libero", reason="needs the extra libero")

import libero.libero

from shallow_pi.sims import libero as ours

# Of robosuite 1.4 and what it imports.
pytestmark = pytest.mark.filterwarnings("ignore")


def _gl_works():
    """OpenGL draws here; robosuite takes EGL where the variable names nothing else."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    suite = ours.Suite(suite="libero_object", tasks=("0",))
    sim = suite.make()
    sim.reset(0)
    try:
        sim.observe()
    except ValueError as error:
        return str(error)
    finally:
        sim.env.close()
    return ""


def test_suites_have_openpis_limits_and_ten_tasks():
    for name, limit in (("spatial", 220), ("object", 280), ("goal", 300), ("10", 520)):
        suite = simulator.find(f"libero_{name}", {})
        assert len(suite.task_names()) == len(set(suite.prompts())) == 10
        assert ours.MAX_STEPS[suite.suite] == limit
        simulator.check_robot(suite, robots.LIBERO)
    assert suite.control_hz == 20
    assert suite.expert() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "pick_up_the_milk"}, "did you mean 'pick_up_the_milk_and_place_it_in_the_bask"),
        ({"tasks": "10"}, "libero_object has no '10', only the numbers 0 to 9"),
        ({"suite": "libero_90"}, r"suite: expected one of \['libero_spatial'"),
        ({"max_steps": "-1"}, "max_steps of 0 or more"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        simulator.find("libero_object", options)


def test_tasks_are_chosen_by_number_or_name():
    suite = simulator.find("libero_object", {"tasks": "7, 2"})
    assert suite.numbers() == (7, 2)
    assert ours.Suite(suite="libero_object", tasks=suite.task_names()).numbers() == (7, 2)


def test_a_rotation_is_its_axis_times_its_angle():
    axis, angle = np.array([2.0, -1.0, 2.0]) / 3, 0.7
    quaternion = np.array([*(math.sin(angle / 2) * axis), math.cos(angle / 2)])
    np.testing.assert_allclose(ours.axis_angle(quaternion), angle * axis)
    np.testing.assert_array_equal(ours.axis_angle(np.array([0, 0, 0, 1.0])), np.zeros(3))


@pytest.mark.slow
def test_episodes_images_and_states_are_openpis(monkeypatch):
    """Its loop over trials, in our words: seed 7 once, a reset and ten steps for each trial."""
    if error := _gl_works():
        pytest.skip(error)
    from libero.libero.envs import env_wrapper
    from robosuite.utils import binding_utils

    number, trials = 4, 3  # Its drawer is opened by chance, in each reset more often.
    suite = ours.Suite(suite="libero_spatial", tasks=(str(number), "7", "1"))
    task = ours.tasks("libero_spatial")[number]
    folder = pathlib.Path(libero.libero.get_libero_path("bddl_files")) / task.problem_folder
    env = env_wrapper.OffScreenRenderEnv(
        bddl_file_name=str(folder / task.bddl_file), camera_heights=256, camera_widths=256
    )
    sim = suite.make()
    sim.reset(0)
    states = sim._states
    assert states.shape[0] == 50
    env.seed(7)
    with monkeypatch.context() as only_last:  # The images before take long, and are not compared.
        blank = np.zeros((256, 256, 3), np.uint8)
        only_last.setattr(binding_utils.MjSim, "render", lambda *_, **__: blank)
        for trial in range(trials):
            env.reset()
            env.set_init_state(states[trial])
            for _ in range(10):
                env.step([0.0] * 6 + [-1.0])
    action = np.array([0.5, -0.3, 0.2, 0.1, 0.0, -0.1, 1.0])
    env.step(action.tolist())
    seen, *_ = env.step(action.tolist())

    sim.reset(1_000_000 + 3 * (trials - 1))  # Of three tasks, from the default of --seed on.
    for _ in range(2):
        sim.step(action)
    np.testing.assert_array_equal(sim.model.body_pos, env.sim.model._model.body_pos)
    np.testing.assert_array_equal(sim.model.body_quat, env.sim.model._model.body_quat)
    np.testing.assert_array_equal(sim.data.qpos, env.sim.data.qpos)
    found = sim.observe()
    quaternion = seen["robot0_eef_quat"]
    turn = ours.axis_angle(quaternion)
    state = [*seen["robot0_eef_pos"], *turn, *seen["robot0_gripper_qpos"]]
    np.testing.assert_allclose(found["state"], state, atol=1e-7)
    for key, camera in (("image", "agentview_image"), ("wrist_image", "robot0_eye_in_hand_image")):
        turned = np.ascontiguousarray(seen[camera][::-1, ::-1])
        resized = image_tools.convert_to_uint8(image_tools.resize_with_pad(turned, 224, 224))
        np.testing.assert_array_equal(found[key], resized)
    assert found["task"] == task.language
    env.close()
    sim.env.close()


@pytest.mark.slow
def test_the_experts_demonstrations_are_a_dataset_like_openpis(tmp_path):
    os.environ.setdefault("MUJOCO_GL", "egl")
    suite = ours.Suite(suite="libero_object", tasks=("6",), renderer="ray", render_size=32)
    before = np.random.get_state()[1].copy()
    try:
        tasks = recording.write(tmp_path / "demos", suite, 1, seed=0, noise=0.5, workers=1)
    except ValueError as error:
        pytest.skip(str(error))
    np.testing.assert_array_equal(np.random.get_state()[1], before, "the global generator")
    assert tasks == {suite.task_names()[0]: 1}
    dataset = reader.Dataset(tmp_path / "demos")
    assert 80 < len(dataset) < 160, "success came"
    assert dataset.info["fps"] == 10
    first, last = dataset[0], dataset[len(dataset) - 1]
    assert first["task"] in suite.prompts()
    assert np.std(first["image"]) > 20
    shapes = {key: np.shape(first[key]) for key in ("image", "wrist_image", "state", "actions")}
    assert shapes == {
        "image": (32, 32, 3),
        "wrist_image": (32, 32, 3),
        "state": (8,),
        "actions": (7,),
    }
    assert first["actions"][6] == last["actions"][6] == -1, "open"
    assert last["state"][2] > 0.1
