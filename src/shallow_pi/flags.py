"""Command-line arguments as the fields of a dataclass."""

import operator
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import tyro

from shallow_pi import progress

T = TypeVar("T")
# Fields ("student.depth", several apart by spaces) that have no effect if the first is true, and
# the reason with the remedy.
Idle = Iterable[tuple[object, str, str]]


def parse(
    kind: type[T],
    arguments: Sequence[str] | None,
    description: str,
    *,
    prog: str | None = None,
    default: T | None = None,
    idle: Callable[[Any], Idle] = lambda _: (),
    conflicts: Callable[[Any], Idle] = lambda _: (),
    part: str = "",
) -> T:
    """Read the fields of a dataclass from a command line; `--help` keeps the description's lines.

    Every command's warnings are errors from here on, or not, as `strict` says: a field of the
    dataclass or of its `data`.

    Args:
      kind: the dataclass.
      arguments: the command line; None reads this process's.
      description: shown above the options.
      prog: name in the usage line; None uses the script's.
      default: values of the fields; None uses the dataclass's defaults.
      idle: the fields that others leave without effect; a command line that sets one is warned of,
        and refused if strict.
      conflicts: the fields that others contradict; a command line that sets one is refused.
      part: the dataclass's field that holds the others, itself no part of their flags; "" is the
        dataclass.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):  # tyro would join the lines into paragraphs.
        print(description.strip(), end="\n\n")
    config = (tyro.conf.AvoidSubcommands,)
    given: dict[str, Any] = {} if default is None else {"default": default}
    try:
        found: T = tyro.cli(kind, args=arguments, prog=prog, description="", config=config, **given)
    except OSError as error:  # A file that a field names; tyro reports a `ValueError` alone.
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    own = getattr(found, part) if part else found
    refused, told = list(conflicts(own)), list(idle(own))
    strict = any(getattr(x, "strict", False) for x in (own, getattr(own, "data", None)))
    progress.be_strict(strict)
    if strict:
        refused, told = refused + told, []
    for flag, reason in _named_idle(arguments, own, refused):
        print(f"error: {flag}: {reason}", file=sys.stderr)
        raise SystemExit(2)
    for flag, reason in _named_idle(arguments, own, told):
        progress.warn(f"{flag} has no effect: {reason}")
    return found


def _named_idle(arguments: Sequence[str], found: object, idle: Idle) -> Iterator[tuple[str, str]]:
    """Those that a command line sets, with their values, and the reasons."""
    given = named(arguments)
    for is_idle, fields, reason in idle:
        for field in fields.split() if is_idle else ():
            if (flag := as_flag(field)) in given:
                value = operator.attrgetter(field)(found)
                words = value if isinstance(value, tuple) else (value,)
                yield " ".join((flag, *map(str, words))), reason


def named(arguments: Sequence[str]) -> set[str]:
    """The flags of a command line, as documented: --a.b-c also for --a.b_c=1 and --a.no-b-c."""
    words = (word.partition("=")[0].replace("_", "-") for word in arguments)
    return {re.sub(r"^--no-|\.no-", lambda m: m[0][:-3], w) for w in words if w.startswith("--")}


def as_flag(field: str) -> str:
    """The flag that sets a field, such as `student.depth`."""
    return f"--{field}".replace("_", "-")


def at_least(given: object, bound: int, *fields: str, prefix: str = "") -> None:
    """Raise ValueError unless these fields are at least `bound`; `prefix` begins their flags."""
    for field in fields:
        if not (value := getattr(given, field)) >= bound:  # Nor NaN.
            raise ValueError(f"{as_flag(prefix + field)} must be at least {bound}, got {value}")


def pairs(words: Sequence[str], flag: str) -> dict[str, str]:
    """Options given as NAME=VALUE after `flag`.

    Raises:
      ValueError: a pair has no name or no value, or a name is given twice.
    """
    found: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not (name and value):
            raise ValueError(f"{flag}: expected NAME=VALUE, got {word!r}")
        if name in found:
            raise ValueError(f"{flag}: {name}={found[name]} and {word} differ: give only one")
        found[name] = value
    return found
