"""Simulated ALOHA: two arms hand a cube over, or insert a peg into a socket.

The scenes are gym-aloha's own files, run by plain MuJoCo: neither gymnasium nor dm_control is
needed. An action holds the absolute joint positions of both arms in radians, each followed by its
gripper (0 closed, 1 open), 50 times a second; targets beyond the joints' range are the servos' to
stop. Starts, success (the package's reward of 4) and the limit of 300 steps are the package's:
episode `seed` has the cube where `reset(seed=seed)` puts it there.

Both tasks have an expert (`aloha_expert`).
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import mujoco
import numpy as np
from jaxtyping import Float

from shallow_pi.data.robots import robot as robots
from shallow_pi.sims import aloha_expert, images, pickling, simulator

PACKAGE = "gym_aloha"
PROMPTS = {"transfer_cube": "Transfer cube", "insertion": "Insert the peg into the socket"}
START = (0.0, -0.96, 1.16, 0.0, -0.3, 0.0, 0.02239, -0.02239) * 2
# Position of a finger that the gripper's 0 and 1 stand for, metres.
CLOSED, OPEN = 0.01844, 0.05800
SUBSTEPS = 10
# Where objects begin: lower and upper corner.
CUBE = ((0.0, 0.4, 0.05), (0.2, 0.6, 0.05))
PEG, SOCKET = ((0.1, 0.4, 0.05), (0.2, 0.6, 0.05)), ((-0.2, 0.4, 0.05), (-0.1, 0.6, 0.05))


@dataclasses.dataclass(frozen=True)
class Suite:
    """One of the two tasks (see `simulator.Suite`)."""

    task: Literal["transfer_cube", "insertion"] = "transfer_cube"
    # Height of the image in pixels; its width is four thirds of it.
    height: int = 480
    # Length of an episode in control steps, at most.
    max_steps: int = 300
    # Images by MuJoCo's OpenGL renderer ("gl"), as all published policies saw them, or by ray
    # casting ("ray").
    renderer: images.Renderer = "gl"

    def __post_init__(self) -> None:
        if self.task not in PROMPTS:
            raise ValueError(f"task: expected one of {list(PROMPTS)}, got {self.task!r}")
        if self.height < 3 or self.max_steps < 1:
            raise ValueError(
                f"expected a height of 3 or more and positive max_steps, got {self.height} and "
                f"{self.max_steps}"
            )
        images.check(self.renderer)

    @property
    def robot(self) -> robots.Robot:
        """Both arms; the prompt is the task's."""
        return dataclasses.replace(robots.ALOHA_SIM, prompt=PROMPTS[self.task])

    @property
    def control_hz(self) -> float:
        """Control steps a second."""
        return float(self.robot.fps)

    def names(self) -> Mapping[str, tuple[str, ...]]:
        """Joints of both arms."""
        joints = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate")
        arms = tuple(f"{s}_{joint}" for s in ("left", "right") for joint in (*joints, "gripper"))
        return {self.robot.state_key: arms, self.robot.action_key: arms}

    def task_names(self) -> tuple[str, ...]:
        """The task."""
        return (self.task,)

    def make(self) -> "Aloha":
        """Compile the scene."""
        return Aloha(self)

    def prompts(self) -> list[str]:
        """Both instructions."""
        return list(PROMPTS.values())

    def harder(self) -> Mapping[str, "Suite"]:
        """None."""
        return {}

    def expert(self) -> simulator.Expert:
        """Follows waypoints with both arms."""
        return expert

    def demonstrate(
        self, sim: simulator.Simulator, rng: np.random.Generator, noise: float
    ) -> Iterator[tuple[simulator.Observation, simulator.Action]]:
        """Play an episode disturbed in the joints; yield what is seen, and the expert's action."""
        wander = np.zeros(14)
        spread = noise * rng.uniform(0, 0.01) * np.array(([1.0] * 6 + [0.0]) * 2)  # radians
        while not sim.done:
            action = expert(sim)
            yield sim.observe(), action
            wander = 0.9 * wander + 0.44 * rng.normal(size=14) * spread
            sim.step(action + wander)


def assets() -> pathlib.Path:
    """The folder of the package's scenes.

    Raises:
      ModuleNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {PACKAGE!r}", name=PACKAGE)
    return pathlib.Path(next(iter(spec.submodule_search_locations))) / "assets"


ASSETS = assets()  # Fails where the module is imported, as an import of the package would.


class Aloha(pickling.Picklable):
    """The simulator of one task."""

    changing = ("steps", "_reward", "expert")

    def __init__(self, config: Suite):
        self.config = config
        self.task = config.task
        self.prompt = PROMPTS[config.task]
        path = ASSETS / f"bimanual_viperx_{config.task}.xml"
        self.model = mujoco.MjModel.from_xml_path(str(path))
        self.data = mujoco.MjData(self.model)
        size = (config.height, round(config.height * 4 / 3))
        self._images = images.Images(self.model, size, config.renderer, 2)
        self._names = [self.model.geom(i).name for i in range(self.model.ngeom)]
        self._seed: int | None = None
        self.expert: aloha_expert.Expert | None = None

    def reset(self, seed: int) -> None:
        """Lay out the episode that `seed` names, as gym-aloha does."""
        rng = np.random.RandomState(seed % 2**32)
        corners = [CUBE] if self.task == "transfer_cube" else [PEG, SOCKET]
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:16] = self.data.ctrl[:] = START
        upright = (1.0, 0.0, 0.0, 0.0)
        self.data.qpos[16:] = np.concatenate([[*rng.uniform(*c), *upright] for c in corners])
        mujoco.mj_forward(self.model, self.data)
        self._seed, self.steps, self.expert = seed, 0, None
        self._reward = self.reward()

    def step(self, action: simulator.Action) -> None:
        """Move the servos' targets for one period."""
        action = np.asarray(action, np.float64)
        if action.shape != (14,) or not np.isfinite(action).all():
            raise ValueError(f"action: expected 14 finite numbers, got {action}")
        for arm in (0, 1):
            joints, gripper = action[7 * arm : 7 * arm + 6], action[7 * arm + 6]
            finger = CLOSED + gripper * (OPEN - CLOSED)
            self.data.ctrl[8 * arm : 8 * arm + 8] = [*joints, finger, -finger]
        mujoco.mj_step(self.model, self.data, SUBSTEPS)
        mujoco.mj_fwdPosition(self.model, self.data)  # poses and contacts of the state reached
        self.steps += 1
        self._reward = self.reward()

    def state(self) -> Float[np.ndarray, "14"]:
        """Joint positions of both arms in radians, and openings of the grippers; float32."""
        arms = self.data.qpos[:16].reshape(2, 8)
        grippers = (arms[:, 6:7] - CLOSED) / (OPEN - CLOSED)
        return np.concatenate([arms[:, :6], grippers], 1).ravel().astype(np.float32)

    def observe(self) -> simulator.Observation:
        """The image from above, the state and the prompt, under LeRobot's keys."""
        return {
            "observation.images.top": self._images.render(self.data, "top"),
            "observation.state": self.state(),
            "task": self.prompt,
        }

    def reward(self) -> int:
        """The package's reward, 0 to 4, by what touches what."""
        pairs = {frozenset(self._names[i] for i in pair) for pair in self.data.contact.geom}

        def touch(one: str, *others: str) -> bool:
            return any(frozenset((one, other)) in pairs for other in others)

        left = "vx300s_left/10_left_gripper_finger"
        right = "vx300s_right/10_right_gripper_finger"
        if self.task == "transfer_cube":
            if touch("red_box", left):
                return 3 if touch("red_box", "table") else 4
            if touch("red_box", right):
                return 1 if touch("red_box", "table") else 2
            return 0
        socket = [f"socket-{i}" for i in range(1, 5)]
        if touch("red_peg", "pin"):
            return 4
        lifted = not (touch("red_peg", "table") or touch("table", *socket))
        if lifted and touch("red_peg", *socket):
            return 3
        held = touch(left, *socket) and touch("red_peg", right)
        return (2 if lifted else 1) if held else 0

    @property
    def success(self) -> bool:
        """The left gripper has the cube in the air; or the peg touches the socket's pin."""
        return self._reward == 4

    @property
    def done(self) -> bool:
        """Success or time-out."""
        return self.success or self.steps >= self.config.max_steps

    @property
    def time(self) -> float:
        """Seconds since the episode began."""
        return self.steps / self.config.robot.fps


def expert(sim: Any) -> Float[np.ndarray, "14"]:
    """The next action of the episode's expert."""
    assert isinstance(sim, Aloha), "made by this suite"
    if sim.expert is None:
        places = sim.data.qpos[16:].reshape(-1, 7)[:, :3]
        paths = aloha_expert.transfer if sim.task == "transfer_cube" else aloha_expert.insertion
        sim.expert = aloha_expert.Expert(sim.data, paths(*places))
    return sim.expert.act(sim.model, sim.data, sim.steps)
