"""The expert of LIBERO's suites in which one object is carried to one place.

It sees the true state. Narrow objects are gripped across, as they stand; wide ones (bowls) at the
rim. A rim is gripped deep, by a gripper that closes along the robot's y, if there is room for it:
rays from above find what is in the way. Where the wall of a drawer is, the hand turns, grips nearer
to the edge, or both. An object that slips away is picked up again.
"""

import math
from collections.abc import Mapping
from typing import Any, Protocol

import mujoco
import numpy as np
from jaxtyping import Float

# Directions in which the gripper may close, those that need the least turn first.
AXES = [
    np.array([-math.sin(turn), math.cos(turn), 0.0])
    for turn in np.deg2rad(sorted(range(-75, 76, 15), key=abs))
]
# Depth of a grip below the rim, and distance of the hand's middle from the rim; metres.
DEPTHS, INSETS = (0.030, 0.020, 0.015), (0.008, 0.015, 0.022)
# Of the open gripper: points along its axis, those across it, and the height of its lowest part
# there over the grip. First both fingers, then the hand above them.
FOOTPRINT = [
    (
        [side * along for side in (-1, 1) for along in np.arange(0.032, 0.070, 0.004)],
        (-0.012, 0.0, 0.012),
        -0.012,
    ),
    (list(np.arange(-0.108, 0.109, 0.004)), (-0.035, 0.0, 0.035), 0.0235),
]
COLLIDES = np.array([1, 0, 0, 0, 0, 0], np.uint8)  # The group of the geoms that do.


class World(Protocol):
    """The parts of a simulator that the expert reads."""

    env: Any
    seen: Mapping[str, Any]

    @property
    def model(self) -> mujoco.MjModel:
        """The compiled scene."""

    @property
    def data(self) -> mujoco.MjData:
        """Its physical state."""


class Carrier:
    """Carries the first object of interest to the last.

    Phases: above, down, close, up, across, lower, release.
    """

    def __init__(self, sim: World):
        self._sim = sim
        names = list(sim.env.obj_of_interest)
        self._object, self._target = (f"{names[i]}_main" for i in (0, -1))
        self._into = "basket" in names[-1]
        self._begin()

    def _begin(self) -> None:
        """Choose a grip of the object where it is now."""
        low, high = self._box(self._object)
        width, centre = high - low, (low + high) / 2
        # Place of the hand from the object's centre, direction in which it closes, its height.
        best = usual = np.zeros(3), AXES[0], max(low[2] + 0.012, high[2] - DEPTHS[0])
        if width[1] > 0.075:
            near = 1 if centre[1] < 0 else -1
            grips = [
                (side * (width[1] / 2 - inset) * axis, axis, max(low[2] + 0.012, high[2] - depth))
                for depth in DEPTHS
                for inset in INSETS
                for axis in AXES
                for side in (near, -near)
            ]
            fitting = (grip for grip in grips if self._fits(centre, *grip, high[2] + 0.09))
            usual = grips[0]
            best = next(fitting, usual)
        self._grip, self._axis, self._height = best
        self._usual = best is usual
        self._phase, self._since, self._lifted_from = 0, 0, 0.0
        self._closed_at = self._held = np.zeros(3)

    def _fits(
        self,
        centre: Float[np.ndarray, "3"],
        grip: Float[np.ndarray, "3"],
        axis: Float[np.ndarray, "3"],
        height: float,
        top: float,
    ) -> bool:
        """Nothing but the object is in the place of the open gripper, as rays from `top` see it."""
        model, data = self._sim.model, self._sim.data
        across, down = np.array([axis[1], -axis[0], 0.0]), np.array([0.0, 0.0, -1.0])
        own, found = model.body(self._object).id, np.empty(1, np.int32)
        for lengths, widths, lowest in FOOTPRINT:
            for along in lengths:
                for sideways in widths:
                    start = centre + grip + along * axis + sideways * across
                    start[2] = top
                    far = mujoco.mj_ray(model, data, start, down, COLLIDES, 1, own, found)
                    if far >= 0 and top - far > height + lowest:
                        return False
        return True

    def _box(self, body: str) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
        """Lower and upper corner of a body and all that is fixed to it, in the world."""
        model, data = self._sim.model, self._sim.data
        inside = {model.body(body).id}
        for child in range(min(inside) + 1, model.nbody):
            if model.body_parentid[child] in inside:
                inside.add(child)
        low, high = np.full(3, np.inf), np.full(3, -np.inf)
        for geom in range(model.ngeom):
            solid = model.geom_contype[geom] or model.geom_conaffinity[geom]
            if model.geom_bodyid[geom] in inside and solid:
                turn = data.geom_xmat[geom].reshape(3, 3)
                centre = data.geom_xpos[geom] + turn @ model.geom_aabb[geom, :3]
                half = np.abs(turn) @ model.geom_aabb[geom, 3:]
                low, high = np.minimum(low, centre - half), np.maximum(high, centre + half)
        return low, high

    def act(self) -> Float[np.ndarray, "7"]:
        """The next action."""
        hand = np.asarray(self._sim.seen["robot0_eef_pos"])
        low, high = self._box(self._object)
        centre, (below, above) = (low + high) / 2, self._box(self._target)
        if 3 <= self._phase <= 5 and np.linalg.norm(hand - centre - self._held) > 0.05:
            self._begin()  # The object slipped away.
        goal, closed = self._next(hand, low, high, centre, (below + above) / 2, float(above[2]))
        way = np.clip((goal - hand) / 0.05 * 1.5, -1.0, 1.0)
        turn = np.clip(self._turn() / 0.5 * 1.5, -1.0, 1.0) * (not self._usual)
        return np.array([*way, *turn, 1.0 if closed else -1.0])

    def _turn(self) -> Float[np.ndarray, "3"]:
        """Rotation vector until the hand points down and closes along its axis, radians."""
        x, y, z, w = self._sim.seen["robot0_eef_quat"]
        closes = math.atan2(1 - 2 * (x * x + z * z), 2 * (x * y - z * w))
        turn = math.atan2(self._axis[1], self._axis[0]) - closes
        # The hand may as well close in the opposite direction.
        turn = (turn + math.pi / 2) % math.pi - math.pi / 2
        return np.array([2 * (x * w - y * z), 2 * (x * z + y * w), turn])

    def _next(
        self,
        hand: Float[np.ndarray, "3"],
        low: Float[np.ndarray, "3"],
        high: Float[np.ndarray, "3"],
        centre: Float[np.ndarray, "3"],
        place: Float[np.ndarray, "3"],
        top: float,
    ) -> tuple[Float[np.ndarray, "3"], bool]:
        """Goal of the hand, and True if it grips; begins the next phase when it is time."""
        over = centre + self._grip
        rest = top + 0.03 if self._into else top  # Height at which the object is let go.
        self._since += 1
        if self._phase == 0:
            far = np.hypot(*(hand - over)[:2])
            close = 0.006 if self._since < 30 else 0.015
            turned = self._usual or abs(self._turn()[2]) < 0.05
            if far >= close or not turned:
                above = max(high[2] + 0.10, hand[2] if far > 0.05 else 0)
                return np.array([*over[:2], above]), False
            self._enter(1)
        if self._phase == 1:
            if abs(hand[2] - self._height) >= 0.008 and self._since < 60:
                return np.array([*over[:2], self._height]), False
            self._closed_at = hand
            self._enter(2)
        if self._phase == 2:
            if self._since <= 12:
                beside = over if self._usual else self._closed_at
                return np.array([*beside[:2], self._height]), True
            self._lifted_from, self._held = float(hand[2]), hand - centre
            self._enter(3)
        if self._phase == 3:
            # A rim that is held near its edge slips in time: it is lifted no higher than it must.
            lift = 0.15 if self._usual else 0.07
            if hand[2] <= self._lifted_from + lift and self._since < 60:
                return np.array([*hand[:2], self._lifted_from + 0.20]), True
            self._enter(4)
        held = hand - centre
        if self._phase == 4:
            if np.hypot(*(centre - place)[:2]) >= 0.012 and self._since < 100:
                return np.array([*(place + held)[:2], max(hand[2], top + 0.16)]), True
            self._enter(5)
        if self._phase == 5:
            if low[2] - rest >= 0.012 and self._since <= 60:
                return np.array([*(place + held)[:2], hand[2] - (low[2] - rest)]), True
            self._enter(6)
        return hand + (np.array([0.0, 0.0, 0.1]) if self._since > 8 else 0.0), False

    def _enter(self, phase: int) -> None:
        self._phase, self._since = phase, 0
