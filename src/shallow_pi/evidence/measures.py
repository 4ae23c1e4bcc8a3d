"""Measures of behaviour beside success, which go on telling policies apart where success is full.

Distances between distributions of action chunks, and the smoothness of a path. Positions are in
metres; what is reported is in millimetres.
"""

import numpy as np
from jaxtyping import Float


def energy_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
    """Energy distance of two samples: 2·E‖a − b‖ − E‖a − a'‖ − E‖b − b'‖, without bias.

    It is 0 only for equal distributions (Székely and Rizzo 2013): neither a right mean nor a right
    spread is enough. Pairs of a sample with itself are left out, so that two samples of one
    distribution give 0 on average, and a single one may come out below.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"expected two samples (n >= 2, d) of equal dimension, got {a.shape} and {b.shape}"
        )
    n, m = len(a), len(b)
    within_a, within_b = _distances(a, a).sum() / (n * (n - 1)), _distances(b, b).sum()
    return float(2 * _distances(a, b).mean() - within_a - within_b / (m * (m - 1)))


def _distances(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> np.ndarray:
    return np.asarray(np.linalg.norm(a[:, None] - b[None], axis=-1))


def chunk_distance(a: Float[np.ndarray, "n h rd"], b: Float[np.ndarray, "m h rd"]) -> float:
    """Energy distance of two samples of chunks, in mm.

    The distance of two chunks is the root mean square, over the steps, of the distance between
    their positions; so two chunks 1 mm apart all along are 1 mm apart.
    """
    if a.ndim != 3 or a.shape[1:] != b.shape[1:]:
        raise ValueError(f"expected chunks (n, h, rd) of one shape, got {a.shape} and {b.shape}")
    scale = 1000 / np.sqrt(a.shape[1])
    return energy_distance(scale * a.reshape(len(a), -1), scale * b.reshape(len(b), -1))


def sideways_spread(chunks: Float[np.ndarray, "n h rd"], towards: Float[np.ndarray, "2"]) -> float:
    """Standard deviation, in mm, of the middle positions of chunks, across the way to the target.

    The chunks are for one observation, from several noises. A policy that passes a pillar left or
    right has a large one; one that plans the mean of both has none.
    """
    length = float(np.hypot(*towards))
    if chunks.ndim != 3 or len(chunks) < 2 or not length > 0:
        raise ValueError(
            f"expected several chunks (n, h, rd) and a way that is not 0, got {chunks.shape} and "
            f"{towards}"
        )
    across = np.array([-towards[1], towards[0]]) / length
    return float(1000 * (chunks[:, chunks.shape[1] // 2, :2] @ across).std(ddof=1))


def path_length(path: Float[np.ndarray, "t 3"]) -> float:
    """Length in mm of a path given by its points."""
    return float(1000 * np.linalg.norm(np.diff(path, axis=0), axis=1).sum())


def jerk(path: Float[np.ndarray, "t 3"], control_hz: float) -> float:
    """Root mean square of the third derivative, m/s³, from third differences; 0 below 4 points."""
    if len(path) < 4:
        return 0.0
    third = np.diff(path, n=3, axis=0) * control_hz**3
    return float(np.sqrt(np.mean(np.sum(third**2, axis=1))))
