"""The expert of simulated ALOHA: both grippers follow waypoints, from the true state.

Inverse kinematics turn a waypoint into joint positions. The joints have so much friction that their
servos stop short of them; what is missing is added to the targets until they arrive. The forearm's
roll, with more friction than its servo has strength, stays at zero: grippers point straight out
from their base. Once an object is held, waypoints are of the object, as it lies in the hand.
"""

import dataclasses

import mujoco
import numpy as np
from jaxtyping import Bool, Float

GRIP = 0.140  # of the fingers' grip in front of a gripper's frame, metres
SIDES = ("left", "right")
RIGHT_BASE = np.array([0.469, 0.5])
# Joints of an arm that are moved: all but the forearm's roll.
MOVED: Bool[np.ndarray, "6"] = np.array([True, True, True, False, True, True])
# Part of a joint's error that is added to its target, each step; and the most that may add up.
GAIN, MOST = 0.3, 1.5
UPRIGHT = np.eye(3)


@dataclasses.dataclass(frozen=True)
class Waypoint:
    """Place and orientation (columns x, y, z) at a step, and the gripper's opening."""

    step: int
    place: Float[np.ndarray, "3"]
    frame: Float[np.ndarray, "3 3"]
    opening: float
    # The body that is there; empty for the gripper's grip.
    body: str = ""


Path = list[Waypoint]


def transfer(cube: Float[np.ndarray, "3"]) -> dict[str, Path]:
    """Of both grippers: the right one lifts the cube to the meeting, the left one takes it."""
    cube, meeting = np.array([cube[0], cube[1], 0.02]), np.array([0.0, 0.5, 0.30])
    dive, meet = _dive(cube), _dive(meeting)
    # The left one points right and closes along z.
    level = np.stack([[1, 0, 0], [0, 0, 1], [0, -1, 0]], 1)
    above, aside = np.array([0.0, 0.0, 0.10]), np.array([-0.14, 0.0, 0.0])
    taken = meeting + np.array([-0.005, 0.0, 0.0])
    right = [
        Waypoint(50, cube + above, dive, 1.0),
        Waypoint(85, cube, dive, 1.0),
        Waypoint(105, cube, dive, 0.0),
        Waypoint(170, meeting, meet, 0.0),
        Waypoint(300, meeting, meet, 0.0),
    ]
    left = [
        Waypoint(150, meeting + aside, level, 1.0),
        Waypoint(180, meeting + aside, level, 1.0),
        Waypoint(220, taken, level, 1.0),
        Waypoint(240, taken, level, 0.0),
        Waypoint(300, taken, level, 0.0),
    ]
    return {"left": left, "right": right}


def _dive(place: Float[np.ndarray, "3"]) -> Float[np.ndarray, "3 3"]:
    """Frame of the right gripper that points from its base's side down to a place, by 60°."""
    out = place[:2] - RIGHT_BASE
    out = out / np.linalg.norm(out)
    forward = np.array([*(0.5 * out), -np.sqrt(0.75)])
    across = np.array([-out[1], out[0], 0.0])
    return np.stack([forward, across, np.cross(forward, across)], 1)


def insertion(peg: Float[np.ndarray, "3"], socket: Float[np.ndarray, "3"]) -> dict[str, Path]:
    """Of both grippers: each lifts its object from above, and they push them together."""
    paths = {}
    for side, out, place in (("left", -1, socket), ("right", 1, peg)):
        down = np.stack([[0, 0, -1], [0, -out, 0], [-out, 0, 0]], 1)
        away = np.array([0.02 * out, 0.0, 0.0])  # Held away from the other object.
        over, at = (np.array([*place[:2], z]) + away for z in (0.12, 0.02))
        apart, together = (np.array([x * out, 0.5, 0.20]) for x in (0.08, 0.04))
        body = "socket" if side == "left" else "peg"
        paths[side] = [
            Waypoint(50, over, down, 1.0),
            Waypoint(80, at, down, 1.0),
            Waypoint(105, at, down, 0.0),
            Waypoint(155, apart + away, down, 0.0),
            Waypoint(180, apart, UPRIGHT, 0.0, body),
            Waypoint(230, together, UPRIGHT, 0.0, body),
            Waypoint(300, together, UPRIGHT, 0.0, body),
        ]
    return paths


class Expert:
    """Follows the waypoints of both grippers; can be pickled.

    `data` is the scene at the start, whose first 16 joints are the arms', left before right;
    `paths` are the waypoints of each side.
    """

    def __init__(self, data: mujoco.MjData, paths: dict[str, Path]):
        self._paths = {
            side: [Waypoint(0, *_grip(data, side), 0.0), *path] for side, path in paths.items()
        }
        self._joints = {side: data.qpos[_slice(side)].copy() for side in SIDES}
        self._added = {side: np.zeros(6) for side in SIDES}

    def act(self, model: mujoco.MjModel, data: mujoco.MjData, step: int) -> Float[np.ndarray, "14"]:
        """The next action."""
        action: list[float] = []
        for side in SIDES:
            place, frame, opening, body = _between(self._paths[side], step)
            if body:
                place, frame = _held(data, side, body, place, frame)
            wanted = _joints(model, data, side, self._joints[side], place, frame)
            missing = wanted - data.qpos[_slice(side)]
            added = self._added[side] + GAIN * missing * MOVED
            self._joints[side], self._added[side] = wanted, np.clip(added, -MOST, MOST)
            action += [*(wanted + self._added[side]), opening]
        return np.array(action)


def _slice(side: str) -> slice:
    """The arm's joints among positions and velocities."""
    start = 8 * SIDES.index(side)
    return slice(start, start + 6)


def _grip(
    data: mujoco.MjData, side: str
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3 3"]]:
    """Place of the fingers' grip, and the gripper's frame."""
    body = data.body(f"vx300s_{side}/gripper_link")
    frame = body.xmat.reshape(3, 3).copy()
    return body.xpos + GRIP * frame[:, 0], frame


def _between(
    path: Path, step: int
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3 3"], float, str]:
    """Place, frame and opening between two waypoints, and the body that should be there."""
    index = next((i for i, point in enumerate(path) if point.step > step), len(path) - 1)
    before, after = path[index - 1], path[index]
    if before.body != after.body:
        return after.place, after.frame, after.opening, after.body
    share = min(1.0, (step - before.step) / (after.step - before.step))
    opening = before.opening + share * (after.opening - before.opening)
    share = share * share * (3 - 2 * share)
    ends = np.empty((2, 4))
    for end, point in zip(ends, (before, after), strict=True):
        mujoco.mju_mat2Quat(end, np.ascontiguousarray(point.frame, np.float64).ravel())
    if ends[0] @ ends[1] < 0:
        ends[1] *= -1
    quaternion, frame = (1 - share) * ends[0] + share * ends[1], np.empty(9)
    mujoco.mju_quat2Mat(frame, quaternion / np.linalg.norm(quaternion))
    place = before.place + share * (after.place - before.place)
    return place, frame.reshape(3, 3), opening, after.body


def _held(
    data: mujoco.MjData,
    side: str,
    body: str,
    place: Float[np.ndarray, "3"],
    frame: Float[np.ndarray, "3 3"],
) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3 3"]]:
    """The grip that brings a body to a place, as it lies in the hand now."""
    grip, hand = _grip(data, side)
    lies = data.body(body)
    turned = frame @ lies.xmat.reshape(3, 3).T
    return place + turned @ (grip - lies.xpos), turned @ hand


def _joints(
    model: mujoco.MjModel,
    data: mujoco.MjData,
    side: str,
    start: Float[np.ndarray, "6"],
    place: Float[np.ndarray, "3"],
    frame: Float[np.ndarray, "3 3"],
) -> Float[np.ndarray, "6"]:
    """Inverse kinematics: damped least squares from `start`."""
    trial = mujoco.MjData(model)
    trial.qpos[:] = data.qpos
    arm, body = _slice(side), model.body(f"vx300s_{side}/gripper_link").id
    jacobian = np.empty((6, model.nv))
    joints = start.copy()
    for _ in range(4):
        trial.qpos[arm] = joints
        mujoco.mj_kinematics(model, trial)
        mujoco.mj_comPos(model, trial)
        grip, hand = _grip(trial, side)
        mujoco.mj_jac(model, trial, jacobian[:3], jacobian[3:], grip, body)
        turn = (frame @ hand.T - hand @ frame.T) / 2
        error = np.array([*(place - grip), turn[2, 1], turn[0, 2], turn[1, 0]])
        weight = np.array([1, 1, 1, 0.1, 0.1, 0.1])  # A radian counts as a decimetre.
        moves = (weight[:, None] * jacobian)[:, arm][:, MOVED]
        damped = moves @ moves.T + 1e-6 * np.eye(6)
        joints[MOVED] += moves.T @ np.linalg.solve(damped, weight * error)
    return joints
