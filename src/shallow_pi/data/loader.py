"""From samples to batches: shuffle, shard by process, batch, prefetch, and resume exactly.

A source is anything with `len` and `[i]` that gives model samples (dicts of numpy arrays without
batch axis). The order of samples is a function of the seed alone: process p of n takes every n-th
sample of one shuffled, endless stream, so global batch k holds the same samples however many
processes share it, and a run resumes exactly, also on another number of processes.
"""

import collections
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import grain  # type: ignore[import-untyped]  # ships no types
import jax
import numpy as np

from shallow_pi.data import lerobot, robots, transforms

Batch = dict[str, Any]


@runtime_checkable
class Source(Protocol):
    """Random access to samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> transforms.Sample: ...


class DatasetSource:
    """Model samples of a LeRobot dataset: frame, action chunk, and the robot's transforms."""

    def __init__(
        self,
        dataset: lerobot.Dataset,
        robot: robots.Robot,
        horizon: int,
        transform: transforms.Transform,
    ) -> None:
        dataset.validate(robot)
        self.dataset = dataset
        self.robot = robot
        self.horizon = horizon
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> transforms.Sample:
        sample = self.dataset.read(i, tuple(self.robot.cameras.values()))
        actions, is_pad = self.dataset.chunk(i, self.horizon, self.robot.action_key)
        return self.transform({**sample, self.robot.action_key: actions, "action_is_pad": is_pad})


class SyntheticSource:
    """Deterministic, learnable samples without files: the actions follow state and prompt."""

    def __init__(
        self,
        *,
        cameras: Sequence[str],
        image_size: int,
        action_dim: int,
        action_horizon: int,
        max_token_len: int,
        vocab_size: int,
        seed: int = 0,
        length: int = 1024,
    ) -> None:
        self.cameras = tuple(cameras)
        self.image_size = image_size
        self.action_dim = action_dim
        self.action_horizon = action_horizon
        self.max_token_len = max_token_len
        self.vocab_size = vocab_size
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> transforms.Sample:
        rng = np.random.default_rng([self.seed, i])
        state = rng.uniform(-1, 1, self.action_dim).astype(np.float32)
        task = int(rng.integers(2))
        tokens = np.zeros(self.max_token_len, np.int32)
        tokens[:3] = np.array([2, 4 + task, 3]) % self.vocab_size
        grey = np.uint8(127.5 * (state[0] + 1))
        picture = np.full((self.image_size, self.image_size, 3), grey, np.uint8)
        ramp = np.linspace(0, 1, self.action_horizon, dtype=np.float32)[:, None]
        return {
            "image": dict.fromkeys(self.cameras, picture),
            "image_mask": dict.fromkeys(self.cameras, np.bool_(True)),
            "state": state,
            "tokenized_prompt": tokens,
            "tokenized_prompt_mask": np.arange(self.max_token_len) < 3,
            "actions": state * (1 - ramp) + (2 * task - 1) * ramp,
            "action_mask": np.ones(self.action_horizon, bool),
        }


class Cached:
    """Keeps the samples of `source` in memory, each decoded when it is first asked for.

    Memory grows to `self.nbytes`; a source that needs more than `max_bytes` is refused.
    """

    def __init__(self, source: Source, max_bytes: int = 2 * 2**30) -> None:
        first = source[0]
        sample_bytes = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(first))
        self.nbytes = sample_bytes * len(source)
        if self.nbytes > max_bytes:
            raise ValueError(
                f"caching {len(source)} samples needs {self.nbytes / 2**20:.0f} MiB, more than the "
                f"{max_bytes / 2**20:.0f} MiB allowed; raise the limit or switch the cache off"
            )
        self.source = source
        self._arrays = jax.tree.map(
            lambda leaf: np.empty((len(source), *np.shape(leaf)), np.asarray(leaf).dtype), first
        )
        self._filled = np.zeros(len(source), bool)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> transforms.Sample:
        self._fill(i)
        return jax.tree.map(lambda array: array[i], self._arrays)

    def gather(self, indices: np.ndarray) -> Batch:
        """The samples at `indices`, stacked: one copy per key."""
        for i in indices[~self._filled[indices]]:
            self._fill(int(i))
        return jax.tree.map(lambda array: array[indices], self._arrays)

    def _fill(self, i: int) -> None:
        # Two threads may decode the same sample; both write the same bytes, the flag comes last.
        if self._filled[i]:
            return

        def write(array: np.ndarray, leaf: Any) -> None:
            array[i] = leaf

        jax.tree.map(write, self._arrays, self.source[i])
        self._filled[i] = True


class Loader:
    """An endless iterator of batches of numpy arrays, with a state to resume from.

    Args:
      source: of samples.
      batch_size: over all processes; each gets its share.
      seed: of the order.
      num_threads: that read samples ahead; 0 reads in the calling thread.
      prefetch_batches: how many batches are read ahead at most.
      process_index, process_count: default to JAX's.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        *,
        seed: int = 0,
        num_threads: int = 2,
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
                f"batch_size {batch_size} must be a positive multiple of the {count} processes"
            )
        self.batch_size = batch_size
        self.local_batch_size = batch_size // count
        self._identity = {"seed": seed, "batch_size": batch_size, "samples": len(source)}

        def gather(indices: np.ndarray) -> Batch:
            if isinstance(source, Cached):
                return source.gather(indices)
            samples = [source[int(i)] for i in indices]
            return jax.tree.map(lambda *leaves: np.stack(leaves), *samples)

        indices = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
        batches = indices[index::count].batch(self.local_batch_size).map(gather)
        options = grain.ReadOptions(
            num_threads=num_threads, prefetch_buffer_size=prefetch_batches if num_threads else 0
        )
        self._iterator = iter(batches.to_iter_dataset(options))

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def state(self) -> dict[str, Any]:
        """JSON-able position: what `restore` needs to give the batch after the last one given."""
        return {**self._identity, "iterator": self._iterator.get_state()}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken."""
        different = {
            key: (state.get(key), value)
            for key, value in self._identity.items()
            if state.get(key) != value
        }
        if different:
            raise ValueError(
                "cannot resume the data position; (saved, now) differ in "
                f"{different}; resume with the same data, seed and batch size"
            )
        self._iterator.set_state(state["iterator"])


class Prefetch:
    """Batches on device, `depth` of them ahead; `state` is that of the last batch handed out."""

    def __init__(self, loader: Loader, sharding: jax.sharding.Sharding, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"prefetch depth must be at least 1, got {depth}")
        self._loader = loader
        self._sharding = sharding
        self._depth = depth
        self._state = loader.state()
        self._ahead: collections.deque[tuple[Batch, dict[str, Any]]] = collections.deque()
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        with self._lock:
            while len(self._ahead) < self._depth:
                batch = self._to_device(next(self._loader))
                self._ahead.append((batch, self._loader.state()))
            batch, self._state = self._ahead.popleft()
            return batch

    def state(self) -> dict[str, Any]:
        """As `Loader.state`, counted by what was handed out rather than what was read ahead."""
        with self._lock:
            return self._state

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; what was read ahead is dropped."""
        with self._lock:
            self._loader.restore(state)
            self._ahead.clear()
            self._state = state

    def _to_device(self, batch: Batch) -> Batch:
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(self._sharding, leaf), batch
        )


def prefetch(loader: Loader, sharding: jax.sharding.Sharding, depth: int = 2) -> Prefetch:
    """Global arrays over `sharding` (batch axis first), `depth` batches ahead of the step."""
    return Prefetch(loader, sharding, depth)
