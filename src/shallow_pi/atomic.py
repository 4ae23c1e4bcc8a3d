"""Atomic writes: files that others may read at any time, or that say that something is done."""

import os
import pathlib


def write(path: pathlib.Path, content: str | bytes) -> None:
    """Write a file: readers, a kill and a full disk find the old one or the new one, never a part.

    Args:
      path: of the file; its folder exists.
      content: of the file; text becomes UTF-8.

    Raises:
      OSError: it cannot be written; nothing is left behind.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
