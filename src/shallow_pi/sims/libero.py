"""LIBERO's four suites of ten tasks, by the protocol of openpi's `examples/libero/main.py`.

Images of 256 × 256 by OpenGL, turned by half a turn and resized to 224; ten steps of waiting, for
objects to fall; 220 to 520 steps a suite; success when the package says so. Seeds take the tasks
in turn, beginning anew at each million, and an episode's number in its task (0 to 49, then 0 again)
is that of its official initial state. openpi seeds LIBERO once for each task and resets it before
each episode, which moves cabinets and stoves a little; the same resets are made here, so an episode
is openpi's whatever ran before it.

The actions are differences of the gripper's pose and its closing, −1 to 1 each, 20 times a second;
datasets of this robot are labelled with 10. `libero_object` and `libero_spatial` have an expert
(`libero_expert`).
"""

import contextlib
import dataclasses
import io
import logging
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import libero.libero
import mujoco
import numpy as np
from jaxtyping import Float, UInt8
from libero.libero import benchmark

from shallow_pi import suggestions
from shallow_pi.data.robots import robot as robots
from shallow_pi.data.robots import transforms
from shallow_pi.sims import images, libero_expert, simulator

# Longest episode of each suite, control steps, without those of waiting.
MAX_STEPS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
WAIT_STEPS, WAIT_ACTION = 10, (0.0,) * 6 + (-1.0,)
SEED = 7  # openpi's
STATES = 50  # initial states of a task
FIRST = 1_000_000  # The seed at which tasks and states begin anew.
CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
WITH_EXPERT = ("libero_object", "libero_spatial")


@dataclasses.dataclass(frozen=True)
class Suite:
    """One of the suites (see `simulator.Suite`)."""

    suite: Literal["libero_spatial", "libero_object", "libero_goal", "libero_10"] = "libero_spatial"
    # Some of its tasks, by number (0 to 9) or name; empty uses all.
    tasks: tuple[str, ...] = ()
    # Height and width of the images as rendered and recorded, and as given to policies.
    render_size: int = 256
    image_size: int = 224
    # Length of an episode in control steps, at most; 0 uses openpi's limit for the suite.
    max_steps: int = 0
    # Images by MuJoCo's OpenGL renderer ("gl"), as all published policies saw them, or by ray
    # casting ("ray").
    renderer: images.Renderer = "gl"

    def __post_init__(self) -> None:
        if self.suite not in MAX_STEPS:
            raise ValueError(f"suite: expected one of {list(MAX_STEPS)}, got {self.suite!r}")
        if min(self.render_size, self.image_size) < 1 or self.max_steps < 0:
            raise ValueError(
                "expected positive render_size and image_size, and max_steps of 0 or more, got "
                f"{self.render_size}, {self.image_size} and {self.max_steps}"
            )
        images.check(self.renderer)
        self.numbers()

    @property
    def robot(self) -> robots.Robot:
        """A Panda arm."""
        return robots.LIBERO

    @property
    def control_hz(self) -> float:
        """Control steps a second, which the robot's datasets are not labelled with."""
        return 20.0

    def numbers(self) -> tuple[int, ...]:
        """The chosen tasks' numbers in the suite."""
        names = [task.name for task in tasks(self.suite)]
        for task in self.tasks:
            if task not in names and task not in map(str, range(len(names))):
                meant = next((name for name in names if task in name), task)
                hint = suggestions.closest(meant, names)
                raise ValueError(
                    f"tasks: {self.suite} has no {task!r}, only the numbers 0 to "
                    f"{len(names) - 1} and {names}{hint}"
                )
        chosen = self.tasks or tuple(names)
        return tuple(names.index(t) if t in names else int(t) for t in chosen)

    @property
    def memory(self) -> int:
        """Bytes of a simulator, about."""
        return 10**9

    def scene(self, seed: int) -> int:
        """Place of the task among the chosen: its scene takes three seconds to build."""
        return seed % FIRST % (len(self.tasks) or 10)

    def names(self) -> Mapping[str, tuple[str, ...]]:
        """Pose of the gripper and fingers; differences of the pose and the gripper's closing."""
        pose = ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z")
        return {"state": (*pose, "finger_1", "finger_2"), "actions": (*pose, "close")}

    def task_names(self) -> tuple[str, ...]:
        """The tasks that episodes take in turn."""
        every = tasks(self.suite)
        return tuple(every[number].name for number in self.numbers())

    def make(self) -> "Libero":
        """Build the simulator; a task's scene is compiled when an episode has it."""
        return Libero(self)

    def prompts(self) -> list[str]:
        """Every instruction of the suite."""
        return sorted({task.language for task in tasks(self.suite)})

    def harder(self) -> Mapping[str, "Suite"]:
        """None."""
        return {}

    def expert(self) -> simulator.Expert | None:
        """Of the suites in which one object is carried to one place."""
        return expert if self.suite in WITH_EXPERT else None

    def demonstrate(
        self, sim: simulator.Simulator, rng: np.random.Generator, noise: float
    ) -> Iterator[tuple[simulator.Observation, simulator.Action]]:
        """Play a perturbed episode; yield what is rendered, and the expert's own action there."""
        assert isinstance(sim, Libero), "made by this suite"
        spread = noise * rng.uniform(0, 0.2)
        wander = np.zeros(3)
        while not sim.done:
            action = expert(sim)
            yield sim.look(self.render_size), action
            wander = 0.8 * wander + 0.6 * rng.normal(scale=spread, size=3)
            sim.step(action + np.array([*wander, 0.0, 0.0, 0.0, 0.0]))


def tasks(suite: str) -> list[Any]:
    """The tasks of a suite, in the package's order: name, language, and files."""
    with contextlib.redirect_stdout(io.StringIO()):  # The package prints.
        return list(benchmark.get_benchmark_dict()[suite]().tasks)


def _environment() -> Any:
    """The package's environment, whose import needs an OpenGL library.

    Raises:
      ValueError: there is none.
    """
    with _quietly():
        from robosuite.controllers import base_controller

        update = base_controller.Controller.update
        from libero.libero.envs import env_wrapper

    # The package replaces it for an order of arguments that MuJoCo has from 4.0 on.
    if "dst" in (mujoco.mj_fullM.__doc__ or ""):
        base_controller.Controller.update = update
    return env_wrapper.ControlEnv


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Import robosuite without its advice, and without its log in /tmp, which others may own."""
    make, level = logging.FileHandler, logging.root.manager.disable
    logging.FileHandler = lambda *_: logging.NullHandler()  # type: ignore[assignment,misc]
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.FileHandler = make  # type: ignore[misc]
        logging.disable(level)


class Libero:
    """The simulator of one suite."""

    def __init__(self, config: Suite):
        self.config = config
        self._tasks = tasks(config.suite)
        self._numbers = config.numbers()
        self._number: int | None = None
        self._seed: int | None = None
        self.env: Any = None
        # Physics of the last look, and the model it is of.
        self._looked: mujoco.MjData | None = None
        self._looked_at: mujoco.MjModel | None = None

    def reset(self, seed: int) -> None:
        """Begin the episode that `seed` names, after the steps of waiting."""
        trial, place = divmod(seed % FIRST, len(self._numbers))
        number, trial = self._numbers[place], trial % STATES
        before = np.random.get_state()  # LIBERO draws from the global generator.
        try:
            if number != self._number:
                self._build(number)
            self.env.seed(SEED)
            for i in range(trial + 1):
                # Only the last reset needs the model compiled anew, as openpi has it. A compilation
                # adds samplers of drawers and stoves to those before, each of which draws.
                self.env.env.hard_reset = i == trial
                compiled = i + 1 if i == trial else i + 2
                self.env.env.object_property_initializers = self._samplers * compiled
                self.env.reset()
            self.seen: Mapping[str, Any] = self.env.set_init_state(self._states[trial])
            for _ in range(WAIT_STEPS):
                self.seen, *_ = self.env.step(WAIT_ACTION)
        finally:
            np.random.set_state(before)
        self._seed, self._steps, self._succeeded = seed, 0, False
        self._images: images.Images | None = None
        self.carrier: libero_expert.Carrier | None = None

    def _build(self, number: int) -> None:
        if self.env is not None:
            self.env.close()
        try:
            make = _environment()
        except (AttributeError, ImportError, RuntimeError) as error:
            if isinstance(error, ModuleNotFoundError):
                raise
            advice = "which robosuite needs at its import, whatever draws the images"
            raise ValueError(images.no_gl(error, advice)) from error
        task = self._tasks[number]
        folder = pathlib.Path(libero.libero.get_libero_path("bddl_files")) / task.problem_folder
        self.env = make(
            bddl_file_name=str(folder / task.bddl_file),
            has_offscreen_renderer=self.config.renderer == "gl",
            use_camera_obs=False,
        )
        with contextlib.redirect_stdout(io.StringIO()):
            suite = benchmark.get_benchmark_dict()[self.config.suite]()
        self._states = suite.get_task_init_states(number)
        self._samplers = list(self.env.env.object_property_initializers)
        self._number = number
        self._watch()

    def _watch(self) -> None:
        """Keep the physics of the moment at which robosuite's cameras would have looked.

        Its sensors look once in a control step, and early in it: what a policy sees is almost a
        step old. A sensor that copies the physics looks when they do, for images drawn later.
        """
        from robosuite.utils import observables

        def look(_: object) -> Float[np.ndarray, "1"]:
            if self._looked is None or self._looked_at is not self.model:
                self._looked, self._looked_at = mujoco.MjData(self.model), self.model
            mujoco.mj_copyData(self._looked, self.model, self.data)
            return np.zeros(1)

        sensor = observables.sensor(modality="physics")(look)
        rate = self.env.env.control_freq
        self.env.env.add_observable(
            observables.Observable(name="physics", sensor=sensor, sampling_rate=rate)
        )

    @property
    def task(self) -> str:
        """The task's name."""
        assert self._number is not None, "reset first"
        return str(self._tasks[self._number].name)

    @property
    def prompt(self) -> str:
        """The instruction."""
        assert self._number is not None, "reset first"
        return str(self._tasks[self._number].language)

    @property
    def model(self) -> mujoco.MjModel:
        """The compiled scene of this episode."""
        return self.env.sim.model._model

    @property
    def data(self) -> mujoco.MjData:
        """Its physical state."""
        return self.env.sim.data._data

    def step(self, action: simulator.Action) -> None:
        """Apply one action for one period."""
        action = np.asarray(action, np.float64)
        if action.shape != (7,) or not np.isfinite(action).all():
            raise ValueError(f"action: expected seven finite numbers, got {action}")
        self.seen, _, done, _ = self.env.step(action.tolist())
        self._steps += 1
        self._succeeded |= bool(done)

    def state(self) -> Float[np.ndarray, "8"]:
        """Position and axis-angle of the gripper, and its fingers' positions; float32."""
        turn = axis_angle(self.seen["robot0_eef_quat"])
        parts = (self.seen["robot0_eef_pos"], turn, self.seen["robot0_gripper_qpos"])
        return np.concatenate(parts).astype(np.float32)

    def observe(self) -> simulator.Observation:
        """Both images, the state and the prompt, under the robot's keys."""
        return self.look(self.config.image_size)

    def look(self, size: int) -> simulator.Observation:
        """An observation with images of this size."""
        found: simulator.Observation = {
            key: transforms.resize_with_pad(self.render(camera), size)
            for key, camera in CAMERAS.items()
        }
        return {**found, "state": self.state(), "task": self.prompt}

    def render(self, camera: str) -> UInt8[np.ndarray, "h w 3"]:
        """A camera's image as openpi turns it: the right way up, and mirrored."""
        size, looked = self.config.render_size, self._looked
        assert looked is not None, "reset first"
        if self.config.renderer == "ray":
            if self._images is None:
                images.paint(self.model)
                groups = (0, 1, 0, 0, 0, 0)  # What is seen, not what collides.
                self._images = images.Images(self.model, (size, size), "ray", 2, groups=groups)
            return np.ascontiguousarray(self._images.render(looked, camera)[:, ::-1])
        now = mujoco.MjData(self.model)
        mujoco.mj_copyData(now, self.model, self.data)
        mujoco.mj_copyData(self.data, self.model, looked)
        try:
            raw = self.env.sim.render(camera_name=camera, width=size, height=size)
        except Exception as error:  # each backend fails in its own way
            raise ValueError(images.no_gl(error)) from error
        finally:
            mujoco.mj_copyData(self.data, self.model, now)
        return np.ascontiguousarray(raw[::-1, ::-1])

    @property
    def success(self) -> bool:
        """The package's goal held at some step."""
        return self._succeeded

    @property
    def done(self) -> bool:
        """Success or time-out."""
        limit = self.config.max_steps or MAX_STEPS[self.config.suite]
        return self._succeeded or self._steps >= limit

    @property
    def time(self) -> float:
        """Seconds since the episode began."""
        return self._steps / self.config.control_hz


def axis_angle(quaternion: Float[np.ndarray, "4"]) -> Float[np.ndarray, "3"]:
    """Axis times angle of a unit quaternion x, y, z, w."""
    w = min(max(float(quaternion[3]), -1.0), 1.0)
    sine = math.sqrt(1.0 - w * w)
    if math.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3]) * 2.0 * math.acos(w) / sine


def expert(sim: Any) -> Float[np.ndarray, "7"]:
    """The action of the episode's carrier."""
    assert isinstance(sim, Libero), "made by this suite"
    if sim.carrier is None:
        sim.carrier = libero_expert.Carrier(sim)
    return sim.carrier.act()
