"""Metrics between device and log: means over steps, fetched while later steps run.

A step's metrics are taken off the device when `AHEAD` more steps are dispatched, so that the device
never waits for a line of the log; a row is written when its last step has come. `closing` waits for
every step: before a checkpoint or a validation, and at the end.

Besides what the step measures, a row holds seconds of the host's clock:

    seconds_per_step    of everything but validation; a run's first row has compiling in it
    data_wait           of these, until the loader handed over the batch; also a mean over the steps
    checkpoint_stall    in the row of a saved step: until the save before was on disk and this one's
                        arrays were copied. The next row's seconds_per_step has them in it too.
"""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np

from shallow_pi.distill import step

# Steps dispatched ahead of the one whose result the host has seen.
AHEAD = 2

Row = dict[str, float]


class MetricsBuffer:
    """Collects the metrics of steps and writes their means.

    Args:
      write: called with the number of a row's last step and the row.
      check: called with each step's number and metrics; raises where they must not be.
      interval: rows end at multiples of it, besides those of `closing`.
    """

    def __init__(
        self,
        write: Callable[[int, Row], None],
        check: Callable[[int, Mapping[str, float]], None],
        interval: int,
    ) -> None:
        self._write, self._check, self._interval = write, check, interval
        # On the device; and, off it, those of the next row.
        self._ahead: collections.deque[tuple[int, step.Metrics, float]] = collections.deque()
        self._here: list[tuple[int, Row, float]] = []
        self._waited = 0.0
        # When the next row's first step began.
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as the next step's `data_wait`."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def add(self, number: int, values: step.Metrics) -> None:
        """Take in a step that was dispatched; returns when all but `AHEAD` are done."""
        self._ahead.append((number, values, self._waited))
        self._waited = 0.0
        if len(self._ahead) > AHEAD:
            self._take()
            self._write_due()

    @contextlib.contextmanager
    def closing(self) -> Iterator[Row]:
        """Wait for all steps; write their row, with what the block adds, also after an error.

        A row that became due before it is written first. The block is not counted as steps' time,
        but for its last part if that is `stalling`.
        """
        while self._ahead:
            self._take()
            if self._ahead:
                self._write_due()
        number, row = self._here[-1][0], self._mean()
        try:
            yield row
        finally:
            self._began = time.perf_counter() - row.get("checkpoint_stall", 0.0)
            self._write(number, row)

    @contextlib.contextmanager
    def stalling(self, row: Row) -> Iterator[None]:
        """Add the block's seconds to a row as `checkpoint_stall`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            row["checkpoint_stall"] = time.perf_counter() - began

    def _take(self) -> None:
        number, values, waited = self._ahead.popleft()
        here = {name: float(value) for name, value in jax.device_get(values).items()}
        self._check(number, here)
        self._here.append((number, here, waited))

    def _write_due(self) -> None:
        if self._here[-1][0] % self._interval == 0:
            number, row = self._here[-1][0], self._mean()
            self._began = time.perf_counter()
            self._write(number, row)

    def _mean(self) -> Row:
        """Each metric's mean over the steps that have it; forgets them."""
        seconds = time.perf_counter() - self._began
        steps, self._here = self._here, []
        names = dict.fromkeys(name for _, values, _ in steps for name in values)
        row = {
            name: float(np.mean([values[name] for _, values, _ in steps if name in values]))
            for name in names
        }
        row["seconds_per_step"] = seconds / len(steps)
        row["data_wait"] = sum(waited for _, _, waited in steps) / len(steps)
        return row
