"""Silence for the tracebacks that Orbax prints beside the error it raises, and for false alarms.

It reads arrays in asyncio tasks and forgets the others once one has failed: asyncio logs their
errors, the garbage collector reports their coroutines, and TensorStore's threads find the event
loop closed. When a save fails, it logs the error before it raises it. Before version 0.12 it
reports an error for each step of a resumed run, because we store no metrics with it.
"""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any


def silence() -> None:
    """Drop these messages in this process from now on; others stay."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_orbaxs)
    hook = sys.unraisablehook
    if not (isinstance(hook, functools.partial) and hook.func is _report):
        sys.unraisablehook = functools.partial(_report, hook)


def _is_not_orbaxs(record: logging.LogRecord) -> bool:
    if record.name == "asyncio":
        message = record.getMessage()  # Tasks of asyncio itself wait for TensorStore's futures.
        return "/orbax/" not in message and "tensorstore" not in message
    is_known = record.exc_info or "metrics" in record.getMessage()
    return not (is_known and "orbax" in record.pathname)


def _report(otherwise: Callable[[Any], object], found: "sys.UnraisableHookArgs") -> None:
    """Pass an error that nobody can catch to the hook before, unless a failed read left it."""
    code = getattr(found.object, "cr_code", None)
    forgotten = code is not None and "/orbax/" in code.co_filename
    too_late = found.object is None and str(found.exc_value) == "Event loop is closed"
    if not (forgotten or too_late):
        otherwise(found)
