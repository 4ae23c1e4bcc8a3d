"""From samples to batches: shuffle, shard by process, batch, prefetch, and resume exactly.

The order of samples depends on the seed alone, and each process takes its block of rows of every
global batch: batch k has the same rows for any number of processes. The position is the number of
batches returned, so a run resumes exactly, even with another number of processes, threads or
workers.

Threads share memory and start at once; they are enough while most of the work is decoding, which
releases the GIL. Workers are processes: they take seconds to start and hold their own copy of the
numeric columns, but do not wait for the GIL of the training loop.
"""

import collections
import contextlib
import errno
import fractions
import functools
import math
import multiprocessing
import multiprocessing.connection
import operator
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import grain  # type: ignore[import-untyped]  # ships no types
import jax
import numpy as np
from absl import flags

from shallow_pi import interrupts
from shallow_pi.data import sources
from shallow_pi.models import batch as batches

# Longest period, in samples, within which the shares are exact.
MAX_PERIOD = 10**6


class Loader:
    """An endless iterator of batches of numpy arrays, with a state to resume from.

    Args:
      source: the samples.
      batch_size: batch size over all processes; each gets its share.
      seed: seed of the order.
      num_threads: threads that read batches ahead; 0 reads in the calling thread.
      num_workers: processes that read batches ahead instead of threads; 0 uses threads. They need
        a source that can be pickled.
      prefetch_batches: largest number of batches read ahead (workers: two each).
      process_index, process_count: default to JAX's.
    """

    def __init__(
        self,
        source: sources.Source,
        batch_size: int,
        *,
        seed: int = 0,
        num_threads: int = 2,
        num_workers: int = 0,
        prefetch_batches: int = 4,
        process_index: int | None = None,
        process_count: int | None = None,
    ) -> None:
        index = jax.process_index() if process_index is None else process_index
        count = jax.process_count() if process_count is None else process_count
        if not len(source):
            raise ValueError("the data source is empty; there is nothing to train on")
        if batch_size < 1 or batch_size % count:
            raise ValueError(
                f"--batch-size {batch_size} must be a positive multiple of the {count} processes"
            )
        if num_workers and isinstance(source, sources.Cached):
            raise ValueError(
                f"{num_workers} workers would each fill a memory cache of their own: read with "
                "threads (--data.num-workers 0), or keep the images on disk (--data.cache disk)"
            )
        self.batch_size = batch_size
        self.local_batch_size = batch_size // count
        shares = sources.shares(source)
        self._identity = {
            "seed": seed,
            "batch_size": batch_size,
            "samples": [length for length, _ in shares],
            "weights": [weight for _, weight in shares],
        }
        own = slice(index * self.local_batch_size, (index + 1) * self.local_batch_size)
        indices = order(shares, seed).batch(batch_size).map(operator.itemgetter(own))
        self._batches = indices.map(functools.partial(_gather, source))
        self._num_threads, self._num_workers = num_threads, num_workers
        self._ahead = prefetch_batches
        self._iterator: Any
        self._started: bool
        self._seek(0)

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> batches.Batch:
        if not self._num_workers:
            batch = next(self._iterator)
        else:
            with _explained(), contextlib.nullcontext() if self._started else interrupts.held():
                batch = _own(next(self._iterator))
            self._started = True
        self._position += 1
        return batch

    def state(self) -> dict[str, Any]:
        """The position as plain JSON, for `restore`."""
        return {**self._identity, "batch": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly at the position `state`."""
        different = {
            key: (state.get(key), value)
            for key, value in self._identity.items()
            if state.get(key) != value
        }
        if different:
            raise ValueError(
                "cannot resume the data position; (saved, now) differ in "
                f"{different}; resume with the same data, seed and batch size (--data.episodes "
                "leaves out what was recorded since), or begin another run (--exp-name)"
            )
        self.close()
        self._seek(state["batch"])

    def close(self) -> None:
        """Stop threads and workers."""
        self._iterator.close()

    def _seek(self, batch: int) -> None:
        self._position, self._started = batch, False
        # Every thread works on a batch.
        threaded = self._num_threads and not self._num_workers
        ahead = max(self._ahead, self._num_threads) if threaded else 0
        options = grain.ReadOptions(num_threads=self._num_threads, prefetch_buffer_size=ahead)
        found = self._batches[batch:].to_iter_dataset(options)
        if not self._num_workers:
            self._iterator = iter(found)
            return
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain reads absl flags.
        workers = grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=2)
        self._iterator = iter(found.mp_prefetch(workers, _start_worker))


def order(shares: Sequence[sources.Share], seed: int) -> grain.MapDataset:
    """The endless stream of sample indices.

    Every part is reshuffled for each of its epochs, and its samples are evenly spaced, so that the
    shares are exact in every period of the weights (2 1 1: every four samples).
    """
    parts, start = [], 0
    for number, (length, _) in enumerate(shares):
        part = grain.MapDataset.range(start, start + length)
        parts.append(part.seed((seed + number) % 2**32).shuffle().repeat())
        start += length
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.select_from_datasets(parts, _Turns([weight for _, weight in shares]))


class _Turns:
    """Map from a place in the stream to (part, place in that part's stream)."""

    def __init__(self, weights: Sequence[float]) -> None:
        exact = [fractions.Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        counts = [int(weight * scale) for weight in exact]
        counts = [count // math.gcd(*counts) for count in counts]
        if (total := sum(counts)) > MAX_PERIOD:
            counts = [max(1, round(count / total * MAX_PERIOD)) for count in counts]
        self._counts = counts
        turns = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
        in_order = np.argsort(turns, kind="stable")
        self._parts = np.repeat(np.arange(len(counts)), counts)[in_order]
        self._places = np.concatenate([np.arange(count) for count in counts])[in_order]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, i: int) -> tuple[int, int]:
        period, place = divmod(i, len(self._parts))
        part = int(self._parts[place])
        return part, period * self._counts[part] + int(self._places[place])


def _gather(source: sources.Source, indices: np.ndarray) -> batches.Batch:
    if isinstance(source, sources.Cached):
        return source.gather(indices)
    return batches.stack([source[int(i)] for i in indices])


def _own(batch: batches.Batch) -> batches.Batch:
    """A copy of a worker's batch, whose shared memory is freed with the worker."""
    return jax.tree.map(np.array, batch)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Raise an OSError that says what to do where a worker is killed, or cannot pass its batch."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # grain tells of a worker's end in words alone.
        if getattr(error, "errno", None) == errno.ENOSPC or "exit code -7" in str(error):
            why = (
                "/dev/shm, through which workers pass batches, is full: give it more (docker run "
                "--shm-size 8g; in Kubernetes a volume of medium Memory)"
            )
        elif "exit code -9" in str(error):
            why = "a worker was killed, as if this machine's memory ran out: use fewer"
        else:
            raise
        raise OSError(f"{why}, or read with threads (--data.num-workers 0)") from error


def _start_worker(index: int, count: int) -> None:
    """Make a worker end when its parent process ends for any reason."""
    del index, count
    parent = multiprocessing.parent_process()
    assert parent is not None, "workers are started by multiprocessing"

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Prefetch:
    """An iterator of batches as global arrays over `sharding`, `depth` batches ahead of the step.

    `state` is the position of the last batch returned.
    """

    def __init__(self, loader: Loader, sharding: jax.sharding.Sharding, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"prefetch depth must be at least 1, got {depth}")
        self._loader = loader
        self._sharding = sharding
        self._depth = depth
        self._state = loader.state()
        self._ahead: collections.deque[tuple[batches.Batch, dict[str, Any]]] = collections.deque()
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[batches.Batch]:
        return self

    def __next__(self) -> batches.Batch:
        with self._lock:
            while len(self._ahead) < self._depth:
                batch = self._to_device(next(self._loader))
                self._ahead.append((batch, self._loader.state()))
            batch, self._state = self._ahead.popleft()
            return batch

    def state(self) -> dict[str, Any]:
        """The position of the last batch returned; batches read ahead do not count."""
        with self._lock:
            return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at the position `state`; batches read ahead are dropped."""
        with self._lock:
            self._loader.restore(state)
            self._ahead.clear()
            self._state = state

    def close(self) -> None:
        """Stop reading ahead."""
        with self._lock:
            self._loader.close()

    def _to_device(self, batch: batches.Batch) -> batches.Batch:
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(self._sharding, leaf), batch
        )
