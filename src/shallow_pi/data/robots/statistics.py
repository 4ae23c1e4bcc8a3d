"""Exact statistics of what the model is trained on, from the numeric columns of a dataset.

As openpi's, they are over states and over *action chunks*: from every frame the next `horizon`
actions, the last one of the episode repeated beyond its end, converted and taken as differences
from the state at the chunk's start. A million frames make fifty million values a dimension, so
nothing is sorted: a float32's bits, read as an unsigned number, are in the order of the values, and
two passes that count them (upper, then lower 16 bits) give every order statistic exactly, in little
memory. Dimensions that are no differences are counted once, with weights. Threads share the
dimensions.
"""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping

import numpy as np
from jaxtyping import Float, Int

from shallow_pi import progress
from shallow_pi.data.robots import conversions, normalize
from shallow_pi.data.robots import robot as robots

# Values counted at once; about what a core's cache holds.
_BLOCK = 2**18
_QUANTILES = (0.01, 0.99)
# Yields (float32 values, how often each occurs or None for once), the same at every call.
_Blocks = Callable[[], Iterator[tuple[np.ndarray, np.ndarray | None]]]


def compute(
    state: Float[np.ndarray, "n sd"],
    actions: Float[np.ndarray, "n rd"],
    ends: Int[np.ndarray, " n"],
    robot: robots.Robot,
    horizon: int,
    advance: progress.Advance | None = None,
) -> dict[str, normalize.NormStats]:
    """Statistics of `state` and `actions` as the model sees them before normalization.

    Args:
      state: of every frame, in the robot's units.
      actions: of every frame, in the robot's units.
      ends: for every frame the index after its episode's last frame.
      robot: whose conversion and deltas apply.
      horizon: actions of a chunk.
      advance: called once for each of the `sd + rd` dimensions.

    Raises:
      ValueError: no frames, or values that are not finite (says where).
    """
    if not len(state):
        raise ValueError("statistics need at least one frame, got none")
    seen = {
        "state": conversions.to_model(robot.state_conversion, state),
        "actions": conversions.to_model(robot.action_conversion, actions),
    }
    columns = {key: np.asfortranarray(value, np.float32) for key, value in seen.items()}
    for key, value in columns.items():
        if not np.isfinite(value).all():
            frame, dim = np.argwhere(~np.isfinite(value))[0]
            raise ValueError(
                f"cannot compute statistics: {key}, frame {frame}, dimension {dim} is "
                f"{value[frame, dim]}; repair or leave out that episode"
            )
    last = np.asarray(ends) - 1
    weights = _occurrences(last, horizon)

    deltas = np.flatnonzero(robot.delta)

    def job(key: str, dim: int) -> tuple[float, float, float, float]:
        values = columns[key][:, dim]
        if key == "actions" and dim in deltas:
            starts = columns["state"][:, dim]
            found = _exact(lambda: _differences(values, starts, last, horizon))
        else:
            found = _exact(lambda: _pieces(values, weights if key == "actions" else None))
        if advance is not None:
            advance(1)
        return found

    jobs = [(key, dim) for key, value in columns.items() for dim in range(value.shape[1])]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(jobs, pool.map(job, *zip(*jobs, strict=True)), strict=True))
    return {
        key: normalize.NormStats(*np.array([found[key, d] for d in range(value.shape[1])]).T)
        for key, value in columns.items()
    }


def _pieces(
    values: np.ndarray, weights: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    for i in range(0, len(values), _BLOCK):
        yield values[i : i + _BLOCK], None if weights is None else weights[i : i + _BLOCK]


def _differences(
    actions: np.ndarray, state: np.ndarray, last: np.ndarray, horizon: int
) -> Iterator[tuple[np.ndarray, None]]:
    """Every chunk's actions minus the state at its start."""
    step, ahead = max(1, _BLOCK // horizon), np.arange(horizon)[:, None]
    for i in range(0, len(actions), step):
        frames = np.arange(i, min(i + step, len(actions)))
        chunk = np.take(actions, np.minimum(frames + ahead, last[frames]), mode="clip")
        chunk -= state[frames]
        yield chunk.ravel(), None


def _occurrences(last: np.ndarray, horizon: int) -> np.ndarray:
    """Number of times each frame's action occurs in the chunks."""
    frames = np.arange(len(last))
    starts = np.searchsorted(last, last, side="left")
    weights = np.minimum(frames - starts + 1, horizon)
    full = np.minimum(last - starts + 1, horizon)
    # The last action of an episode also fills the chunks that reach beyond its end.
    filled = full * horizon - full * (full - 1) // 2
    return np.where(frames == last, filled, weights)


def _exact(blocks: _Blocks) -> tuple[float, float, float, float]:
    """Mean, standard deviation, 1st and 99th percentile (numpy's linear interpolation)."""
    total, count, upper = 0.0, 0, np.zeros(2**16)
    for values, weights in blocks():
        upper += np.bincount(_keys(values) >> 16, weights, 2**16)
        count += len(values) if weights is None else int(weights.sum())
        total += float(values.sum(dtype=np.float64) if weights is None else values @ weights)
    mean = total / count
    places = [q * (count - 1) for q in _QUANTILES]
    ranks = sorted({int(r) for place in places for r in (np.floor(place), np.ceil(place))})
    below = np.concatenate([[0], np.cumsum(upper)])
    bins = {rank: int(np.searchsorted(below, rank, side="right")) - 1 for rank in ranks}
    squares, lower = 0.0, {part: np.zeros(2**16) for part in bins.values()}
    for values, weights in blocks():
        centred = values - mean
        squares += float(centred @ centred if weights is None else weights @ centred**2)
        keys = _keys(values)
        for part, counts in lower.items():
            inside = np.flatnonzero(keys >> 16 == part)
            if len(inside):
                chosen = None if weights is None else weights[inside]
                counts += np.bincount(keys[inside] & 0xFFFF, chosen, 2**16)
    ordered = {}
    for rank, part in bins.items():
        within = np.searchsorted(np.cumsum(lower[part]), rank - below[part], side="right")
        ordered[rank] = _value(part << 16 | int(within))
    q01, q99 = (_between(ordered[int(p)], ordered[int(np.ceil(p))], p % 1) for p in places)
    return mean, float(np.sqrt(squares / count)), q01, q99


def _between(low: float, high: float, share: float) -> float:
    """As numpy interpolates, so that the two agree to the bit."""
    step = high - low
    return high - step * (1 - share) if share >= 0.5 else low + step * share


def _keys(values: np.ndarray) -> np.ndarray:
    """Numbers in the order of float32 values: negative ones with all bits flipped."""
    bits = np.ascontiguousarray(values, np.float32).view(np.int32)
    flipped = bits ^ ((bits >> 31) | np.int32(-(2**31)))
    return flipped.view(np.uint32).astype(np.int64)


def _value(key: int) -> float:
    """The float32 of a key."""
    bits = key ^ 0x80000000 if key & 0x80000000 else key ^ 0xFFFFFFFF
    return float(np.array(bits, np.uint32).view(np.float32))


@dataclasses.dataclass(frozen=True)
class _Scale:
    """Expected 1st to 99th percentile of a fitting dataset after normalization."""

    width: float
    # Statistics in another unit, or of another robot, go beyond these.
    too_wide: float = 4.0
    too_narrow: float = 0.04
    too_far: float = 2.0


_SCALES = {"z_score": _Scale(width=5.0), "quantile": _Scale(width=2.0)}
# Ranges below it are taken for noise (metres, radians).
TINY = 1e-3


def doubtful(stats: Mapping[str, normalize.NormStats]) -> list[str]:
    """A line for every dimension whose statistics make a poor scale: constant or hardly moving."""
    lines = []
    for key, found in stats.items():
        for dim, (std, q01, q99) in enumerate(zip(found.std, *found.span(), strict=True)):
            where = f"{key}[{dim}]"
            if std == 0:
                lines.append(
                    f"{where} is constant ({found.mean[dim]:g}): it carries no information"
                )
            elif std < TINY:
                lines.append(
                    f"{where} hardly moves (std {std:.2g}, 98 % within {q01:g} … {q99:g}): its "
                    "noise will be amplified to the scale of the others"
                )
    return lines + one_valued(stats)


def one_valued(stats: Mapping[str, normalize.NormStats]) -> list[str]:
    """A line for every dimension that moves in so few frames that its percentiles are equal."""
    return [
        f"{key}[{dim}] has one value ({q01:g}) in 98 % of the frames, but moves (std {std:.2g}): "
        "quantile normalization (π0.5) divides the rest by next to nothing; widen its q01 or q99 "
        f"in {normalize.FILE_NAME} (--data.norm-stats), and train the teacher with that too"
        for key, found in stats.items()
        for dim, (std, q01, q99) in enumerate(zip(found.std, *found.span(), strict=True))
        if std >= TINY > q99 - q01
    ]


def misfits(
    given: Mapping[str, normalize.NormStats],
    found: Mapping[str, normalize.NormStats],
    kind: normalize.Kind,
) -> list[str]:
    """A line for every dimension of a dataset that given statistics do not fit.

    Args:
      given: the statistics to be used.
      found: the dataset's own, of `compute`.
      kind: the normalization.
    """
    lines, scale = [], _SCALES[kind]
    for key, own in found.items():
        if key not in given:
            lines.append(f"there are no statistics of {key}; there are {sorted(given)}")
            continue
        dims = len(own.mean)
        if len(given[key].mean) < dims:
            lines.append(f"{key} has {len(given[key].mean)} dimensions, the dataset {dims}")
            continue
        span, expected = np.stack(own.span()), np.stack(given[key].span(kind))
        ends = normalize.normalize(span, given[key], kind) / scale.width
        for dim, (low, high) in enumerate(ends.T):
            moves = span[1, dim] - span[0, dim] >= TINY
            if high - low > scale.too_wide:
                what = f"{high - low:.0f} times as wide as they say"
            elif moves and high - low < scale.too_narrow:
                what = f"{1 / max(high - low, 1e-9):.0f} times narrower than they say"
            elif max(abs(low), abs(high)) > scale.too_far:
                what = "far from where they say"
            else:
                continue
            lines.append(
                f"{key}[{dim}] is {what}: {span[0, dim]:g} … {span[1, dim]:g} in the dataset, "
                f"{expected[0, dim]:g} … {expected[1, dim]:g} in the statistics"
            )
    return lines
