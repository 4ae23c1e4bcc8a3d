"""Per-user cache directory, for files that can be made again."""

import os
import pathlib

VARIABLE, HOME = "SHALLOW_PI_CACHE", "~/.cache/shallow_pi"


def folder(name: str) -> pathlib.Path:
    """`$SHALLOW_PI_CACHE/<name>`, by default below `~/.cache/shallow_pi`; it may not exist yet."""
    return pathlib.Path(os.environ.get(VARIABLE) or HOME).expanduser() / name
