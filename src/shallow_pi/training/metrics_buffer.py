"""Metrics between device and log: means over steps, fetched while later steps run.

A step's metrics are fetched when `AHEAD` more steps are dispatched, so that the device never waits
for the log; a row is written once its last step is fetched. `closing` waits for every step: before
a checkpoint or a validation, and at the end.

Besides the metrics of the step, a row holds seconds of the host's clock:

    seconds_per_step    mean time of a step without validation; the first row includes compiling
    data_wait           the part of it spent waiting for the loader
    checkpoint_stall    in the row of a saved step: time until the previous save was on disk and
                        this one's arrays were copied; the next row's seconds_per_step includes it
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
      write: called with the number of a row's last step, and the row.
      check: called with each step's number and metrics; raises if they are invalid.
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
        """Add a dispatched step; returns when all but the last `AHEAD` are done."""
        self._ahead.append((number, values, self._waited))
        self._waited = 0.0
        if len(self._ahead) > AHEAD:
            self._take()
            self._write_due()

    @contextlib.contextmanager
    def closing(self) -> Iterator[Row]:
        """Wait for all steps; the block may add to their row, which is written even after an error.

        A row that became due earlier is written first. Only `stalling` at the end of the block
        counts as time of steps.
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
        """The mean of each metric over the steps that have it; clears the steps."""
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
