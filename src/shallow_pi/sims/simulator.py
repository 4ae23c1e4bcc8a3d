"""The interface of a simulator, and the table that finds one by name.

A simulator is one file with two parts. Its `Suite` is a frozen dataclass of the options that a user
may set; it defines the robot, the instructions, and the expert and demonstrations if there are any.
`Suite.make` builds a `Simulator`: one running world, in which an episode (task, prompt, initial
state) depends only on its seed. To add one, write the file and name its suite in `SUITES`; its
package is imported when the suite is first used.
"""

import dataclasses
import importlib
import os
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float

from shallow_pi import suggestions
from shallow_pi.data.robots import robot as robots

# Flat LeRobot keys (`observation.images.*`, `observation.state`, `task`), or the robot's keys.
Observation = dict[str, Any]
Action = Float[np.ndarray, " ad"]


class Simulator(Protocol):
    """One running world; ours can be pickled between steps, LIBERO's cannot."""

    def reset(self, seed: int) -> None:
        """Start the episode of this seed."""

    def observe(self) -> Observation:
        """Render, and return the observation under the robot's keys, with the prompt."""

    def step(self, action: Action) -> None:
        """Apply one action in the robot's units for one control period."""

    @property
    def task(self) -> str:
        """The task's short name; results are grouped by it."""

    @property
    def prompt(self) -> str:
        """The instruction in words."""

    @property
    def success(self) -> bool:
        """True once the goal has been reached and, if the task requires it, held."""

    @property
    def done(self) -> bool:
        """True after success, failure or the time limit."""

    @property
    def time(self) -> float:
        """Seconds since the episode began."""


class Followed(Simulator, Protocol):
    """A simulator whose episodes studies describe by more than success (`shallow_pi.evidence`)."""

    @property
    def tip(self) -> Float[np.ndarray, "3"]:
        """Position of the peg or gripper in the world, metres."""

    def happened(self) -> Mapping[str, float]:
        """More about the episode so far, by name; a simulator without collisions names none."""


# Returns the next action of an expert with access to the simulator's state.
Expert = Callable[[Any], Action]


class Suite(Protocol):
    """Tasks of one simulator, as a frozen dataclass of its options that can be pickled."""

    def __hash__(self) -> int:
        """Hash of the options, so that worlds can be cached by suite."""
        ...

    @property
    def robot(self) -> robots.Robot:
        """The robot it drives; its `fps` is the control rate."""

    @property
    def control_hz(self) -> float:
        """Control steps a second; datasets may be labelled with another rate, the robot's."""
        ...

    def names(self) -> Mapping[str, Sequence[str]]:
        """Names of the state and action dimensions by the robot's keys, for a dataset."""

    def make(self) -> Simulator:
        """Build one world; call `reset` first."""

    def task_names(self) -> Sequence[str]:
        """Short names of the tasks that episodes have, all equally often."""

    def prompts(self) -> Sequence[str]:
        """All instructions of all tasks, including tasks not chosen; for training a tokenizer."""

    def harder(self) -> Mapping[str, "Suite"]:
        """Variants by name that are used for evaluation but not for training."""

    def expert(self) -> Expert | None:
        """A scripted expert, or None. The expert keeps its state in the simulator."""

    def demonstrate(
        self, sim: Simulator, rng: np.random.Generator, noise: float
    ) -> Iterator[tuple[Observation, Action]]:
        """Let the expert play the episode just reset; called only if there is an expert.

        `noise` is the scale of the perturbations; 0 for the unperturbed path.

        Yields:
          Each observation, and the expert's action for it.
        """


@dataclasses.dataclass(frozen=True)
class Entry:
    """A line of the table."""

    # MODULE:CLASS of the suite.
    suite: str
    # Extra of this project that installs its packages; empty if none is needed.
    extra: str = ""
    # Options of the suite that the name stands for.
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)


_METAWORLD = "shallow_pi.sims.metaworld:Suite", "metaworld"
_LIBERO = "shallow_pi.sims.libero:Suite", "libero"
_ALOHA = "shallow_pi.sims.aloha:Suite", "aloha-sim"
SUITES: dict[str, Entry] = {
    "aloha_transfer_cube": Entry(*_ALOHA, {"task": "transfer_cube"}),
    "aloha_insertion": Entry(*_ALOHA, {"task": "insertion"}),
    **{
        f"libero_{suite}": Entry(*_LIBERO, {"suite": f"libero_{suite}"})
        for suite in ("spatial", "object", "goal", "10")
    },
    **{f"metaworld_{suite}": Entry(*_METAWORLD, {"suite": suite}) for suite in ("mt10", "mt50")},
    "tabletop": Entry("shallow_pi.sims.tabletop:Suite"),
    "turntable": Entry("shallow_pi.sims.turntable:Suite"),
}
# Names of several simulators that are evaluated in turn.
GROUPS = {"libero": ("libero_spatial", "libero_object", "libero_goal", "libero_10")}


def find(name: str, given: Mapping[str, object]) -> Suite:
    """The suite of that name with these options; those left out keep their defaults.

    The name is a key of `SUITES`, or MODULE:CLASS; text is converted to the option's type.

    Raises:
      ValueError: an unknown name or option, a value that does not fit, or a package that is not
        installed.
    """
    if ":" not in name and name not in SUITES:
        raise ValueError(f"unknown simulator {name!r}; {_known(name, SUITES)}")
    entry = SUITES.get(name) or Entry(name)
    _import_mujoco()
    try:
        kind = pkgutil.resolve_name(entry.suite)
    except (ImportError, AttributeError, ValueError) as error:
        missing = getattr(error, "name", None) or entry.suite
        advice = "expected MODULE:CLASS that can be imported"
        if isinstance(error, ModuleNotFoundError) and not str(missing).startswith("shallow_pi"):
            extra = f"uv sync --extra {entry.extra}" if entry.extra else f"uv pip install {missing}"
            advice = f"its package {missing!r} is not installed: {extra}"
        raise ValueError(f"simulator {name!r}: {advice} ({error})") from error
    is_suite = dataclasses.is_dataclass(kind) and hasattr(kind, "make")
    if not is_suite:
        raise ValueError(
            f"simulator {name!r}: {entry.suite} is no suite; expected a dataclass of options with "
            "a method make, such as shallow_pi.sims.turntable:Suite"
        )
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for option in given:
        if option not in fields:
            raise ValueError(
                f"simulator {name!r} has no option {option!r}; {_known(option, fields)}"
            )
    values = {**entry.options, **given}
    unset = [key for key, field in fields.items() if key not in values and _is_needed(field)]
    if unset:
        raise ValueError(f"simulator {name!r} needs the options {unset}: give each as NAME=VALUE")
    return kind(**{key: _read(key, value, hints[key]) for key, value in values.items()})


def find_evaluated(name: str, given: Mapping[str, object]) -> Suite:
    """As `find`, for a suite that policies are evaluated on.

    Raises:
      ValueError: as `find`, or a task that is named twice, whose episodes would be the same.
    """
    suite = find(name, given)
    names = suite.task_names()
    if twice := sorted({task for task in names if names.count(task) > 1}):
        raise ValueError(
            f"simulator {name!r}: tasks to evaluate name {' and '.join(twice)} more than once, "
            "which repeats the same episodes; only demonstrations may "
            "(--closed-loop.demonstrated)"
        )
    return suite


def _is_needed(field: dataclasses.Field[object]) -> bool:
    """The option has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _import_mujoco() -> None:
    """Import MuJoCo, which imports the OpenGL library that MUJOCO_GL names, if it names one.

    Raises:
      ValueError: the library is not there, or the name is none of MuJoCo's.
    """
    try:
        importlib.import_module("mujoco")
    except ModuleNotFoundError:
        return  # The suite's own import tells it.
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        given = os.environ.get("MUJOCO_GL", "")
        raise ValueError(
            f"MuJoCo cannot be imported with MUJOCO_GL={given} ({error})\n"
            "set MUJOCO_GL to egl or osmesa, as installed (Debian: libegl1 or libosmesa6), or to "
            "disable, for images by ray casting (renderer=ray)"
        ) from error


def _read(option: str, value: object, hint: type) -> object:
    """A text value converted to the option's type; other values unchanged."""
    if not isinstance(value, str) or hint is str:
        return value
    if typing.get_origin(hint) is tuple:
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if typing.get_origin(hint) is Literal:
        return value  # The suite checks the choice.
    if hint is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if hint in (int, float):
        try:
            return hint(value)
        except ValueError as error:
            raise ValueError(f"{option}: expected {hint.__name__}, got {value!r}") from error
    raise ValueError(f"{option}: expected {hint}, got {value!r}")


def _known(name: str, names: Sequence[str] | Mapping[str, object]) -> str:
    return f"there are {sorted(names)}{suggestions.closest(name, names)}"


def harder(suite: Suite, names: Sequence[str] | None) -> dict[str, Suite]:
    """The harder variants of these names, in this order; None uses all.

    Raises:
      ValueError: the simulator has no such variant.
    """
    found = suite.harder()
    for name in names or ():
        if name not in found:
            raise ValueError(f"no harder variant {name!r}; {_known(name, found)}")
    return {name: found[name] for name in (found if names is None else names)}


def scene(suite: Suite) -> Callable[[int], int]:
    """The scene of an episode by its seed, for suites whose simulators build one at a time.

    Such a suite gives it by a method `scene`, which others need not have.
    """
    found: Callable[[int], int] = getattr(suite, "scene", lambda seed: 0)
    return found


def moving(suite: Suite) -> Suite | None:
    """The variant whose world moves by itself, where late plans matter; None if there is none.

    A suite that has one gives it by a method `moving`, which others need not have.
    """
    make = getattr(suite, "moving", None)
    return None if make is None else make()


def check_robot(suite: Suite, robot: robots.Robot, advice: str = "") -> None:
    """Raise unless a policy for `robot` can drive the suite's robot; `advice` ends the message."""
    own = suite.robot
    advice = advice or f"give --data.robot {own.name}, or another --closed-loop.sim"
    differing = [
        f"{what} {theirs} (the simulator's: {ours})"
        for what, theirs, ours in (
            ("state keys", list(robot.state_keys), list(own.state_keys)),
            ("state dimensions", robot.state_dim, own.state_dim),
            ("action dimensions", robot.action_dim, own.action_dim),
            ("state indices", robot.state_indices, own.state_indices),
            ("action indices", robot.action_indices, own.action_indices),
            ("control rate", robot.fps, own.fps),
        )
        if theirs != ours
    ]
    absent = sorted(set(robot.cameras.values()) - set(own.cameras.values()))
    if absent:
        differing.append(f"cameras {absent} (the simulator's: {sorted(own.cameras.values())})")
    if differing:
        raise ValueError(
            f"robot {robot.name!r} does not fit the simulator's, {own.name!r}: it has "
            f"{'; '.join(differing)}; {advice}"
        )
