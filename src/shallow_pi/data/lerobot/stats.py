"""The statistics LeRobot keeps in `stats.json`, exact over every frame.

LeRobot averages the quantiles of episodes, which are not the quantiles of all frames.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Num, UInt8

QUANTILES: Mapping[str, float] = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


def of_values(values: Num[np.ndarray, "n ..."]) -> dict[str, np.ndarray]:
    """Exact statistics over frames, in LeRobot's shapes."""
    rows = values[:, None] if values.ndim == 1 else values
    exact = rows.astype(np.float64)
    quantiles = np.quantile(exact, list(QUANTILES.values()), axis=0)
    return {
        "min": rows.min(0),
        "max": rows.max(0),
        "mean": exact.mean(0),
        "std": exact.std(0),
        "count": np.array([len(rows)]),
        **dict(zip(QUANTILES, quantiles, strict=True)),
    }


class Histogram:
    """Counts of a camera's pixel values by channel, for the statistics of its images."""

    def __init__(self) -> None:
        self.frames = 0
        # Of the images; None before the first.
        self.shape: tuple[int, ...] | None = None
        self._counts = np.zeros((3, 256), np.int64)

    def add(self, image: UInt8[np.ndarray, "h w 3"]) -> None:
        """Count one image."""
        self.frames += 1
        self.shape = self.shape or image.shape
        for channel in range(3):
            self._counts[channel] += np.bincount(image[..., channel].ravel(), minlength=256)

    def merge(self, other: "Histogram") -> None:
        """Add the counts of another histogram."""
        self.frames += other.frames
        self.shape = self.shape or other.shape
        self._counts += other._counts

    def stats(self) -> dict[str, np.ndarray]:
        """Exact statistics of pixels in [0, 1], shape (3, 1, 1)."""
        value = np.arange(256) / 255
        total = self._counts.sum(1)
        mean = self._counts @ value / total
        std = np.sqrt(np.maximum(self._counts @ value**2 / total - mean**2, 0))
        cumulative = self._counts.cumsum(1)

        def quantile(q: float) -> np.ndarray:
            rank = q * (total - 1)
            low, high = (
                [
                    np.searchsorted(row, k, side="right")
                    for row, k in zip(cumulative, ranks, strict=True)
                ]
                for ranks in (np.floor(rank), np.ceil(rank))
            )
            return value[low] + (value[high] - value[low]) * (rank - np.floor(rank))

        by_name = {"min": quantile(0.0), "max": quantile(1.0), "mean": mean, "std": std}
        by_name |= {name: quantile(q) for name, q in QUANTILES.items()}
        shaped = {name: np.asarray(x).reshape(3, 1, 1) for name, x in by_name.items()}
        head = {name: shaped.pop(name) for name in ("min", "max", "mean", "std")}
        return {**head, "count": np.array([self.frames]), **shaped}
