"""Meta-World: 50 tasks of a Sawyer arm on a table, with the package's scripted experts.

MT10 and MT50 are its lists of tasks. An action moves the gripper by up to a centimetre along x, y
and z (−1 to 1 each) and closes it (1) or opens it (−1), 80 times a second; the state is the
gripper's position in metres and its opening (0 to 1). Episodes take the tasks in turn, and one
succeeds at the first step that the package calls a success. A policy learns the goal from the
images: where nothing else shows it, a coloured ball does.

Two views: "near" is a camera of ours that fills small images with the table, "corner2" is the
package's, turned upright and moved closer as in LeRobot. Ray casting paints a textured surface with
the mean of its texture.
"""

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import metaworld.env_dict
import metaworld.policies
import mujoco
import numpy as np
from jaxtyping import Float, UInt8

from shallow_pi import suggestions
from shallow_pi.data.robots import robot as robots
from shallow_pi.sims import images, metaworld_tasks, pickling, simulator

VERSION = "-v3"
# Our camera of the view "near": position, point looked at, vertical field of view in degrees.
NEAR = ((0.72, 0.30, 0.76), (0.0, 0.71, 0.12), 45.0)
CORNER2 = (0.75, 0.075, 0.7)  # LeRobot's position of the package's camera.
DEMONSTRATION_STEPS = 300  # Experts that take longer are stuck.
# Before a demonstration the gripper goes off in some direction for up to so many steps, times the
# noise. If every demonstration began at the same place, the gripper's own position would soon give
# away where the object is, and a policy would read that instead of the images.
START_STEPS = 60


@dataclasses.dataclass(frozen=True)
class Suite:
    """Some of the tasks (see `simulator.Suite`)."""

    # The benchmark's list of tasks.
    suite: Literal["mt10", "mt50"] = "mt10"
    # Some of MT50's tasks, as in metaworld_tasks.PROMPTS; empty uses all of the list.
    tasks: tuple[str, ...] = ()
    # Height and width of the images, pixels.
    image_size: int = 64
    # Length of an episode in control steps, at most; 500 is the benchmark's.
    max_steps: int = 500
    # Camera of the base image: ours ("near") or LeRobot's ("corner2").
    view: Literal["near", "corner2"] = "near"
    # Images by ray casting ("ray") or by MuJoCo's OpenGL renderer ("gl").
    renderer: images.Renderer = "ray"

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task not in metaworld_tasks.PROMPTS:
                known = sorted(metaworld_tasks.PROMPTS)
                hint = suggestions.closest(task.removesuffix(VERSION), known)
                raise ValueError(f"tasks: Meta-World has no {task!r}, only {known}{hint}")
        if self.suite not in ("mt10", "mt50"):
            raise ValueError(f'suite: expected "mt10" or "mt50", got {self.suite!r}')
        if min(self.image_size, self.max_steps) < 1:
            raise ValueError(
                f"expected positive image_size and max_steps, got {self.image_size} and "
                f"{self.max_steps}"
            )
        if self.view not in ("near", "corner2"):
            raise ValueError(f'view: expected "near" or "corner2", got {self.view!r}')
        images.check(self.renderer)

    @property
    def robot(self) -> robots.Robot:
        """The arm's gripper."""
        return robots.METAWORLD

    @property
    def control_hz(self) -> float:
        """Control steps a second."""
        return float(self.robot.fps)

    def names(self) -> Mapping[str, tuple[str, ...]]:
        """Axes of the gripper's position and motion, and its fingers."""
        (state,), action = self.robot.state_keys, self.robot.action_key
        return {state: ("x", "y", "z", "opening"), action: ("x", "y", "z", "close")}

    def make(self) -> "MetaWorld":
        """Build the simulator; a task's scene is compiled when it first comes up."""
        return MetaWorld(self)

    def task_names(self) -> tuple[str, ...]:
        """The tasks that episodes take in turn."""
        return self.tasks or (
            metaworld_tasks.MT10 if self.suite == "mt10" else tuple(metaworld_tasks.PROMPTS)
        )

    def prompts(self) -> list[str]:
        """Every instruction of MT50, whose tokenizer serves MT10 too."""
        return sorted(metaworld_tasks.PROMPTS.values())

    def harder(self) -> Mapping[str, "Suite"]:
        """None."""
        return {}

    def expert(self) -> simulator.Expert:
        """The package's own, one a task; they see the true state and the goal."""
        return expert

    def demonstrate(
        self, sim: simulator.Simulator, rng: np.random.Generator, noise: float
    ) -> Iterator[tuple[simulator.Observation, simulator.Action]]:
        """Play a perturbed episode; yield what is seen, and the expert's own action there.

        The way to where a demonstration begins (`START_STEPS`) is not shown.
        """
        away = rng.normal(size=3)
        away /= np.linalg.norm(away)
        for _ in range(rng.integers(round(noise * START_STEPS) + 1)):
            sim.step(np.array([*away, -1.0]))
        spread = noise * rng.uniform(0, 0.3)
        wander = np.zeros(3)
        for _ in range(min(self.max_steps, DEMONSTRATION_STEPS)):
            if sim.done:
                return
            action = expert(sim)
            yield sim.observe(), action
            wander = 0.8 * wander + 0.6 * rng.normal(scale=spread, size=3)
            sim.step(np.array([*(action[:3] + wander), action[3]]))


def expert(sim: Any) -> Float[np.ndarray, "4"]:
    """The action of the package's expert, within the range that the arm follows."""
    assert isinstance(sim, MetaWorld), "made by this suite"
    policy = metaworld.policies.ENV_POLICY_MAP[sim.task + VERSION]()
    with warnings.catch_warnings():  # That the arm clips their actions.
        warnings.filterwarnings("ignore", message="Constant", category=UserWarning)
        action = policy.get_action(sim.true_state)
    return np.clip(action, -1.0, 1.0).astype(np.float64)


class MetaWorld(pickling.Picklable):
    """The simulator of one suite."""

    changing = ("true_state", "_frame_before", "_steps", "_succeeded")

    def __init__(self, config: Suite):
        self.config = config
        self.task = config.task_names()[0]
        self._scenes: dict[str, tuple[Any, images.Images]] = {}
        self._seed: int | None = None

    def _scene(self, task: str) -> tuple[Any, images.Images]:
        for _, views in self._scenes.values():
            views.close()
        if task not in self._scenes:
            env: Any = metaworld.env_dict.ALL_V3_ENVIRONMENTS[task + VERSION]()
            # Each reset draws objects and goal anew, from its own generator, and the true state
            # includes the goal: as the package prepares it for multi-task learning.
            env._partially_observable = False
            del env.sawyer_observation_space
            env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True
            env.max_path_length = np.inf  # Our own limit counts.
            if self.config.renderer == "ray":
                images.paint(env.model)
            if self.config.view == "near":
                _place_camera(env.model, "corner2", *NEAR)
            else:
                env.model.camera("corner2").pos = CORNER2
            sites = [env.model.site(name).id for name, _ in _goal_sites(env)]
            size = (self.config.image_size,) * 2
            views = images.Images(env.model, size, self.config.renderer, 2, sites)
            self._scenes[task] = env, views
        return self._scenes[task]

    def reset(self, seed: int) -> None:
        """Begin the episode that `seed` names; consecutive seeds take the tasks in turn."""
        tasks = self.config.task_names()
        self.task = tasks[seed % len(tasks)]
        self._env, self._images = self._scene(self.task)
        self._env.seed(seed // len(tasks) % 2**32)
        self.true_state, _ = self._env.reset()
        self._seed, self._steps, self._succeeded = seed, 0, False
        mujoco.mj_forward(self._env.model, self._env.data)

    @property
    def model(self) -> mujoco.MjModel:
        """The compiled scene of this episode."""
        return self._env.model

    @property
    def data(self) -> mujoco.MjData:
        """Its physical state."""
        return self._env.data

    @property
    def _frame_before(self) -> Float[np.ndarray, " n"]:
        """Half of the next true state, which has two frames."""
        return self._env._prev_obs

    @_frame_before.setter
    def _frame_before(self, frame: Float[np.ndarray, " n"]) -> None:
        self._env._prev_obs = frame

    @property
    def prompt(self) -> str:
        """The instruction."""
        return metaworld_tasks.PROMPTS[self.task]

    def step(self, action: simulator.Action) -> None:
        """Move the gripper for one period; values beyond −1 and 1 are clipped, as on the arm."""
        action = np.asarray(action, np.float64)
        if action.shape != (4,) or not np.isfinite(action).all():
            raise ValueError(f"action: expected four finite numbers, got {action}")
        clipped = np.clip(action, -1.0, 1.0)
        self.true_state, _, _, _, info = self._env.step(clipped.astype(np.float32))
        self._steps += 1
        self._succeeded |= bool(info["success"])

    @property
    def tip(self) -> Float[np.ndarray, "3"]:
        """Of the gripper, in the world."""
        return self.true_state[:3].copy()

    def happened(self) -> dict[str, float]:
        """Nothing: the package tells success alone."""
        return {}

    def observe(self) -> simulator.Observation:
        """Both images, the state and the prompt, under LeRobot's keys."""
        base, wrist = self._render("corner2"), self._render("gripperPOV")
        if self.config.view == "corner2":
            base = base[::-1, ::-1]
        return {
            "observation.images.base": np.ascontiguousarray(base),
            "observation.images.wrist": wrist,
            "observation.state": self.true_state[:4].astype(np.float32),
            "task": self.prompt,
        }

    def _render(self, camera: str) -> UInt8[np.ndarray, "h w 3"]:
        return self._images.render(self._env.data, camera)

    @property
    def success(self) -> bool:
        """The package called some step of the episode a success."""
        return self._succeeded

    @property
    def done(self) -> bool:
        """Success or time-out."""
        return self._succeeded or self._steps >= self.config.max_steps

    @property
    def time(self) -> float:
        """Seconds since the episode began."""
        return self._steps / self.config.robot.fps


def _goal_sites(env: Any) -> list[tuple[str, object]]:
    """Sites that show the goal, once the task has one."""
    env._target_pos = np.zeros(3)
    try:
        return [pair for pair in env._target_site_config if env.model.site(pair[0]).rgba[3] > 0]
    finally:
        env._target_pos = None


def _place_camera(
    model: mujoco.MjModel,
    name: str,
    position: tuple[float, float, float],
    target: tuple[float, float, float],
    fovy: float,
) -> None:
    """Move a fixed camera and point it at `target`, upright."""
    back = np.subtract(position, target)
    back /= np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    quaternion = np.empty(4)
    mujoco.mju_mat2Quat(quaternion, np.stack([right, np.cross(back, right), back], 1).ravel())
    camera = model.camera(name).id
    model.cam_pos[camera], model.cam_quat[camera] = position, quaternion
    model.cam_fovy[camera] = fovy
