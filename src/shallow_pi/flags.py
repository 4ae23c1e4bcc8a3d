"""Command-line arguments as the fields of a dataclass."""

import sys
from collections.abc import Sequence
from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(
    kind: type[T],
    arguments: Sequence[str] | None,
    description: str,
    *,
    prog: str | None = None,
    default: T | None = None,
) -> T:
    """Read the fields of a dataclass from a command line; `--help` keeps the description's lines.

    Args:
      kind: the dataclass.
      arguments: the command line; None reads this process's.
      description: shown above the options.
      prog: name in the usage line; None takes the script's.
      default: values of the fields; None takes the dataclass's defaults.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):  # tyro would join the lines into paragraphs.
        print(description.strip(), end="\n\n")
    config = (tyro.conf.AvoidSubcommands,)
    if default is None:
        return tyro.cli(kind, args=arguments, prog=prog, description="", config=config)
    return tyro.cli(kind, args=arguments, prog=prog, description="", config=config, default=default)
