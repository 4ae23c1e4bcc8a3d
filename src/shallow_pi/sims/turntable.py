"""The turntable: a peg on a gantry touches the named block or enters the named cup.

A disc, still or turning, carries blocks and cups in random places and colours; only the prompt says
which one is meant. Actions are absolute targets [x, y, z] in metres for the peg's tip, followed by
position servos; the state is the tip's own position. Success is physical and must be held for
`HOLD_STEPS` control steps; holding on anything else as long ends the episode as a failure.

The expert sees the true scene and has no memory: its action is a smooth function of the tip and the
target, so that a policy can imitate it from one observation. The height it asks for falls with the
distance to the target like the wall of a funnel. Demonstrations perturb what is executed and record
the expert's own action in every state reached, and some begin after an unrecorded excursion that
leaves the peg low and a few centimetres off, so that recoveries are in the data while no label has
to foresee a perturbation.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import mujoco
import numpy as np
from jaxtyping import Float, UInt8

from shallow_pi.data.robots import robot as robots
from shallow_pi.sims import raycast, simulator, turntable_scene

PROMPTS: dict[str, tuple[str, ...]] = {
    "touch": ("touch the {colour} block", "tap the {colour} block"),
    "insert": ("put the peg into the {colour} cup", "insert the peg in the {colour} cup"),
}
CAMERAS = ("base", "wrist")
HOLD_STEPS = 4
INSERT_DEPTH = 0.012  # of the tip below the rim, metres
TOUCH_GAP = 0.0015  # of the tip to the top of a block that still counts, metres
MIN_RADIUS, MAX_RADIUS = 0.04, 0.12  # of the objects' places on the disc
SEPARATION = 0.052  # of two objects' centres: the peg passes between any two
PHYSICS_TIMESTEP = 0.005  # at most, seconds

# Of the expert, metres.
HOVER = 0.035  # above the target's top
STRIDE = 0.008  # longest way from the tip to the commanded point: about 0.2 m/s
PRESS_DEPTH = 0.004  # commanded below a block's top
PLUNGE_DEPTH = 0.020  # commanded below a cup's rim
SERVO_LAG = turntable_scene.SERVO_DAMPING / turntable_scene.SERVO_STIFFNESS  # seconds


@dataclasses.dataclass(frozen=True)
class Suite:
    """One family of episodes; all of them share one compiled scene (see `simulator.Suite`)."""

    # Tasks to draw from, equally likely: names in PROMPTS.
    tasks: tuple[str, ...] = ("touch", "insert")
    # Blocks on the disc, each of another colour.
    num_blocks: int = 2
    # Cups on the disc, each of another colour (which a block may have too).
    num_cups: int = 2
    # Radial play of the peg in a cup, millimetres.
    clearance_mm: float = 3.0
    # Speed of the disc, degrees a second, counter-clockwise seen from above.
    disc_speed_deg: float = 0.0
    # Actions a second.
    control_hz: float = 20.0
    # Height and width of the pictures, pixels.
    image_size: int = 48
    # Episodes are cut off here, seconds.
    max_seconds: float = 4.0
    # Pictures by ray casting ("ray") or by MuJoCo's OpenGL renderer ("gl").
    renderer: Literal["ray", "gl"] = "ray"

    def __post_init__(self) -> None:
        unknown = [task for task in self.tasks if task not in PROMPTS]
        if unknown or not self.tasks:
            raise ValueError(f"tasks: expected some of {list(PROMPTS)}, got {list(self.tasks)}")
        for name, task in (("num_blocks", "touch"), ("num_cups", "insert")):
            count, least = getattr(self, name), int(task in self.tasks)
            if not least <= count <= 4:
                raise ValueError(f"{name}: expected {least} to 4 for {self.tasks}, got {count}")
        if not 0.5 <= self.clearance_mm <= 8.0:
            raise ValueError(f"clearance_mm: expected 0.5 to 8, got {self.clearance_mm}")
        for name in ("control_hz", "image_size", "max_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.renderer not in ("ray", "gl"):
            raise ValueError(f'renderer: expected "ray" or "gl", got {self.renderer!r}')

    @property
    def hole_radius(self) -> float:
        """Of a cup's hole, metres."""
        return turntable_scene.PEG_RADIUS + self.clearance_mm / 1000

    @property
    def robot(self) -> robots.Robot:
        """The gantry."""
        return dataclasses.replace(robots.TURNTABLE, fps=self.control_hz)

    def names(self) -> Mapping[str, tuple[str, ...]]:
        """Axes of the tip's position and of its target."""
        return dict.fromkeys((*self.robot.state_keys, self.robot.action_key), ("x", "y", "z"))

    def make(self) -> "Turntable":
        """Compile the scene."""
        return Turntable(self)

    def prompts(self) -> list[str]:
        """Every instruction of every task."""
        return prompts()

    def harder(self) -> Mapping[str, "Suite"]:
        """Less play; more to choose from."""
        return {
            "tight": dataclasses.replace(self, tasks=("insert",), clearance_mm=1.5),
            "crowded": dataclasses.replace(self, num_blocks=3, num_cups=3),
        }

    def expert(self) -> simulator.Expert:
        """Go above the target, descend while coming into line, and keep pressing."""
        return expert

    def demonstrate(
        self, sim: simulator.Simulator, rng: np.random.Generator, noise: float
    ) -> Iterator[tuple[simulator.Observation, simulator.Action]]:
        """Play a perturbed episode; yield what is seen, and the expert's own action there."""
        assert isinstance(sim, Turntable), "made by this suite"
        return _demonstrate(sim, rng, noise)


def prompts(tasks: tuple[str, ...] = tuple(PROMPTS)) -> list[str]:
    """Every instruction the tasks can give."""
    return [
        template.format(colour=colour)
        for task in tasks
        for template in PROMPTS[task]
        for colour in turntable_scene.COLOURS
    ]


class Turntable:
    """The simulator (see `simulator.Simulator`); call `reset` before anything else."""

    def __init__(self, config: Suite):
        self.config = config
        self._substeps = int(np.ceil(1 / config.control_hz / PHYSICS_TIMESTEP - 1e-9))
        timestep = 1 / config.control_hz / self._substeps
        self.model = mujoco.MjModel.from_xml_string(
            turntable_scene.xml(config.num_blocks, config.num_cups, config.hole_radius, timestep)
        )
        self.data = mujoco.MjData(self.model)
        self._objects = [f"block{i}" for i in range(config.num_blocks)]
        self._objects += [f"cup{i}" for i in range(config.num_cups)]
        self._bodies = np.array([self.model.body(name).id for name in self._objects])
        self._geoms = np.array([self.model.geom(name).id for name in self._objects])
        self._is_cup = np.array([name.startswith("cup") for name in self._objects])
        self._tops = np.where(
            self._is_cup, turntable_scene.CUP_HEIGHT, 2 * turntable_scene.BLOCK_HALF
        )
        self._tip = self.model.site("tip").id
        self._peg = self.model.geom("peg").id
        self._cameras: dict[str, raycast.RayCamera] | None = None
        self._gl: mujoco.Renderer | None = None
        self._seed: int | None = None

    def reset(self, seed: int) -> None:
        """Lay out the episode that `seed` names."""
        rng = np.random.default_rng(seed)
        config, model = self.config, self.model
        self._seed = seed
        self._task = config.tasks[rng.integers(len(config.tasks))]
        template = PROMPTS[self._task][rng.integers(len(PROMPTS[self._task]))]
        colours = [
            *rng.permutation(list(turntable_scene.COLOURS))[: config.num_blocks],
            *rng.permutation(list(turntable_scene.COLOURS))[: config.num_cups],
        ]
        wanted = np.flatnonzero(self._is_cup == (self._task == "insert"))
        self.target = int(rng.choice(wanted))
        self._colours = [str(colour) for colour in colours]
        self._prompt = template.format(colour=self._colours[self.target])
        mujoco.mj_resetData(model, self.data)
        model.body_pos[self._bodies, :2] = _scatter(rng, len(self._objects))
        model.geom_rgba[self._geoms, :3] = [turntable_scene.COLOURS[c] for c in self._colours]
        start = rng.uniform((-0.12, -0.12, 0.05), (0.12, 0.12, 0.10))
        self.data.qpos[:] = [0.0, *start]
        self.data.qvel[0] = np.deg2rad(config.disc_speed_deg)
        self.data.ctrl[:] = [*start, np.deg2rad(config.disc_speed_deg)]
        mujoco.mj_forward(model, self.data)
        self._steps = 0
        self._held: int | None = None
        self._held_steps = 0

    def step(self, action: Float[np.ndarray, "3"]) -> None:
        """Move the servos' targets to `action` (metres, clipped to the reach) for one period."""
        action = np.asarray(action, np.float64)
        if action.shape != (3,) or not np.isfinite(action).all():
            raise ValueError(f"action: expected three finite numbers [x, y, z], got {action}")
        self.data.ctrl[:3] = np.clip(action, *turntable_scene.REACH)
        mujoco.mj_step(self.model, self.data, self._substeps)
        mujoco.mj_fwdPosition(self.model, self.data)  # poses and contacts of the state reached
        self._steps += 1
        held = self._holding()
        self._held_steps = 0 if held is None else self._held_steps + 1 if held == self._held else 1
        self._held = held

    def _holding(self) -> int | None:
        """The object that the peg touches (a block) or is inside of (a cup) now."""
        tip = self.tip
        offset = tip[:2] - self.positions[:, :2]
        for i, is_cup in enumerate(self._is_cup):
            if is_cup:
                deep = self._tops[i] - tip[2] >= INSERT_DEPTH
                if deep and np.hypot(*offset[i]) < self.config.hole_radius:
                    return i
            else:
                local = offset[i] @ self.data.xmat[self._bodies[i]].reshape(3, 3)[:2, :2]
                above = np.abs(local).max() <= turntable_scene.BLOCK_HALF
                near = abs(tip[2] - self._tops[i]) <= TOUCH_GAP
                if (above and near) or self._in_contact(self._geoms[i]):
                    return i
        return None

    def _in_contact(self, geom: int) -> bool:
        pairs = self.data.contact.geom
        return bool(((pairs == geom).any(1) & (pairs == self._peg).any(1)).any())

    def observe(self) -> dict[str, Any]:
        """Both pictures, the tip's position and the prompt, under LeRobot's keys."""
        pictures = {f"observation.images.{name}": self.render(name) for name in CAMERAS}
        state = self.tip.astype(np.float32)
        return {**pictures, "observation.state": state, "task": self._prompt}

    def render(self, camera: str) -> UInt8[np.ndarray, "h w 3"]:
        """One camera's picture of the current state."""
        size = self.config.image_size
        if self.config.renderer == "gl":
            return self._render_gl(camera)
        if self._cameras is None:
            self._cameras = {c: raycast.RayCamera(self.model, c, size, size) for c in CAMERAS}
        return self._cameras[camera].render(self.data)

    def _render_gl(self, camera: str) -> UInt8[np.ndarray, "h w 3"]:
        if self._gl is None:
            size = self.config.image_size
            try:
                self._gl = mujoco.Renderer(self.model, size, size)
            except Exception as error:  # each backend fails in its own way
                raise ValueError(
                    f'renderer="gl" needs an OpenGL backend and none works here ({error}); set '
                    'MUJOCO_GL to egl or osmesa after installing it, or use renderer="ray"'
                ) from error
        self._gl.update_scene(self.data, camera)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._gl.scene.flags[flag] = 0
        return self._gl.render()

    @property
    def tip(self) -> Float[np.ndarray, "3"]:
        """Of the peg, in the world."""
        return self.data.site_xpos[self._tip].copy()

    @property
    def positions(self) -> Float[np.ndarray, "n 3"]:
        """The middle of each object's top (for a cup: of its rim), in the world."""
        centres = self.data.xpos[self._bodies].copy()
        centres[:, 2] = self._tops
        return centres

    @property
    def colours(self) -> list[str]:
        """Of the objects: blocks first, then cups."""
        return list(self._colours)

    @property
    def task(self) -> str:
        """`touch` or `insert`."""
        return self._task

    @property
    def prompt(self) -> str:
        """The instruction in words."""
        return self._prompt

    @property
    def success(self) -> bool:
        """The target was held long enough."""
        return self._held == self.target and self._held_steps >= HOLD_STEPS

    @property
    def failure(self) -> bool:
        """Something else was held as long."""
        return self._held != self.target and self._held_steps >= HOLD_STEPS

    @property
    def done(self) -> bool:
        """Success, failure or time-out."""
        return self.success or self.failure or self.time >= self.config.max_seconds - 1e-9

    @property
    def time(self) -> float:
        """Seconds since the episode began."""
        return self._steps / self.config.control_hz

    def __getstate__(self) -> dict[str, Any]:
        state: tuple[np.ndarray, int, int | None, int] | None = None
        if self._seed is not None:
            kind = mujoco.mjtState.mjSTATE_INTEGRATION
            physics = np.empty(mujoco.mj_stateSize(self.model, kind))
            mujoco.mj_getState(self.model, self.data, physics, kind)
            state = (physics, self._steps, self._held, self._held_steps)
        return {"config": self.config, "seed": self._seed, "state": state}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.__init__(pickled["config"])  # type: ignore[misc]  # the model is built anew
        if pickled["seed"] is not None:
            self.reset(pickled["seed"])
            state, self._steps, self._held, self._held_steps = pickled["state"]
            kind = mujoco.mjtState.mjSTATE_INTEGRATION
            mujoco.mj_setState(self.model, self.data, state, kind)
            mujoco.mj_fwdPosition(self.model, self.data)


def _scatter(rng: np.random.Generator, count: int) -> Float[np.ndarray, "n 2"]:
    """Places on the disc, at least SEPARATION apart, uniform over the ring's area."""
    while True:
        places: list[np.ndarray] = []
        for _ in range(40 * count):
            radius = np.sqrt(rng.uniform(MIN_RADIUS**2, MAX_RADIUS**2))
            angle = rng.uniform(0, 2 * np.pi)
            place = radius * np.array([np.cos(angle), np.sin(angle)])
            if all(np.hypot(*(place - other)) >= SEPARATION for other in places):
                places.append(place)
            if len(places) == count:
                return np.stack(places)


def _ramp(value: float, low: float, high: float) -> float:
    """0 below `low`, 1 above `high`, smooth between."""
    x = float(np.clip((value - low) / (high - low), 0.0, 1.0))
    return x * x * (3 - 2 * x)


def _limit(way: Float[np.ndarray, " n"], longest: float) -> Float[np.ndarray, " n"]:
    """`way`, shortened smoothly so that it never exceeds `longest`."""
    return way / np.sqrt(1 + (way @ way) / longest**2)


def expert(sim: Turntable) -> Float[np.ndarray, "3"]:
    """The absolute target for the tip, from the simulator's true state."""
    tip, goal = sim.tip, sim.positions[sim.target]
    turn = np.deg2rad(sim.config.disc_speed_deg) * (SERVO_LAG + 0.5 / sim.config.control_hz)
    cos, sin = np.cos(turn), np.sin(turn)
    ahead = np.array([[cos, -sin], [sin, cos]]) @ goal[:2]  # where a turning target will be
    error = float(np.hypot(*(tip[:2] - goal[:2])))
    if sim.task == "insert":
        play = sim.config.clearance_mm / 1000
        depth, inner, outer = PLUNGE_DEPTH, 0.7 * play, 1.5 * play
    else:
        depth, inner, outer = PRESS_DEPTH, 0.004, 0.011
    brim = 0.004  # kept above the target's top until in line
    height = -depth + (brim + depth) * _ramp(error, inner, outer)
    height += (HOVER - brim) * _ramp(error, outer, outer + 0.022)
    # Beside the target and low: rise first, so as not to push against its side.
    low = 1 - _ramp(tip[2] - goal[2], -0.004, 0.002)
    free = 1 - low * _ramp(error, outer, 1.5 * outer)
    across = _limit(free * (ahead - tip[:2]), STRIDE)
    down = _limit(np.array([goal[2] + height - tip[2]]), STRIDE)
    return tip + np.concatenate([across, down])


def _demonstrate(
    sim: Turntable, rng: np.random.Generator, noise: float
) -> Iterator[tuple[simulator.Observation, simulator.Action]]:
    if noise and rng.uniform() < 0.4:
        _excursion(sim, rng, noise)
    play = sim.config.clearance_mm / 1000 if sim.task == "insert" else np.inf
    spread = noise * rng.uniform(0, min(0.003, play))  # metres, of the perturbation
    wander = np.zeros(3)
    while not sim.done:
        clean = expert(sim)
        yield sim.observe(), clean
        wander = 0.7 * wander + np.sqrt(1 - 0.7**2) * rng.normal(scale=spread, size=3)
        sim.step(clean + wander)


def _excursion(sim: Turntable, rng: np.random.Generator, noise: float) -> None:
    """Bring the peg, unrecorded, near some object: mostly the target, at any height above it."""
    wanted = sim.target if rng.uniform() < 0.8 else int(rng.integers(len(sim.positions)))
    spot = sim.positions[wanted] + [*rng.normal(scale=noise * 0.02, size=2), 0.0]
    spot[2] += rng.uniform(0.002, HOVER)
    expert_height = turntable_scene.CUP_HEIGHT + HOVER
    for _ in range(40):
        way = spot - sim.tip
        if np.hypot(*way[:2]) > 0.01:
            way[2] = max(spot[2], expert_height) - sim.tip[2]
        if np.linalg.norm(way) < 0.004 or sim.done:
            return
        sim.step(sim.tip + _limit(way, 5 * STRIDE))
