"""Inspection of a run's data: ranges, prompts, and warnings about what a person should look at.

Samples are read as the model gets them, after the robot's conversions, differences and
normalization, so that a fault of any of these shows: another robot's statistics, a camera that is
covered, a prompt that is cut. Beside them stand the numbers that were recorded, over all frames and
in the robot's own units, which show a wrong unit. `sheet` draws the same samples.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8

from shallow_pi import progress
from shallow_pi.data import sources
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import normalize, tokenizer
from shallow_pi.data.robots import robot as robots
from shallow_pi.models import batch as batches

# Samples that a run looks at before its first step.
SAMPLES = 16
# Normalized values beyond it are doubtful: z-scores and quantiles alike lie well inside.
LIMIT = 5.0
# An image whose values differ by no more, of 255, is of one colour; if none is greater, black.
FLAT = 8
# More actions than this share beyond an episode's end are warned of; and more samples in which the
# robot stands still: no normalized action of the chunk differs from another by more than MOTION.
PADDING = STANDING = 0.25
MOTION = 0.01
# Shares of a dimension's plausible span: recorded values may lie outside it by the first, and a
# gripper that goes through less than the second of it is recorded in another unit.
OUTSIDE, SPANNED = 0.25, 0.15

# Lowest, mean and highest value.
Extent = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Range:
    """Values of one dimension of the state or of the actions."""

    # Such as "state[3] left_waist".
    name: str
    # Over all recorded frames, in the robot's own units; None if unknown.
    recorded: Extent | None
    # Of the samples, normalized.
    normalized: Extent
    # Share of the normalized values beyond ±LIMIT.
    beyond: float
    # Number of normalized values.
    count: int
    # Values that the robot declares as plausible.
    limits: robots.Limits | None = None

    @property
    def is_constant(self) -> bool:
        """True if all values are the same."""
        low, _, high = self.recorded or self.normalized
        return self.count > 1 and low == high

    @property
    def misfit(self) -> str:
        """Conflict of the recorded values with the robot's limits; empty if none is known."""
        if self.recorded is None or self.limits is None:
            return ""
        low, _, high = self.recorded
        plausible = f"{self.limits.low:g} to {self.limits.high:g}"
        span = self.limits.high - self.limits.low
        said = f"is recorded from {low:.3g} to {high:.3g}"
        if low < self.limits.low - OUTSIDE * span or high > self.limits.high + OUTSIDE * span:
            return f"{said}, outside the robot's {plausible}"
        if self.limits.is_spanned and not self.is_constant and high - low < SPANNED * span:
            return f"{said}, a small part of the robot's {plausible}"
        return ""

    @property
    def is_doubtful(self) -> bool:
        """True if a warning is about it."""
        return bool(self.is_constant or self.beyond or self.misfit)


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Samples of a source as the model gets them, and what is known of their recording."""

    # On the host; images are still uint8.
    batch: batches.Batch
    # Of the policy; None for synthetic samples.
    assets: policy_assets.Assets | None
    # Of each dimension of `state` and `actions` as recorded; empty if that is unknown.
    recorded: Mapping[str, Sequence[Extent]] = dataclasses.field(default_factory=dict)
    # Cameras that record depth, which the robot does not use, and how that is known.
    depth: Mapping[str, str] = dataclasses.field(default_factory=dict)
    # Share of the actions beyond an episode's end: of all chunks of recordings, else of the batch.
    padding: float = 0.0
    # True if the losses leave these actions out.
    masks_padding: bool = False

    @property
    def values(self) -> dict[str, Float[np.ndarray, "n d"]]:
        """Normalized `state` and `actions`, without padded dimensions and padded actions."""
        state, actions = self.batch.observation.state, self.batch.actions[self.batch.action_mask]
        if self.assets is not None:
            state = state[:, : self.assets.robot.state_dim]
            actions = actions[:, : self.assets.robot.action_dim]
        return {"state": state, "actions": actions}

    def name(self, key: str, dim: int) -> str:
        """`state[3]`, with the dimension's name if it has one."""
        names = () if self.assets is None else self.assets.names.get(key, ())
        return f"{key}[{dim}] {names[dim]}" if names else f"{key}[{dim}]"


def draw(
    source: sources.Source,
    assets: policy_assets.Assets | None,
    count: int = SAMPLES,
    *,
    seed: int = 0,
    masks_padding: bool = False,
    advance: progress.Advance | None = None,
) -> Samples:
    """Samples chosen at random, none twice, stacked as the loader does; all if there are fewer.

    Args:
      source: of samples.
      assets: of the policy; None for synthetic samples.
      count: how many.
      seed: of the choice.
      masks_padding: the losses leave actions out that lie beyond an episode's end.
      advance: called once for each sample.

    Raises:
      ValueError: an empty source, or a count below 1.
    """
    if count < 1 or not len(source):
        raise ValueError(
            f"expected at least one sample to look at, got {count} of a source of {len(source)}"
        )
    chosen = np.random.default_rng(seed).permutation(len(source))[:count]
    samples = []
    for i in sorted(chosen.tolist()):  # In the order they are recorded, which video likes.
        samples.append(source[i])
        if advance is not None:
            advance(1)
    parts, batch = _recordings(source), batches.stack(samples)
    padding = _padding(parts) if parts else float(1 - batch.action_mask.mean())
    return Samples(batch, assets, _recorded(parts), _depth(parts), padding, masks_padding)


def _recordings(source: sources.Source) -> list[sources.DatasetSource]:
    """The datasets that a source reads, in order; none if it makes samples up."""
    if isinstance(source, sources.Cached):
        return _recordings(source.source)
    if isinstance(source, sources.Mixture):
        return [found for part in source.sources for found in _recordings(part)]
    return [source] if isinstance(source, sources.DatasetSource) else []


def _recorded(parts: Sequence[sources.DatasetSource]) -> dict[str, list[Extent]]:
    if not parts:
        return {}
    found = {}
    for key in ("state", "actions"):
        columns = [
            part.robot.state(part.dataset.columns)
            if key == "state"
            else part.robot.actions(part.dataset.columns)
            for part in parts
        ]
        low = np.min([column.min(0) for column in columns], axis=0)
        high = np.max([column.max(0) for column in columns], axis=0)
        total = sum(column.sum(0, dtype=np.float64) for column in columns)
        mean = total / sum(map(len, columns))
        found[key] = list(zip(low.tolist(), mean.tolist(), high.tolist(), strict=True))
    return found


def _padding(parts: Sequence[sources.DatasetSource]) -> float:
    left = np.concatenate([part.dataset.ends - np.arange(len(part)) for part in parts])
    horizon = parts[0].horizon
    return float(1 - np.minimum(left, horizon).mean() / horizon)


def _depth(parts: Sequence[sources.DatasetSource]) -> dict[str, str]:
    found = {}
    for part in parts:
        for camera in part.dataset.cameras:
            if camera not in part.robot.cameras.values():
                try:
                    found[camera] = part.dataset.depth(camera)
                except (ValueError, OSError):  # What is not used may be damaged.
                    continue
    return {camera: reason for camera, reason in found.items() if reason}


def ranges(samples: Samples) -> list[Range]:
    """A `Range` for every dimension of state and actions."""
    found = []
    robot = None if samples.assets is None else samples.assets.robot
    limits = {} if robot is None else {"state": robot.state_limits, "actions": robot.action_limits}
    for key, values in samples.values.items():
        recorded = samples.recorded.get(key)
        for dim, column in enumerate(values.T):
            found.append(
                Range(
                    name=samples.name(key, dim),
                    recorded=None if recorded is None else recorded[dim],
                    normalized=_extent(column),
                    beyond=float(np.mean(~(np.abs(column) <= LIMIT))),  # NaN counts as beyond.
                    count=len(column),
                    limits=limits[key][dim] if limits.get(key) else None,
                )
            )
    return found


def _extent(column: Float[np.ndarray, " n"]) -> Extent:
    return float(column.min()), float(column.mean()), float(column.max())


def rows(found: list[Range]) -> list[tuple[str, ...]]:
    """The ranges as a table's cells, two header rows first."""
    head = [
        ("", *("", "recorded", "", "", "normalized", ""), "beyond"),
        ("", *("low", "mean", "high") * 2, f"±{LIMIT:g}"),
    ]
    body = [
        (
            own.name,
            *(("", "", "") if own.recorded is None else _decimals(own.recorded)),
            *(f"{x:.2f}" for x in own.normalized),
            f"{100 * own.beyond:.1f} %" if own.beyond else "",
        )
        for own in found
    ]
    return [*head, *body]


def _decimals(extent: Extent) -> list[str]:
    """Numbers with as many decimals as the largest needs for four digits."""
    largest = max(map(abs, extent))
    digits = 3 - math.floor(math.log10(largest)) if 0 < largest < math.inf else 3
    return [f"{x:.{min(max(digits, 0), 12)}f}" for x in extent]


def table(found: list[Range]) -> str:
    """The ranges as text, numbers below each other."""
    cells = rows(found)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def prompts(samples: Samples) -> list[str]:
    """The prompt of every sample, decoded from its tokens; without a tokenizer the tokens."""
    seen = samples.batch.observation
    pairs = zip(seen.tokenized_prompt, seen.tokenized_prompt_mask, strict=True)
    tokens = [row[mask] for row, mask in pairs]
    if samples.assets is None:
        return ["tokens " + " ".join(map(str, row)) for row in tokens]
    words = _tokenizer(samples.assets)
    return [words.decode(row).strip() for row in tokens]


def truncated(samples: Samples) -> Bool[np.ndarray, " b"]:
    """Mark prompts that were cut."""
    seen, assets = samples.batch.observation, samples.assets
    tokens, mask = seen.tokenized_prompt, seen.tokenized_prompt_mask
    if assets is None:
        return np.zeros(len(mask), bool)
    return _tokenizer(assets).is_cut(tokens, mask, assets.model.discrete_state_input)


def facts(samples: Samples) -> list[str]:
    """Lines about the samples as a whole: instructions, lengths, padding, cameras."""
    batch, seen = samples.batch, samples.batch.observation
    used, budget = seen.tokenized_prompt_mask.sum(axis=1), seen.tokenized_prompt_mask.shape[1]
    told, least, most = len(set(_instructions(samples))), used.min(), used.max()
    _, horizon, width = batch.actions.shape
    state, actions = (samples.values[key].shape[1] for key in ("state", "actions"))
    counted = (
        "the losses leave them out (--losses.mask-padded-actions)"
        if samples.masks_padding
        else "the last one repeated; the losses count them, as openpi's do"
    )
    lines = [
        f"{len(used)} samples, {f'{told} different instructions' if told > 1 else '1 instruction'}",
        f"prompts take {f'{least} to {most}' if least < most else most} of {budget} tokens",
        f"{samples.padding:.0%} of the actions, in chunks of {horizon}, lie beyond an episode's "
        f"end: {counted}",
        f"state has {state} and actions {actions} of the model's {width} dimensions; the rest is 0",
    ]
    if standing := int(_stands_still(samples).sum()):
        lines.append(f"in {standing} of {len(used)} samples the robot stands still")
    absent = [name for name, mask in seen.image_masks.items() if not mask.any()]
    lines += [f"camera {name} is absent: black and masked" for name in absent]
    lines += [f"{camera} records depth ({reason})" for camera, reason in samples.depth.items()]
    return lines


def doubtful(samples: Samples, found: list[Range]) -> list[str]:
    """A line for everything that a person should look at before training on it.

    Args:
      samples: to look at.
      found: their `ranges`.
    """
    lines = []
    for own in found:
        if own.is_constant:
            lines.append(f"{own.name} is constant ({own.normalized[0]:.3g} after normalization)")
        if own.misfit:
            lines.append(f"{own.name} {own.misfit}: is it in another unit?")
        if own.beyond:
            far = max(own.normalized[0], own.normalized[2], key=abs)
            lines.append(
                f"{own.name} reaches {far:.3g} after normalization ({own.beyond:.1%} of its values "
                f"beyond ±{LIMIT:g}): are the statistics of this robot, in these units?"
            )
    lines += _doubtful_images(samples)
    cut = truncated(samples)
    if cut.any():
        budget = samples.batch.observation.tokenized_prompt.shape[1]
        lines.append(
            f"{cut.sum()} of {len(cut)} prompts are longer than {budget} tokens and are cut: raise "
            "--model.max-token-len if the teacher was trained so, or shorten them"
        )
    (first, number), *_ = collections.Counter(_instructions(samples)).most_common(1)
    is_meant = samples.assets is not None and bool(samples.assets.robot.prompt)
    if number == len(cut) > 1 and not is_meant:
        lines.append(f"all {number} prompts are equal: {first!r}")
    if samples.padding > PADDING:
        lines.append(
            f"{samples.padding:.0%} of the actions lie beyond an episode's end: episodes are short "
            f"for chunks of {samples.batch.actions.shape[1]}"
        )
    if (share := _stands_still(samples).mean()) > STANDING:
        lines.append(
            f"in {share:.0%} of the samples the robot stands still (all actions of the chunk are "
            "alike), and policies learn to wait: cut such frames, as before a demonstration starts"
        )
    return lines


def _stands_still(samples: Samples) -> Bool[np.ndarray, " b"]:
    """Mark samples whose actions, those of dimensions that move in the recording, stay alike."""
    actions, exists = samples.batch.actions, samples.batch.action_mask[..., None]
    if samples.assets is not None:
        dims = samples.assets.robot.action_dim
        moves = ~normalize.still(samples.assets.stats["actions"])[:dims]
        actions = actions[..., :dims][..., moves]
    span = np.ptp(np.where(exists, actions, actions[:, :1]), axis=1)  # The first always exists.
    return (exists.sum(axis=(1, 2)) > 1) & (span <= MOTION).all(axis=1)


def _doubtful_images(samples: Samples) -> list[str]:
    """Lines about cameras that show nothing; synthetic images are of one colour."""
    if samples.assets is None:
        return []
    lines = []
    seen = samples.batch.observation
    for name, images in seen.images.items():
        there = seen.image_masks[name]
        black = there & (images.max(axis=(1, 2, 3)) <= FLAT)
        flat = there & ~black & np.array([_is_flat(image) for image in images])
        for which, words in ((black, "black"), (flat, "of one colour all over")):
            if which.any():
                lines.append(f"{which.sum()} of {there.sum()} images of {name} are {words}")
    return lines


def _is_flat(image: UInt8[np.ndarray, "h w 3"]) -> bool:
    """True if an image is of one colour inside the black bars that make it square."""
    inside = image[image.any(axis=(1, 2))]
    inside = inside[:, inside.any(axis=(0, 2))]
    return not inside.size or int(np.ptp(inside, axis=(0, 1)).max()) <= FLAT


def _instructions(samples: Samples) -> list[str]:
    """The prompts without the state that π0.5 may have in them."""
    return [text.partition(", State:")[0] for text in prompts(samples)]


def _tokenizer(assets: policy_assets.Assets) -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer(assets.tokenizer, assets.model.max_token_len)
