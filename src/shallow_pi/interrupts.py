"""Signals in a program of several processes.

A terminal sends Ctrl-C to all of them at once, and SIGHUP when it is closed.
"""

import contextlib
import multiprocessing.resource_tracker
import signal
from collections.abc import Iterator

# Seconds in which a repeated signal is the same one: `uv run` and `srun` forward to this process
# what a terminal or a scheduler sends to the whole process group.
FORWARDED_SECONDS = 1.0


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Make processes started in the block ignore the terminal, whose signals are for this one."""
    # Python's resource tracker, started with the first process, would undo it.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
