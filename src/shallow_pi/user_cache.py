"""Where what can be made again is kept for this user."""

import os
import pathlib

VARIABLE, HOME = "SHALLOW_PI_CACHE", "~/.cache/shallow_pi"


def folder(name: str) -> pathlib.Path:
    """`$SHALLOW_PI_CACHE/<name>`, by default in the user's cache folder; it may not exist yet."""
    return pathlib.Path(os.environ.get(VARIABLE) or HOME).expanduser() / name
