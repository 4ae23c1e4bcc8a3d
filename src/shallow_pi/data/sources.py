"""Sources of samples: anything with `len` and `[i]` that returns model samples.

A sample is a `Batch` of numpy arrays without the batch axis. `Mixture` combines several sources,
and `Cached` keeps decoded samples in memory. A source does not determine the order in which it is
read, only the shares of its parts (`shares`); `loader` shuffles.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from shallow_pi import progress
from shallow_pi.data import data_config, fit
from shallow_pi.data.lerobot import reader
from shallow_pi.data.robots import normalize, pipelines, statistics, transforms
from shallow_pi.data.robots import robot as robots
from shallow_pi.models import batch as batches

# Number of samples, and their weight in the stream.
Share = tuple[int, float]
# From frame i and a camera key to an image, uint8 (h, w, 3).
Images = Callable[[int, str], np.ndarray]


@runtime_checkable
class Source(Protocol):
    """Random access to samples."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> batches.Batch: ...


class DatasetSource:
    """Model samples of a LeRobot dataset: frame, action chunk, and the robot's transforms.

    `images` replaces the dataset's `image`, for instance by a cache of resized ones.
    """

    def __init__(
        self,
        dataset: reader.Dataset,
        robot: robots.Robot,
        horizon: int,
        transform: transforms.Transform,
        images: Images | None = None,
    ) -> None:
        fit.check(dataset, robot)
        self.dataset = dataset
        self.robot = robot
        self.horizon = horizon
        self.transform = transform
        self.images = dataset.image if images is None else images

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> batches.Batch:
        sample = self.dataset.read(i, cameras=(), keys=self.robot.state_keys)
        sample[self.robot.prompt_key] = fit.prompt(self.dataset, self.robot, i)
        for camera in self.robot.cameras.values():
            sample[camera] = self.images(i, camera)
        parts = {}
        for key in self.robot.action_keys:
            parts[key], sample["action_is_pad"] = self.dataset.chunk(i, self.horizon, key)
        sample["actions"] = self.robot.actions(parts)
        return pipelines.to_batch(self.transform(sample))


class SyntheticSource:
    """Deterministic, learnable samples without files: actions depend on state and prompt."""

    def __init__(self, model: batches.Sizes, *, seed: int = 0, length: int = 1024) -> None:
        self.model = model
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> batches.Batch:
        model, rng = self.model, np.random.default_rng([self.seed, i])
        state = rng.uniform(-1, 1, model.action_dim).astype(np.float32)
        task = int(rng.integers(2))
        tokens = np.zeros(model.max_token_len, np.int32)
        tokens[:3] = np.array([2, 4 + task, 3]) % model.vocab_size
        grey = np.uint8(127.5 * (state[0] + 1))
        image = np.full((model.image_size, model.image_size, 3), grey, np.uint8)
        ramp = np.linspace(0, 1, model.action_horizon, dtype=np.float32)[:, None]
        sample = jax.tree.map(lambda leaf: leaf[0], batches.zeros(model, 1))
        return dataclasses.replace(
            sample,
            observation=dataclasses.replace(
                sample.observation,
                images=dict.fromkeys(model.cameras, image),
                state=state,
                tokenized_prompt=tokens,
                tokenized_prompt_mask=np.arange(model.max_token_len) < 3,
            ),
            actions=state * (1 - ramp) + (2 * task - 1) * ramp,
        )


class Mixture:
    """Several sources, concatenated; `shares` gives the share of each in the stream of samples.

    Args:
      sources: sources of samples of one shape.
      weights: weight of each source in the stream, in any unit; without weights, one shuffle over
        all samples.

    Raises:
      ValueError: a weight that is not positive, or another number of weights than of sources.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] = ()) -> None:
        data_config.check_weights(weights, len(sources))
        self.sources = tuple(sources)
        lengths = [len(source) for source in sources]
        self._starts = [0, *itertools.accumulate(lengths)]
        self.shares: list[Share]
        self.shares = list(zip(lengths, weights, strict=True)) if weights else [(len(self), 1.0)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, i: int) -> batches.Batch:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of a mixture of {len(self)}")
        part = bisect.bisect_right(self._starts, i) - 1
        return self.sources[part][i - self._starts[part]]


def shares(source: Source) -> list[Share]:
    """Number of samples and weight of each part of a source, in the order of its samples."""
    return getattr(source, "shares", [(len(source), 1.0)])


class Cached:
    """A source whose samples are kept in memory after their first use.

    Memory grows to `self.nbytes`; a source that needs more than `max_bytes` is an error.
    """

    def __init__(self, source: Source, max_bytes: int = 2 * 2**30) -> None:
        first = source[0]
        sample_bytes = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(first))
        self.nbytes = sample_bytes * len(source)
        if self.nbytes > max_bytes:
            raise ValueError(
                f"caching {len(source)} samples needs {self.nbytes / 2**20:.0f} MiB, more than "
                f"{max_bytes / 2**20:.0f} MiB: raise --data.cache-gib, or give --data.cache disk"
            )
        self.source = source
        self.shares = shares(source)
        self._arrays = jax.tree.map(
            lambda leaf: np.empty((len(source), *np.shape(leaf)), np.asarray(leaf).dtype), first
        )
        self._filled = np.zeros(len(source), bool)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> batches.Batch:
        self._fill(i)
        return jax.tree.map(lambda array: array[i], self._arrays)

    def gather(self, indices: np.ndarray) -> batches.Batch:
        """The samples at `indices`, stacked, with one copy per key."""
        for i in indices[~self._filled[indices]]:
            self._fill(int(i))
        return jax.tree.map(lambda array: array[indices], self._arrays)

    def _fill(self, i: int) -> None:
        # Two threads may decode the same sample; both write the same bytes, the flag comes last.
        if self._filled[i]:
            return

        def write(array: np.ndarray, leaf: np.ndarray) -> None:
            array[i] = leaf

        jax.tree.map(write, self._arrays, self.source[i])
        self._filled[i] = True


def norm_stats(
    datasets: Sequence[reader.Dataset],
    robot: robots.Robot,
    horizon: int,
    advance: progress.Advance | None = None,
) -> dict[str, normalize.NormStats]:
    """Exact statistics of state and action chunks over the frames of all datasets, unweighted.

    `advance` is called once for each dimension of state and actions.
    """
    starts = itertools.accumulate([len(dataset) for dataset in datasets], initial=0)
    columns = [dataset.columns for dataset in datasets]
    return statistics.compute(
        np.concatenate([robot.state(column) for column in columns]),
        np.concatenate([robot.actions(column) for column in columns]),
        np.concatenate([d.ends + start for d, start in zip(datasets, starts, strict=False)]),
        robot,
        horizon,
        advance,
    )
