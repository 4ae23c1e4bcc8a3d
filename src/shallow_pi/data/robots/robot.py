"""A robot is its camera names, its key names, its sizes and its units: data, no code.

`pipelines.py` turns it into transforms. The robots below read their data as openpi does, so that
openpi's checkpoints and statistics fit them.

Your own robot is a small file with one constant, given in place of a name (`--data.robot my.py`):

    from shallow_pi.data import robots

    ROBOT = robots.Robot(
        name="my_arm",
        cameras={
            "base_0_rgb": "observation.images.front",
            "left_wrist_0_rgb": "observation.images.hand",
        },
        state_dim=7,
        action_dim=7,
        fps=30,
        delta=robots.mask(6, -1),  # six joints as differences from the state, the gripper as it is
        groups=(robots.Group("joints", 6, "rad"), robots.Group("gripper", 1)),
    )

or a variant of a robot below, `ROBOT = dataclasses.replace(robots.UR5, name="ur5_slow", fps=10)`. A
checkpoint holds all of it: a policy is served without the file.
"""

import dataclasses
import functools
import inspect
import pathlib
import re
import runpy
import traceback
import typing
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from shallow_pi import suggestions
from shallow_pi.data.robots import conversions, vector


@dataclasses.dataclass(frozen=True)
class Group:
    """Consecutive action dimensions that belong together and whose errors are reported together."""

    name: str
    # Number of dimensions.
    size: int
    # Of the robot's own actions; empty for numbers without one (0 closed, 1 open).
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Plausible values of one dimension in the robot's own units, for warnings about data."""

    low: float
    high: float
    # Recordings span most of the range, as those of a gripper that opens and closes.
    is_spanned: bool = False

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"limits must be low < high, got {self.low} and {self.high}")


@dataclasses.dataclass(frozen=True)
class Robot:
    """Names, sizes and units of one embodiment."""

    name: str
    # Model camera → key of the image in the robot's observations and datasets. Cameras of the model
    # that are not listed are black and masked, for π0 and π0.5 alike, as in openpi.
    cameras: Mapping[str, str]
    state_dim: int
    action_dim: int
    # Control frequency (Hz), which is also the frame rate of its datasets.
    fps: int | float
    state_key: str = "observation.state"
    action_key: str = "action"
    prompt_key: str = "task"
    # Leading action dimensions: True if the model sees the difference from the state, False if it
    # sees the absolute value. The robot's own actions are always absolute.
    delta: tuple[bool, ...] = ()
    # Conversion to the model's units and signs, before differences are taken.
    state_conversion: conversions.Conversion | None = None
    action_conversion: conversions.Conversion | None = None
    # Keys appended to the state, in order, if recordings split it over several columns.
    state_more: tuple[str, ...] = ()
    # The same for actions. A policy answers with one vector of all parts.
    action_more: tuple[str, ...] = ()
    # Number of values under each key, so that data with the right total but other parts are
    # refused. Empty uses those of the first dataset (for actions, those of `groups` if there is one
    # for each key).
    state_sizes: tuple[int, ...] = ()
    action_sizes: tuple[int, ...] = ()
    # Indices, from 0, of the values to use, counted over all keys; empty uses all. All other fields
    # refer to the selected dimensions, in this order.
    state_indices: tuple[int, ...] = ()
    action_indices: tuple[int, ...] = ()
    # A fixed prompt that replaces those of recordings and observations; empty uses theirs.
    prompt: str = ""
    # Additional metadata for clients that need it. Robots that differ only in this are equal,
    # because they read and answer alike.
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    # The openpi config that has its transforms, if these fields cannot describe them; openpi then
    # serves its policies.
    elsewhere: str = ""
    # The action dimensions in order; empty is one group of all (`action_groups`).
    groups: tuple[Group, ...] = ()
    # Plausible values of each dimension, or None; empty gives none.
    state_limits: tuple[Limits | None, ...] = ()
    action_limits: tuple[Limits | None, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            # A list would not compare equal to what a checkpoint holds; text is read as letters.
            if field.default == () and not isinstance(value, tuple):
                raise ValueError(
                    f"robot {self.name}: {field.name} must be a tuple, got {value!r}; a tuple of "
                    "one ends with a comma, (7,), and a range is written (*range(7),)"
                )
            if not _is_of(value, field.type):
                # Without the modules of its names.
                kind = re.sub(r"\b\w[\w.]*\.(?=\w)", "", inspect.formatannotation(field.type))
                raise ValueError(f"robot {self.name}: {field.name} must be {kind}, got {value!r}")
        if not self.cameras:
            raise ValueError(f"robot {self.name} has no cameras; the model needs at least one")
        if self.state_dim < 1 or self.action_dim < 1 or self.fps <= 0:
            raise ValueError(
                f"robot {self.name} needs positive state_dim, action_dim and fps, got "
                f"{self.state_dim}, {self.action_dim} and {self.fps}"
            )
        if len(self.delta) > min(self.state_dim, self.action_dim):
            raise ValueError(
                f"robot {self.name}: delta names {len(self.delta)} dimensions, state and actions "
                f"have {self.state_dim} and {self.action_dim}"
            )
        for what, conversion, dim in (
            ("state", self.state_conversion, self.state_dim),
            ("action", self.action_conversion, self.action_dim),
        ):
            if conversion is not None and len(conversion.factor) != dim:
                raise ValueError(
                    f"robot {self.name}: {what}_conversion has {len(conversion.factor)} "
                    f"dimensions, {what}_dim is {dim}"
                )
        for what, limits, dim in (
            ("state", self.state_limits, self.state_dim),
            ("action", self.action_limits, self.action_dim),
        ):
            if limits and len(limits) != dim:
                raise ValueError(
                    f"robot {self.name}: {what}_limits has {len(limits)} entries, {what}_dim is "
                    f"{dim}; give one for each dimension, None where it is not known"
                )
        self._check_groups()
        _ = self.state_vector, self.action_vector  # Raise.

    def _check_groups(self) -> None:
        names, sizes = [g.name for g in self.groups], [g.size for g in self.groups]
        if len(set(names)) < len(names) or any(not n or "/" in n for n in names):
            raise ValueError(
                f"robot {self.name}: groups need names that differ, without slashes, got {names}"
            )
        if sizes and (min(sizes) < 1 or sum(sizes) != self.action_dim):
            raise ValueError(
                f"robot {self.name}: its groups have {' + '.join(map(str, sizes))} dimensions, "
                f"action_dim is {self.action_dim}; each dimension belongs to one group"
            )

    @property
    def taken(self) -> str:
        """Which values state and actions take of their keys, for people; empty if it is all."""
        found = {"state": self.state_vector.taken, "actions": self.action_vector.taken}
        return ", ".join(f"{what} {taken}" for what, taken in found.items() if taken)

    @property
    def action_groups(self) -> tuple[Group, ...]:
        """The groups of the action dimensions, at least one."""
        return self.groups or (Group("action", self.action_dim),)

    @property
    def state_keys(self) -> tuple[str, ...]:
        """The keys that make up the state, in order."""
        return (self.state_key, *self.state_more)

    @functools.cached_property
    def state_vector(self) -> vector.Vector:
        """The values that make up the state."""
        keys, dim = self.state_keys, self.state_dim
        return vector.Vector(self.name, "state", keys, dim, self.state_sizes, self.state_indices)

    def state(self, observation: Mapping[str, object]) -> Float[np.ndarray, "*n sd"]:
        """The state vector out of an observation or a dataset's columns, not converted yet."""
        return self.state_vector.read(observation)

    @property
    def action_keys(self) -> tuple[str, ...]:
        """The keys that make up the actions, in order."""
        return (self.action_key, *self.action_more)

    @functools.cached_property
    def action_vector(self) -> vector.Vector:
        """The values that make up the actions."""
        keys, dim, sizes = self.action_keys, self.action_dim, self.action_sizes
        if not sizes and not self.action_indices and len(self.groups) == len(keys):
            sizes = tuple(group.size for group in self.groups)
        return vector.Vector(self.name, "action", keys, dim, sizes, self.action_indices)

    def actions(self, columns: Mapping[str, object]) -> Float[np.ndarray, "*n rd"]:
        """The action vectors out of a dataset's columns, not converted yet."""
        return self.action_vector.read(columns)


def _is_of(value: object, annotation: Any) -> bool:
    """True if a value, and each one in it, has the type of a field of `Robot`."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        return isinstance(value, tuple) and all(_is_of(one, parts[0]) for one in value)
    if origin is Mapping:
        kinds = (parts[0], object if parts[1] is Any else parts[1])
        return isinstance(value, Mapping) and all(
            isinstance(one, kind)
            for pair in value.items()
            for one, kind in zip(pair, kinds, strict=True)
        )
    return isinstance(value, annotation)


def mask(*groups: int) -> tuple[bool, ...]:
    """Dimensions in a row: 6 is six times True, -1 once False."""
    return tuple(group > 0 for group in groups for _ in range(abs(group)))


# A revolute joint in radians, whatever its zero; a gripper from closed to open.
_JOINT, _GRIPPER = Limits(-3.5, 3.5), Limits(0, 1, is_spanned=True)

# The embedded task: gantry position in metres, absolute position targets in metres.
TURNTABLE = Robot(
    name="turntable",
    cameras={
        "base_0_rgb": "observation.images.base",
        "left_wrist_0_rgb": "observation.images.wrist",
    },
    state_dim=3,
    action_dim=3,
    fps=20,
    delta=mask(3),
    groups=(Group("gantry", 3, "m"),),
)

# The same gantry, which also reads the speed of its disc in radians a second.
TABLETOP = dataclasses.replace(TURNTABLE, name="tabletop", state_dim=4)

# Meta-World's Sawyer: the gripper's position in metres and its opening in, shares of its greatest
# motion (a centimetre) and of closing (1) or opening (-1) out.
METAWORLD = Robot(
    name="metaworld",
    cameras=TURNTABLE.cameras,
    state_dim=4,
    action_dim=4,
    fps=80,
    groups=(Group("position", 3), Group("gripper", 1)),
    action_limits=(Limits(-1, 1),) * 4,
)

# ALOHA's joints to the signs, and its grippers to the angles, of the runtime that recorded the data
# π0 was trained on. States have finger positions, actions have angles of the leader's gripper.
_SIGNS = (1, -1, -1, 1, 1, 1)
_PI_LOW, _PI_HIGH = 0.5476, 1.6296  # Radians that π0 knows as 0 and 1.
_LEADER_LOW, _LEADER_HIGH = -0.6213, 1.4910  # Radians that ALOHA's actions know as 0 and 1.
ALOHA_STATE = conversions.Conversion(
    factor=(*_SIGNS, 1 / (_PI_HIGH - _PI_LOW)) * 2,
    offset=(*[0] * 6, -_PI_LOW / (_PI_HIGH - _PI_LOW)) * 2,
    crank=(6, 13),
)
ALOHA_ACTIONS = conversions.Conversion(
    factor=(*_SIGNS, _LEADER_HIGH - _LEADER_LOW) * 2, offset=(*[0] * 6, _LEADER_LOW - _PI_LOW) * 2
)

# Bimanual ALOHA as its LeRobot datasets name things; openpi's pi0_aloha and pi05_aloha.
ALOHA = Robot(
    name="aloha",
    cameras={
        "base_0_rgb": "observation.images.cam_high",
        "left_wrist_0_rgb": "observation.images.cam_left_wrist",
        "right_wrist_0_rgb": "observation.images.cam_right_wrist",
    },
    state_dim=14,
    action_dim=14,
    fps=50,
    delta=mask(6, -1, 6, -1),
    state_conversion=ALOHA_STATE,
    action_conversion=ALOHA_ACTIONS,
    groups=(
        *(Group("left_arm", 6, "rad"), Group("left_gripper", 1)),
        *(Group("right_arm", 6, "rad"), Group("right_gripper", 1)),
    ),
    state_limits=((_JOINT,) * 6 + (_GRIPPER,)) * 2,
    action_limits=((_JOINT,) * 6 + (_GRIPPER,)) * 2,
    # Joints of an arm from which openpi's client begins; without it, from ALOHA's own pose.
    metadata={"reset_pose": [0, -1.5, 1.5, 0, 0, 0]},
)
# The simulated transfer of a cube, one camera; openpi's pi0_aloha_sim has absolute actions.
ALOHA_SIM = dataclasses.replace(
    ALOHA,
    name="aloha_sim",
    cameras={"base_0_rgb": "observation.images.top"},
    delta=(),
    prompt="Transfer cube",
    metadata={},
)

# LIBERO's Panda: end-effector pose and two fingers in, differences of the pose and the gripper out,
# all of it in the controller's range of -1 to 1.
LIBERO = Robot(
    name="libero",
    cameras={"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"},
    state_dim=8,
    action_dim=7,
    fps=10,
    state_key="state",
    action_key="actions",
    groups=(Group("position", 3), Group("rotation", 3), Group("gripper", 1)),
    action_limits=(Limits(-1, 1),) * 6 + (Limits(-1, 1, is_spanned=True),),
)
# As openpi's pi0_libero was trained: the state subtracted once more from actions that are
# differences already (pi05_libero does without).
LIBERO_DELTA = dataclasses.replace(LIBERO, name="libero_delta", delta=mask(6, -1))

# What RoboArena's client reads: images as they are (it would stretch them to a size), one camera
# beside the wrist's, and the meaning of an action, in absence of which it takes joint positions.
_ROBOARENA = {
    "image_resolution": None,
    "n_external_cameras": 1,
    "needs_wrist_camera": True,
    "needs_stereo_camera": False,
    "needs_session_id": False,
    "action_space": "joint_velocity",
}
# DROID's Franka as openpi's converter names things: joint velocities (shares of the greatest) and
# the gripper's position; openpi's pi05_droid and pi05_droid_finetune.
DROID = Robot(
    name="droid",
    cameras={"base_0_rgb": "exterior_image_1_left", "left_wrist_0_rgb": "wrist_image_left"},
    state_dim=8,
    action_dim=8,
    fps=15,
    state_key="joint_position",
    state_more=("gripper_position",),
    state_sizes=(7, 1),
    action_key="actions",
    groups=(Group("joint_velocity", 7), Group("gripper", 1)),
    state_limits=(*(_JOINT,) * 7, _GRIPPER),
    action_limits=(*(Limits(-1, 1),) * 7, _GRIPPER),
    metadata=_ROBOARENA,
)
# The same with joint positions as actions; openpi's pi05_full_droid_finetune.
DROID_POSITION = dataclasses.replace(
    DROID,
    name="droid_position",
    delta=mask(7, -1),
    groups=(Group("joint_position", 7, "rad"), Group("gripper", 1)),
    action_limits=DROID.state_limits,
    metadata={**_ROBOARENA, "action_space": "joint_position"},
)

# UR5 with one gripper, as openpi's example for it; π0's own UR5 runs at 20 Hz.
UR5 = Robot(
    name="ur5",
    cameras={"base_0_rgb": "image", "left_wrist_0_rgb": "wrist_image"},
    state_dim=7,
    action_dim=7,
    fps=20,
    state_key="joints",
    state_more=("gripper",),
    state_sizes=(6, 1),
    action_key="actions",
    delta=mask(6, -1),
    groups=(Group("joints", 6, "rad"), Group("gripper", 1)),
)

# Rainbow Robotics' RB-Y1, as its maker's LeRobot plugin (RainbowRobotics/rby1-lerobot) records it
# in joint mode: both arms, grippers with 1 open, the torso held still. Untried: no recording of it
# was at hand.
RBY1 = Robot(
    name="rby1",
    cameras={
        "base_0_rgb": "observation.images.front",
        "left_wrist_0_rgb": "observation.images.left",
        "right_wrist_0_rgb": "observation.images.right",
    },
    state_dim=16,
    action_dim=16,
    fps=30,
    delta=mask(14, -2),
    groups=(
        *(Group("right_arm", 7, "rad"), Group("left_arm", 7, "rad")),
        *(Group("right_gripper", 1), Group("left_gripper", 1)),
    ),
    state_limits=(*(_JOINT,) * 14, *(_GRIPPER,) * 2),
    action_limits=(*(_JOINT,) * 14, *(_GRIPPER,) * 2),
)

# The fields that statistics and parameters depend on; the rest of a robot is names.
_SIZES = ("state_dim", "action_dim")
_UNITS = (*_SIZES, "delta", "state_conversion", "action_conversion")


def unit_differences(own: Robot, given: Robot) -> list[str]:
    """Fields in which robots move in other units: nothing trained for one fits the other.

    Of a robot whose transforms are openpi's alone, only the sizes are known.
    """
    return [
        f"{name} is {getattr(own, name)}, given {getattr(given, name)}"
        for name in (_SIZES if own.elsewhere else _UNITS)
        if getattr(own, name) != getattr(given, name)
    ]


ROBOTS = {
    robot.name: robot
    for robot in (
        *(TURNTABLE, TABLETOP, METAWORLD, ALOHA, ALOHA_SIM, LIBERO, LIBERO_DELTA),
        *(DROID, DROID_POSITION, UR5, RBY1),
    )
}


def find(name: str) -> Robot:
    """The robot of that name, or the `ROBOT` of a Python file.

    Raises:
      ValueError: there is no such robot, or the file has no `ROBOT`.
      FileNotFoundError: there is no such file.
    """
    if name.endswith(".py"):
        return _from_file(pathlib.Path(name).expanduser())
    if ":" in name:
        raise ValueError(
            f"robot {name!r} is known to the loader of its config alone (--data.source): to read "
            f"LeRobot recordings, describe it with --data.robot, one of {sorted(ROBOTS)} or a "
            "Python file with a ROBOT (docs/robots.md)"
        )
    if name not in ROBOTS:
        hint = suggestions.closest(name, ROBOTS, "; or name a file with a ROBOT, *.py")
        raise ValueError(f"unknown robot {name!r}; there are {sorted(ROBOTS)}{hint}")
    return ROBOTS[name]


def _from_file(path: pathlib.Path) -> Robot:
    if not path.is_file():
        raise FileNotFoundError(f"no robot file {path}; expected Python that defines ROBOT")
    try:
        robot = runpy.run_path(str(path)).get("ROBOT")
    except Exception as error:  # Whatever the code in it raises.
        line = ""
        for frame in traceback.extract_tb(error.__traceback__):
            line = f", line {frame.lineno}" if frame.filename == str(path) else line
        # Raised by a call with wrong names, above all.
        fields = ""
        if isinstance(error, TypeError):
            names = (field.name for field in dataclasses.fields(Robot))
            fields = f"the fields of a Robot are {', '.join(names)}; "
        raise ValueError(
            f"robot file {path}{line}: {type(error).__name__}: {error} ({fields}docs/robots.md has "
            "whole examples)"
        ) from error
    if not isinstance(robot, Robot):
        raise ValueError(
            f"{path} must define ROBOT = robots.Robot(...) (see docs/robots.md), got "
            f"{type(robot).__name__ if robot is not None else 'nothing of that name'}"
        )
    if ROBOTS.get(robot.name, robot) != robot:
        raise ValueError(f"{path} names its robot {robot.name!r}, which is another: rename it")
    return robot


def from_dict(values: Mapping[str, Any]) -> Robot:
    """The inverse of `dataclasses.asdict` on a `Robot`, through JSON."""
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    nested = {
        key: conversions.Conversion(**{k: tuple(v) for k, v in values[key].items()})
        for key in ("state_conversion", "action_conversion")
        if values[key] is not None
    }
    # Policies saved before robots had groups and limits lack them.
    groups = tuple(Group(**group) for group in values.get("groups", ()))
    limits = {
        key: tuple(one and Limits(**one) for one in values.get(key, ()))
        for key in ("state_limits", "action_limits")
    }
    return Robot(**{**values, **lists, **nested, "groups": groups, **limits})
