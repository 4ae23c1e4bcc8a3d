"""The gantry bench, where a peg touches blocks and enters cups: what its suites share.

A disc, still or turning, carries blocks and cups; a gantry carries a peg. Actions are absolute
targets [x, y, z] in metres for the peg's tip, followed by position servos. Success is physical and
must be held for `HOLD_STEPS` control steps; holding on anything else as long ends the episode as a
failure.

The expert sees the true scene and has no memory: its action is a smooth function of the tip and the
target, so that a policy can imitate it from one observation. The height it asks for falls with the
distance to the target like the wall of a funnel. Demonstrations perturb what is executed and record
the expert's own action in every state reached, and some begin after an unrecorded excursion that
leaves the peg low and a few centimetres off, so that recoveries are in the data while no label has
to foresee a perturbation.
"""

import abc
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import mujoco
import numpy as np
from jaxtyping import Float, UInt8

from shallow_pi.sims import images, pickling, raycast, simulator, turntable_scene

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


class Bench:
    """One compiled scene: some blocks and cups, and the play of the peg in the cups."""

    def __init__(
        self,
        num_blocks: int,
        num_cups: int,
        clearance_mm: float,
        control_hz: float,
        fixtures: str = "",
    ):
        """Compile a disc with so many blocks and cups.

        `clearance_mm` is the radial play of the peg in a cup, `fixtures` MJCF of further bodies on
        the disc.
        """
        self.substeps = math.ceil(1 / control_hz / PHYSICS_TIMESTEP - 1e-9)
        self.hole_radius = turntable_scene.PEG_RADIUS + clearance_mm / 1000
        self.play = clearance_mm / 1000
        timestep = 1 / control_hz / self.substeps
        xml = turntable_scene.xml(num_blocks, num_cups, self.hole_radius, timestep, fixtures)
        self.model = mujoco.MjModel.from_xml_string(xml)
        self.data = mujoco.MjData(self.model)
        names = [f"block{i}" for i in range(num_blocks)] + [f"cup{i}" for i in range(num_cups)]
        self.bodies = np.array([self.model.body(name).id for name in names])
        self.geoms = np.array([self.model.geom(name).id for name in names])
        self.is_cup = np.array([name.startswith("cup") for name in names])
        self.tops = np.where(
            self.is_cup, turntable_scene.CUP_HEIGHT, 2 * turntable_scene.BLOCK_HALF
        )
        self._tip = self.model.site("tip").id
        self._peg = self.model.geom("peg").id

    def lay_out(
        self,
        places: Float[np.ndarray, "n 2"],
        colours: list[str],
        start: Float[np.ndarray, "3"],
        speed: float,
    ) -> None:
        """Begin an episode: the objects' places and colours, the tip's start, the disc's rad/s."""
        mujoco.mj_resetData(self.model, self.data)
        self.model.body_pos[self.bodies, :2] = places
        self.model.geom_rgba[self.geoms, :3] = [turntable_scene.COLOURS[c] for c in colours]
        self.data.qpos[:] = [0.0, *start]
        self.data.qvel[0] = speed
        self.data.ctrl[:] = [*start, speed]
        mujoco.mj_forward(self.model, self.data)

    @property
    def tip(self) -> Float[np.ndarray, "3"]:
        """Of the peg, in the world."""
        return self.data.site_xpos[self._tip].copy()

    @property
    def positions(self) -> Float[np.ndarray, "n 3"]:
        """The middle of each object's top (for a cup: of its rim), in the world."""
        centres = self.data.xpos[self.bodies].copy()
        centres[:, 2] = self.tops
        return centres

    def holding(self) -> int | None:
        """The object that the peg touches (a block) or is inside of (a cup) now."""
        tip = self.tip
        offset = tip[:2] - self.positions[:, :2]
        for i, is_cup in enumerate(self.is_cup):
            if is_cup:
                deep = self.tops[i] - tip[2] >= INSERT_DEPTH
                if deep and np.hypot(*offset[i]) < self.hole_radius:
                    return i
            else:
                local = offset[i] @ self.data.xmat[self.bodies[i]].reshape(3, 3)[:2, :2]
                above = np.abs(local).max() <= turntable_scene.BLOCK_HALF
                near = abs(tip[2] - self.tops[i]) <= TOUCH_GAP
                if (above and near) or self.touches(int(self.geoms[i])):
                    return i
        return None

    def touches(self, geom: int) -> bool:
        """The peg is in contact with a geom."""
        pairs = self.data.contact.geom
        return bool(((pairs == geom).any(1) & (pairs == self._peg).any(1)).any())


class Options(Protocol):
    """The fields that every suite of the bench has."""

    @property
    def tasks(self) -> tuple[str, ...]: ...
    @property
    def control_hz(self) -> float: ...
    @property
    def image_size(self) -> int: ...
    @property
    def max_seconds(self) -> float: ...
    @property
    def renderer(self) -> images.Renderer: ...


def check(options: Options, known: Collection[str]) -> None:
    """Raise a ValueError for values of these fields that cannot be; `known` are the tasks."""
    if not options.tasks or not set(options.tasks) <= set(known):
        raise ValueError(f"tasks: expected some of {list(known)}, got {list(options.tasks)}")
    for name in ("control_hz", "image_size", "max_seconds"):
        if not getattr(options, name) > 0:  # Nor NaN.
            raise ValueError(f"{name}: expected a positive number, got {getattr(options, name)}")
    images.check(options.renderer)


class Sim(pickling.Picklable, abc.ABC):
    """A running episode on a bench (see `simulator.Simulator`); call `reset` first.

    A suite's simulator lays the episode out in `_lay_out`: bench, task, prompt, target, speed.
    """

    bench: Bench
    task: str
    prompt: str
    # Index of the object that is meant.
    target: int
    # Of the disc, radians a second, counter-clockwise seen from above.
    speed: float = 0.0
    light: raycast.Light = raycast.LIGHT
    changing: tuple[str, ...] = ("_steps", "_held", "_held_steps")

    def __init__(self, config: Options):
        self.config = config
        self._images: dict[int, images.Images] = {}
        self._seed: int | None = None

    @abc.abstractmethod
    def _lay_out(self, rng: np.random.Generator) -> None:
        """Choose and lay out an episode."""

    def reset(self, seed: int) -> None:
        """Lay out the episode that `seed` names."""
        self._lay_out(np.random.default_rng(seed))
        self._seed = seed
        self._steps = 0
        self._held: int | None = None
        self._held_steps = 0

    def step(self, action: Float[np.ndarray, "3"]) -> None:
        """Move the servos' targets to `action` (metres, clipped to the reach) for one period."""
        action = np.asarray(action, np.float64)
        if action.shape != (3,) or not np.isfinite(action).all():
            raise ValueError(f"action: expected three finite numbers [x, y, z], got {action}")
        self.data.ctrl[:3] = np.clip(action, *turntable_scene.REACH)
        self._advance()
        mujoco.mj_fwdPosition(self.model, self.data)  # poses and contacts of the state reached
        self._steps += 1
        held = self.bench.holding()
        self._held_steps = 0 if held is None else self._held_steps + 1 if held == self._held else 1
        self._held = held

    def _advance(self) -> None:
        mujoco.mj_step(self.model, self.data, self.bench.substeps)

    @property
    def model(self) -> mujoco.MjModel:
        """The compiled scene of this episode."""
        return self.bench.model

    @property
    def data(self) -> mujoco.MjData:
        """Its physical state."""
        return self.bench.data

    @property
    def tip(self) -> Float[np.ndarray, "3"]:
        """Of the peg, in the world."""
        return self.bench.tip

    def happened(self) -> dict[str, float]:
        """The disc's speed, degrees a second."""
        return {"disc_speed": round(float(np.rad2deg(self.speed)))}

    @property
    def positions(self) -> Float[np.ndarray, "n 3"]:
        """The middle of each object's top (for a cup: of its rim), in the world."""
        return self.bench.positions

    @property
    def inserts(self) -> bool:
        """The target is a cup, not a block."""
        return bool(self.bench.is_cup[self.target])

    def observe(self) -> simulator.Observation:
        """Both images, the state and the prompt, under LeRobot's keys."""
        views = {f"observation.images.{name}": self.render(name) for name in CAMERAS}
        return {**views, "observation.state": self.state(), "task": self.prompt}

    def state(self) -> Float[np.ndarray, " sd"]:
        """The tip's own position, metres, float32."""
        return self.tip.astype(np.float32)

    def render(self, camera: str) -> UInt8[np.ndarray, "h w 3"]:
        """One camera's image of the current state."""
        key = id(self.bench)
        for other, scene in self._images.items():
            if other != key:
                scene.close()
        if key not in self._images:
            size = (self.config.image_size,) * 2
            self._images[key] = images.Images(self.model, size, self.config.renderer, shadows=False)
        return self._images[key].render(self.data, camera, self.light)

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


def scatter(rng: np.random.Generator, count: int) -> Float[np.ndarray, "n 2"]:
    """Places on the disc, at least SEPARATION apart, uniform over the ring's area."""
    while True:
        places: list[np.ndarray] = []
        for _ in range(40 * count):
            place = somewhere(rng, MIN_RADIUS)
            if all(np.hypot(*(place - other)) >= SEPARATION for other in places):
                places.append(place)
            if len(places) == count:
                return np.stack(places)


def colours(rng: np.random.Generator, num_blocks: int, num_cups: int) -> list[str]:
    """A colour of each object, blocks first: no two blocks have the same, and no two cups."""
    names = list(turntable_scene.COLOURS)
    return [str(c) for count in (num_blocks, num_cups) for c in rng.permutation(names)[:count]]


def prompts(templates: Mapping[str, Sequence[str]]) -> list[str]:
    """Every instruction that templates, by task, give with every colour."""
    every = [template for of_task in templates.values() for template in of_task]
    return sorted({one.format(colour=c) for one in every for c in turntable_scene.COLOURS})


def somewhere(rng: np.random.Generator, least: float) -> Float[np.ndarray, "2"]:
    """A place on the disc, at least `least` metres from its centre, uniform over the area."""
    radius = np.sqrt(rng.uniform(least**2, MAX_RADIUS**2))
    angle = rng.uniform(0, 2 * np.pi)
    return radius * np.array([np.cos(angle), np.sin(angle)])


def ramp(value: float, low: float, high: float) -> float:
    """0 below `low`, 1 above `high`, smooth between."""
    x = float(np.clip((value - low) / (high - low), 0.0, 1.0))
    return x * x * (3 - 2 * x)


def limit(way: Float[np.ndarray, " n"], longest: float) -> Float[np.ndarray, " n"]:
    """`way`, shortened smoothly so that it never exceeds `longest`."""
    return way / np.sqrt(1 + (way @ way) / longest**2)


def reach(sim: Sim, way: Float[np.ndarray, "2"] | None = None) -> Float[np.ndarray, "3"]:
    """The expert's absolute target for the tip: above the object, down into line, and pressing.

    `way` goes across, from the tip to where it should be; None is straight to the target, ahead of
    it on a disc that turns.
    """
    tip, goal = sim.tip, sim.positions[sim.target]
    if way is None:
        turn = sim.speed * (SERVO_LAG + 0.5 / sim.config.control_hz)
        cos, sin = np.cos(turn), np.sin(turn)
        way = np.array([[cos, -sin], [sin, cos]]) @ goal[:2] - tip[:2]
    error = float(np.hypot(*(tip[:2] - goal[:2])))
    if sim.inserts:
        play = sim.bench.play
        depth, inner, outer = PLUNGE_DEPTH, 0.7 * play, 1.5 * play
    else:
        depth, inner, outer = PRESS_DEPTH, 0.004, 0.011
    brim = 0.004  # kept above the target's top until in line
    height = -depth + (brim + depth) * ramp(error, inner, outer)
    height += (HOVER - brim) * ramp(error, outer, outer + 0.022)
    # Beside the target and low: rise first, so as not to push against its side.
    low = 1 - ramp(tip[2] - goal[2], -0.004, 0.002)
    free = 1 - low * ramp(error, outer, 1.5 * outer)
    across = limit(free * way, STRIDE)
    down = limit(np.array([goal[2] + height - tip[2]]), STRIDE)
    return tip + np.concatenate([across, down])


def demonstrate(
    sim: Sim,
    expert: simulator.Expert,
    rng: np.random.Generator,
    noise: float,
    excursions: float = 0.4,
) -> Iterator[tuple[simulator.Observation, simulator.Action]]:
    """Play a perturbed episode, just reset; yield what is seen, and the expert's own action there.

    `noise` is the scale of the perturbations, 0 for the expert's own path; `excursions` is the
    share of the episodes that begin after one.
    """
    if noise and rng.uniform() < excursions:
        _excursion(sim, rng, noise)
    play = sim.bench.play if sim.inserts else np.inf
    spread = noise * rng.uniform(0, min(0.003, play))  # metres, of the perturbation
    wander = np.zeros(3)
    while not sim.done:
        clean = expert(sim)
        yield sim.observe(), clean
        wander = 0.7 * wander + np.sqrt(1 - 0.7**2) * rng.normal(scale=spread, size=3)
        sim.step(clean + wander)


def _excursion(sim: Sim, rng: np.random.Generator, noise: float) -> None:
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
        sim.step(sim.tip + limit(way, 5 * STRIDE))
