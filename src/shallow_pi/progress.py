"""Progress bars with an estimate of the time left, for everything over a few seconds; warnings.

One call, so that every stage of a run looks alike:
`with bar("Demonstrations", total=300) as advance: advance(1)`. On a terminal the bar redraws in
place; elsewhere (a log file, CI) a line is printed at the start, at the end, and about every ten
seconds between. Only the first process of a multi-host job should open one. `warn` names something
that is used in another way than a user may think (an ignored key, a guessed value), once; after
`be_strict` (`--strict`) it is an error. A job outlives its terminal and its log (`Output`).
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import IO, Any, Literal, Protocol, cast

import rich.console
import rich.progress

# Warnings of a process, and characters of each: a server's tell what its clients send.
MOST, LONGEST = 1000, 2000


class Output:
    """Standard error or output; drops what it cannot write.

    A terminal may be closed, `tee` end with Ctrl-C before the step is saved, the log's disk fill.
    """

    def __init__(self, name: Literal["stderr", "stdout"]) -> None:
        self._name = name

    @property
    def _stream(self) -> Any:
        stream = getattr(sys, self._name)
        return getattr(stream, "rich_proxied_file", stream)  # A bar's, which prints by a console.

    def write(self, text: str) -> int:
        """Write, and tell of no error."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, and tell of no error."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def printer(name: Literal["stderr", "stdout"]) -> rich.console.Console:
    """A console of standard error or output that drops what it cannot write."""
    return rich.console.Console(file=cast(IO[str], Output(name)))


console = printer("stderr")
_told: set[str] = set()
_strict = False


def say(text: str) -> None:
    """Print one line, however long, without rich's colours."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def warn(text: str, *, tolerated: bool = False) -> None:
    """Print a warning, the same text once in a process.

    Args:
      text: the warning.
      tolerated: never an error: not the user's doing, and no reason to end a long run.

    Raises:
      ValueError: warnings are errors (`be_strict`).
    """
    if _strict and not tolerated:
        raise ValueError(f"{text} (--strict makes this warning an error)")
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
    if text not in _told and len(_told) < MOST:
        _told.add(text)
        say(f"warning: {text}")
        if len(_told) == MOST:
            say(f"warning: these were {MOST} warnings; no more are shown")


def be_strict(strict: bool = True) -> None:
    """Make every later warning an error, or a warning again."""
    global _strict
    _strict = strict


class Advance(Protocol):
    """Moves a bar on by `amount`; `note` is shown behind it."""

    def __call__(self, amount: int = 1, note: str = "") -> None: ...


@contextlib.contextmanager
def bar(label: str, total: int, done: int = 0) -> Iterator[Advance]:
    """Show a progress bar with ETA.

    Args:
      label: what is being done.
      total: how many units there are.
      done: how many were done before (a resumed run).
    """
    with (_terminal_bar if console.is_terminal else _log_bar)(label, total, done) as advance:
        yield advance


@contextlib.contextmanager
def _terminal_bar(label: str, total: int, done: int) -> Iterator[Advance]:
    columns = (
        rich.progress.TextColumn("{task.description:<16}"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TimeElapsedColumn(),
        rich.progress.TextColumn("ETA"),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[note]}"),
    )
    with rich.progress.Progress(*columns, console=console) as display:
        task = display.add_task(label, total=total, completed=done, note="")

        def advance(amount: int = 1, note: str = "") -> None:
            display.update(task, advance=amount)
            if note:
                display.update(task, note=note)

        yield advance


@contextlib.contextmanager
def _log_bar(label: str, total: int, done: int, every_seconds: float = 10.0) -> Iterator[Advance]:
    say(f"{label}: {done}/{total}")
    start = last = time.monotonic()
    count = done
    # The first units take longer (a step is compiled): they are not counted in the estimate.
    paced_from, paced = start, done

    def advance(amount: int = 1, note: str = "") -> None:
        nonlocal count, last, paced_from, paced
        now = time.monotonic()
        if amount and count == done:
            paced_from, paced = now, count + amount
        count += amount
        if now - last >= every_seconds and count < total:
            last = now
            eta = ""
            if count > paced:
                left = (now - paced_from) / (count - paced) * (total - count)
                eta = f", ETA {left:.0f} s"
            say(f"{label}: {count}/{total}{eta} {note}".rstrip())

    yield advance
    seconds = time.monotonic() - start
    say(f"{label}: {count}/{total} in {seconds:.1f} s")
