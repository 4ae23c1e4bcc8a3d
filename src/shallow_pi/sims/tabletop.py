"""The tabletop: a suite of language tasks on the gantry bench, one for each property of a policy.

| task | needs |
|---|---|
| `touch`, `insert` | words matched to colours: the named object among four |
| `precise` | the same insertion with 1 mm of play |
| `relation` | words matched to pixels twice: left or right of, or nearest to, what is named |
| `around` | two modes: past a pillar by a coin that no observation shows; its core is fatal |
| `clutter` | eight objects, of which one has the named colour, under changing light and colours |
| `moving` | a disc that turns at 15 or 30 degrees a second, either way round |

The state is the tip's position and the disc's speed in radians a second. `around` is the task that
tells few integration steps from many: the mean of the two ways leads into the pillar, so a plan of
`EXECUTE_STEPS` actions is executed whole there. The pillar is soft foam, which may be brushed,
around a hard core: touching that fails.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

import mujoco
import numpy as np
from jaxtyping import Float

from shallow_pi.data.robots import robot as robots
from shallow_pi.sims import gantry, raycast, simulator, turntable, turntable_scene

EXECUTE_STEPS = 20  # one second
PILLAR_RADIUS, CORE_RADIUS, PILLAR_HEIGHT = 0.012, 0.003, 0.11
DETOUR = 0.045  # of the way past the pillar, from its centre, metres
NEIGHBOUR = (0.046, 0.058)  # of a block and the one it is told by, metres
APART = 0.085  # of a pair and everything else, metres

# Blocks, cups and the peg's radial play in millimetres.
LAYOUTS: dict[str, tuple[int, int, float]] = {
    "touch": (2, 2, 3.0),
    "insert": (2, 2, 3.0),
    "precise": (1, 2, 1.0),
    "relation": (3, 2, 3.0),
    "around": (1, 0, 3.0),
    "clutter": (4, 4, 3.0),
    "moving": (1, 2, 4.0),
}
PROMPTS: dict[str, tuple[str, ...]] = {
    **turntable.PROMPTS,
    "left": ("touch the block left of the {colour} block",),
    "right": ("touch the block right of the {colour} block",),
    "nearest": ("touch the block nearest the {colour} cup",),
    "around": ("go around the pillar and touch the block",),
}


@dataclasses.dataclass(frozen=True)
class Suite:
    """One family of episodes (see `simulator.Suite`)."""

    # Tasks to draw from, equally likely: names in LAYOUTS.
    tasks: tuple[str, ...] = tuple(LAYOUTS)
    # Initial positions of the arm: as in the demonstrations, or where none started.
    start: Literal["usual", "elsewhere"] = "usual"
    # Actions a second.
    control_hz: float = 20.0
    # Height and width of the images in pixels.
    image_size: int = 48
    # Length of an episode in seconds, at most.
    max_seconds: float = 5.0
    # Images by ray casting ("ray") or by MuJoCo's OpenGL renderer ("gl").
    renderer: Literal["ray", "gl"] = "ray"

    def __post_init__(self) -> None:
        gantry.check(self, LAYOUTS)
        if self.start not in ("usual", "elsewhere"):
            raise ValueError(f'start: expected "usual" or "elsewhere", got {self.start!r}')

    @property
    def robot(self) -> robots.Robot:
        """The gantry, which also reads the disc's speed."""
        return dataclasses.replace(robots.TABLETOP, fps=self.control_hz)

    def names(self) -> Mapping[str, tuple[str, ...]]:
        """Axes of the tip's position and of its target; the disc's speed."""
        (state,), action = self.robot.state_keys, self.robot.action_key
        return {state: ("x", "y", "z", "disc_speed"), action: ("x", "y", "z")}

    def make(self) -> "Tabletop":
        """Build the simulator; scenes are compiled when a task first needs them."""
        return Tabletop(self)

    def task_names(self) -> tuple[str, ...]:
        """The tasks to draw from."""
        return self.tasks

    def prompts(self) -> list[str]:
        """Every instruction of every task."""
        return gantry.prompts(PROMPTS)

    def moving(self) -> "Suite":
        """The task whose disc turns."""
        return dataclasses.replace(self, tasks=("moving",))

    def harder(self) -> Mapping[str, "Suite"]:
        """Starts where no demonstration did."""
        return {"elsewhere": dataclasses.replace(self, start="elsewhere")}

    def expert(self) -> simulator.Expert:
        """Go to the target, past the pillar on the coin's side."""
        return expert

    def demonstrate(
        self, sim: simulator.Simulator, rng: np.random.Generator, noise: float
    ) -> Iterator[tuple[simulator.Observation, simulator.Action]]:
        """Play a perturbed episode; yield what is seen, and the expert's own action there."""
        assert isinstance(sim, Tabletop), "made by this suite"
        excursions = 0.0 if sim.task == "around" else 0.4
        return gantry.demonstrate(sim, expert, rng, noise, excursions)


class Tabletop(gantry.Sim):
    """The simulator of one suite."""

    config: Suite
    changing = (*gantry.Sim.changing, "collided")

    def __init__(self, config: Suite):
        super().__init__(config)
        self._benches: dict[tuple[int, int, float, bool], gantry.Bench] = {}

    def _enter(self, task: str) -> None:
        """Take the task's scene, compiled once for all tasks that share it."""
        layout, fixtures = LAYOUTS[task], ""
        if task == "around":
            half = PILLAR_HEIGHT / 2
            fixtures = (
                f'<body name="pillar" pos="0 0 {half}">'
                f'<geom class="seen" type="cylinder" size="{PILLAR_RADIUS} {half}" '
                f'rgba=".97 .97 .97 1"/><geom name="core" class="target" group="3" '
                f'type="cylinder" size="{CORE_RADIUS} {half}"/></body>'
            )
        key = (*layout, bool(fixtures))
        if key not in self._benches:
            bench = gantry.Bench(*layout, self.config.control_hz, fixtures)
            self._benches[key] = bench
        self.task, self.bench = task, self._benches[key]
        self._core = self.model.geom("core").id if fixtures else None

    def _lay_out(self, rng: np.random.Generator) -> None:
        self._enter(str(self.config.tasks[rng.integers(len(self.config.tasks))]))
        num_blocks, num_cups, _ = LAYOUTS[self.task]
        colours = gantry.colours(rng, num_blocks, num_cups)
        start = rng.uniform((-0.12, -0.12, 0.05), (0.12, 0.02, 0.10))
        if self.config.start == "elsewhere":
            start[1] = rng.uniform(0.07, 0.12)
        self.speed, self.side, self.collided = 0.0, 0, False
        self.light = raycast.LIGHT
        if self.task == "around":
            start, places, pillar = _opposite(rng)
            self.model.body_pos[self.model.geom_bodyid[self._core], :2] = pillar
            self.side = 1 if rng.uniform() < 0.5 else -1  # The coin; only the expert knows it.
            kind, named, self.target = "around", 0, 0
        elif self.task == "relation":
            kind, places, named, self.target = _related(rng)
        else:
            places = gantry.scatter(rng, num_blocks + num_cups)
            kind = {"touch": "touch", "insert": "insert", "precise": "insert"}.get(self.task, "")
            kind = kind or str(rng.choice(["touch", "insert"]))
            named = int(rng.choice(np.flatnonzero(self.bench.is_cup == (kind == "insert"))))
            self.target = named
        if self.task == "clutter":
            _name_by_colour(colours, named, num_blocks)
        if self.task == "moving":
            self.speed = float(np.deg2rad(rng.choice([-30.0, -15.0, 15.0, 30.0])))
        self.prompt = str(rng.choice(PROMPTS[kind])).format(colour=colours[named])
        self.bench.lay_out(places, colours, start, self.speed)
        if self.task == "clutter":
            self._repaint(rng)

    def _repaint(self, rng: np.random.Generator) -> None:
        """Shade the objects, paint disc and table, and move the light."""
        rgba = self.model.geom_rgba
        rgba[self.bench.geoms, :3] *= rng.uniform(0.85, 1.0, (len(self.bench.geoms), 1))
        rgba[self.model.geom("disc").id, :3] = rng.uniform(0.55, 0.95, 3)
        rgba[self.model.geom("table").id, :3] = rng.uniform(0.15, 0.6, 3)
        turn = rng.uniform(0, 2 * np.pi)
        towards = (0.6 * np.cos(turn), 0.6 * np.sin(turn), 0.8)
        self.light = raycast.Light(towards, ambient=float(rng.uniform(0.35, 0.6)))

    def _advance(self) -> None:
        if self._core is None:
            super()._advance()
            return
        for _ in range(self.bench.substeps):
            mujoco.mj_step(self.model, self.data)
            self.collided |= self.bench.touches(self._core)

    def happened(self) -> dict[str, float]:
        """Outcomes of the episode, with a touch of the pillar's core."""
        return {"collided": float(self.collided), **super().happened()}

    def state(self) -> Float[np.ndarray, "4"]:
        """The tip's position in metres and the disc's speed in radians a second, float32."""
        return np.array([*self.tip, self.speed], np.float32)

    @property
    def pillar(self) -> Float[np.ndarray, "2"] | None:
        """The pillar's centre in the world, where there is one."""
        return None if self._core is None else self.data.geom_xpos[self._core, :2].copy()

    @property
    def success(self) -> bool:
        """The target was held long enough, and the pillar's core never touched."""
        return super().success and not self.collided

    @property
    def failure(self) -> bool:
        """Something else was held as long, or the pillar's core was touched."""
        return self.collided or super().failure


def expert(sim: Tabletop) -> Float[np.ndarray, "3"]:
    """The absolute target for the tip, from the simulator's true state and the coin."""
    pillar, tip = sim.pillar, sim.tip[:2]
    if pillar is None:
        return gantry.reach(sim)
    goal = sim.positions[sim.target, :2]
    line = (goal - pillar) / np.linalg.norm(goal - pillar)
    normal = sim.side * np.array([-line[1], line[0]])
    before = -float((tip - pillar) @ line)  # still to go until level with the pillar
    beside = float((tip - pillar) @ normal)
    # First to the point beside the pillar; level with it, straight to the goal.
    waypoint = pillar + DETOUR * normal + 0.004 * line
    near = before < 0.03
    share = gantry.ramp(before, -0.004, 0.012)
    share *= 1 - near * gantry.ramp(beside, DETOUR - 0.012, DETOUR + 0.02)
    return gantry.reach(sim, share * (waypoint - tip) * 2 + (1 - share) * (goal - tip))


def _name_by_colour(colours: list[str], named: int, num_blocks: int) -> None:
    """Repaint the object of the other kind that has the colour of the one named, if there is one.

    `relation` tells whether kinds and colours are read together.
    """
    blocks, cups = slice(None, num_blocks), slice(num_blocks, None)
    others = cups if named < num_blocks else blocks
    free = [name for name in turntable_scene.COLOURS if name not in colours[others]]
    colours[others] = [free[0] if name == colours[named] else name for name in colours[others]]


def _related(rng: np.random.Generator) -> tuple[str, Float[np.ndarray, "5 2"], int, int]:
    """Three blocks and two cups: relation, places, and which object is named and which is meant."""
    kind = str(rng.choice(["left", "right", "nearest"]))
    while True:
        found = _nearest(rng) if kind == "nearest" else _in_a_row(rng, kind)
        if found is not None:
            return kind, *found


def _in_a_row(
    rng: np.random.Generator, kind: str
) -> tuple[Float[np.ndarray, "5 2"], int, int] | None:
    """A block between two others: either may be meant, so the word decides."""
    middle = gantry.somewhere(rng, gantry.MIN_RADIUS)
    tilt, reach = rng.uniform(-0.35, 0.35, 2), rng.uniform(*NEIGHBOUR, 2)
    left = middle - reach[0] * np.array([np.cos(tilt[0]), np.sin(tilt[0])])
    right = middle + reach[1] * np.array([np.cos(tilt[1]), np.sin(tilt[1])])
    if max(np.hypot(*left), np.hypot(*right)) > gantry.MAX_RADIUS:
        return None
    cups: list[np.ndarray] = []
    for _ in range(2):
        place = _free(rng, {gantry.SEPARATION: [middle, left, right, *cups]})
        if place is None:
            return None
        cups.append(place)
    order = rng.permutation(3)
    places = np.empty((5, 2))
    places[order] = middle, left, right
    places[3:] = cups
    return places, int(order[0]), int(order[1 if kind == "left" else 2])


def _nearest(rng: np.random.Generator) -> tuple[Float[np.ndarray, "5 2"], int, int] | None:
    """Two cups with a block beside each, and a third block far from both cups."""
    cups = gantry.scatter(rng, 2)
    angle, reach = rng.uniform(0, 2 * np.pi, 2), rng.uniform(*NEIGHBOUR, 2)
    beside = cups + reach[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    crossed = min(np.hypot(*(beside[i] - cups[1 - i])) for i in (0, 1))
    if (
        np.hypot(*(cups[0] - cups[1])) < 2 * APART - 0.05
        or np.hypot(*beside.T).max() > gantry.MAX_RADIUS
        or crossed < APART
        or np.hypot(*(beside[0] - beside[1])) < gantry.SEPARATION
    ):
        return None
    third = _free(rng, {APART: list(cups), gantry.SEPARATION: list(beside)})
    if third is None:
        return None
    which = int(rng.integers(2))
    return np.stack([*beside, third, *cups]), 3 + which, which


def _free(
    rng: np.random.Generator, taken: Mapping[float, list[np.ndarray]]
) -> Float[np.ndarray, "2"] | None:
    """A place that keeps these distances in metres, if one is found."""
    for _ in range(60):
        place = gantry.somewhere(rng, 0.02)
        if all(np.hypot(*(place - o)) >= d for d, others in taken.items() for o in others):
            return place
    return None


def _opposite(
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "1 2"], Float[np.ndarray, "2"]]:
    """A start, a target beyond the pillar, and the pillar between them, nearly on the line."""
    angle = np.pi / 2 + rng.uniform(-0.5, 0.5)
    along = np.array([np.cos(angle), np.sin(angle)])
    across = np.array([-along[1], along[0]])
    middle = rng.uniform(-0.02, 0.02, 2)
    height = rng.uniform(0.05, 0.08)
    start = np.array([*(middle - rng.uniform(0.085, 0.105) * along), height])
    target = middle + rng.uniform(0.065, 0.085) * along
    pillar = middle + rng.uniform(-0.005, 0.005) * along + rng.uniform(-0.003, 0.003) * across
    return start, target[None], pillar
