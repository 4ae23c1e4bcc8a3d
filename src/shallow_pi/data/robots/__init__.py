"""Robots as data: keys and units, transforms, statistics and prompts around a model.

The names that a robot file of one's own uses are here: `from shallow_pi.data import robots`, then
`ROBOT = robots.Robot(...)` or `dataclasses.replace(robots.ALOHA, ...)`.
"""

from shallow_pi.data.robots.conversions import Conversion
from shallow_pi.data.robots.robot import (
    ALOHA,
    ALOHA_SIM,
    DROID,
    DROID_POSITION,
    LIBERO,
    LIBERO_DELTA,
    RBY1,
    ROBOTS,
    TABLETOP,
    TURNTABLE,
    UR5,
    Group,
    Limits,
    Robot,
    find,
    mask,
)

__all__ = [
    "ALOHA",
    "ALOHA_SIM",
    "DROID",
    "DROID_POSITION",
    "LIBERO",
    "LIBERO_DELTA",
    "RBY1",
    "ROBOTS",
    "TABLETOP",
    "TURNTABLE",
    "UR5",
    "Conversion",
    "Group",
    "Limits",
    "Robot",
    "find",
    "mask",
]
