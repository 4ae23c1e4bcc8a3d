"""Per-user cache directories, for files that can be made again."""

import os
import pathlib

VARIABLE, HOME = "SHALLOW_PI_CACHE", "~/.cache/shallow_pi"


def folder(name: str) -> pathlib.Path:
    """`$SHALLOW_PI_CACHE/<name>`, by default below `~/.cache/shallow_pi`; it may not exist yet."""
    return chosen(VARIABLE, HOME) / name


def chosen(variable: str, default: str) -> pathlib.Path:
    """The folder that an environment variable names, or else the default.

    Raises:
      ValueError: it is in the home of a user who has none, as in many containers.
    """
    text = os.environ.get(variable) or default
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{text} is in a home directory, and user {os.getuid()} has none: set {variable} to a "
            "folder, or HOME"
        ) from error
