"""Files, folders and lines that appear whole or not at all, for readers, a kill and a full disk."""

import contextlib
import errno
import glob
import os
import pathlib
import platform
import shutil
from collections.abc import Iterator


def write(path: pathlib.Path, content: str | bytes) -> None:
    """Write a file: readers find the old one or the new one, never a part.

    Args:
      path: of the file; its folder exists.
      content: of the file; text becomes UTF-8.

    Raises:
      OSError: it cannot be written; names it. Nothing is left behind.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:
            # A full disk names no file, a folder that cannot be written the partial one.
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


def append(path: pathlib.Path, line: str) -> None:
    """Add a line to a file, in one write: lines of several processes do not mix.

    The rest of an interrupted write does not swallow it.

    Raises:
      OSError: the line is not there, or only its beginning.
    """
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        cut_short = size and os.pread(file, 1, size - 1) != b"\n"
        content = b"\n" * bool(cut_short) + line.encode() + b"\n"
        if os.write(file, content) < len(content):  # As much as the disk had room for.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(file)


@contextlib.contextmanager
def folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Make a folder: the block fills another one, which gets the name of `target` at its end.

    If the block fails, nothing is left behind; what was left by a process that was killed is
    removed.

    Args:
      target: does not exist, or is an empty folder.

    Raises:
      OSError: it cannot be made.
    """
    start = f".{target.name}.unfinished-{platform.node()}-"
    partial = target.with_name(f"{start}{os.getpid()}")
    with parents(target):
        for other in target.parent.glob(f"{glob.escape(start)}*"):
            process = other.name.removeprefix(start)
            if process.isdecimal() and not _runs(int(process)):
                shutil.rmtree(other, ignore_errors=True)
        try:
            partial.mkdir()
            yield partial
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def parents(path: pathlib.Path) -> Iterator[None]:
    """Make the folders above a path; if the block fails, those that were made are removed."""
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # Another process uses it.
            for folder in made:
                folder.rmdir()
        raise


def _runs(process: int) -> bool:
    """The process exists on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # Another user's.
        return True
    return True
