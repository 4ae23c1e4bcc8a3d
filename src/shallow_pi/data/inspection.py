"""What a batch tells about its data: ranges, prompts, and what a person should look at.

Everything is read off samples as the model gets them, after the robot's conversions, differences
and normalization, so that a fault of any of these shows: another robot's statistics, a unit, a
camera that is covered, a prompt that is cut. `data_sheet` draws the same batch.
"""

import collections
import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float

from shallow_pi import progress
from shallow_pi.data import sources
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import normalize, tokenizer
from shallow_pi.models import batch as batches

# Normalized values beyond it are doubtful: z-scores and quantiles alike lie well inside.
LIMIT = 5.0
# A picture no pixel of which is brighter, of 255, is black.
BLACK = 8
# A share of masked actions above it is told.
PADDING = 0.25


@dataclasses.dataclass(frozen=True)
class Range:
    """What one dimension of the state or of the actions does in a batch."""

    # Such as "state[3]".
    name: str
    # Lowest, mean and highest value before normalization, in the model's units; None if unknown.
    before: tuple[float, float, float] | None
    # The same after normalization.
    after: tuple[float, float, float]
    # Share of the values beyond ±LIMIT after normalization.
    beyond: float
    # How many values there are.
    count: int

    @property
    def is_constant(self) -> bool:
        """Whether all values are the same."""
        return self.count > 1 and self.after[0] == self.after[2]


def draw(
    source: sources.Source, count: int, seed: int = 0, advance: progress.Advance | None = None
) -> batches.Batch:
    """Samples chosen at random, none twice, stacked as the loader does; all if there are fewer.

    Args:
      source: of samples.
      count: how many.
      seed: of the choice.
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
    return batches.stack(samples)


def values(
    batch: batches.Batch, assets: policy_assets.Assets | None
) -> dict[str, Float[np.ndarray, "n d"]]:
    """Normalized values of `state` and `actions`: padded dimensions and masked actions left out."""
    state, actions = batch.observation.state, batch.actions[batch.action_mask]
    if assets is not None:
        state = state[:, : assets.robot.state_dim]
        actions = actions[:, : assets.robot.action_dim]
    return {"state": state, "actions": actions}


def ranges(batch: batches.Batch, assets: policy_assets.Assets | None) -> list[Range]:
    """A `Range` for every dimension of state and actions; without assets only after normalization.

    Args:
      batch: of the loader, as numpy arrays.
      assets: of the policy; None for synthetic samples.
    """
    found = []
    for key, after in values(batch, assets).items():
        before = None
        if assets is not None and key in assets.stats:
            before = normalize.unnormalize(after, assets.stats[key], assets.kind)
        for dim, column in enumerate(after.T):
            raw = None if before is None else _extent(before[:, dim])
            beyond = float(np.mean(~(np.abs(column) <= LIMIT)))  # NaN counts as beyond.
            found.append(Range(f"{key}[{dim}]", raw, _extent(column), beyond, len(column)))
    return found


def _extent(column: Float[np.ndarray, " n"]) -> tuple[float, float, float]:
    return float(column.min()), float(column.mean()), float(column.max())


def rows(found: list[Range]) -> list[tuple[str, ...]]:
    """The ranges as a table's cells, two header rows first."""
    head = [
        ("", *("", "before", "", "", "normalized", ""), "beyond"),
        ("", *("low", "mean", "high") * 2, f"±{LIMIT:g}"),
    ]
    unknown = (math.nan,) * 3
    body = [
        (
            own.name,
            *("" if math.isnan(x) else f"{x:#.4g}" for x in own.before or unknown),
            *(f"{x:.2f}" for x in own.after),
            f"{100 * own.beyond:.1f} %" if own.beyond else "",
        )
        for own in found
    ]
    return [*head, *body]


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


def prompts(batch: batches.Batch, assets: policy_assets.Assets | None) -> list[str]:
    """The prompt of every sample, decoded from its tokens; without a tokenizer the tokens."""
    pairs = zip(
        batch.observation.tokenized_prompt, batch.observation.tokenized_prompt_mask, strict=True
    )
    tokens = [row[mask] for row, mask in pairs]
    if assets is None:
        return ["tokens " + " ".join(map(str, row)) for row in tokens]
    words = _tokenizer(assets)
    return [words.decode(row).strip() for row in tokens]


def truncated(batch: batches.Batch, assets: policy_assets.Assets | None) -> Bool[np.ndarray, " b"]:
    """Which prompts were cut: they fill their budget and lack the end that every prompt has."""
    full = batch.observation.tokenized_prompt_mask.all(axis=1)
    if assets is None:
        return np.zeros_like(full)
    empty = np.zeros(0, np.float32) if assets.model.discrete_state_input else None
    end = _tokenizer(assets).encode("", empty)[-1]
    return full & (batch.observation.tokenized_prompt[:, -1] != end)


def facts(batch: batches.Batch, assets: policy_assets.Assets | None) -> list[str]:
    """Lines about the batch as a whole: instructions, lengths, and what is padding."""
    budget = batch.observation.tokenized_prompt_mask.shape[1]
    used = batch.observation.tokenized_prompt_mask.sum(axis=1)
    _, horizon, width = batch.actions.shape
    found = values(batch, assets)
    state, actions = (found[key].shape[1] for key in ("state", "actions"))
    absent = [name for name, mask in batch.observation.image_masks.items() if not mask.any()]
    lines = [
        f"{len(used)} samples, {len(set(_instructions(batch, assets)))} different instructions",
        f"prompts take {used.min()} to {used.max()} of {budget} tokens",
        f"{_padding(batch):.0%} of the actions lie beyond an episode's end (masked), in chunks of "
        f"{horizon}",
        f"state has {state} and actions {actions} of the model's {width} dimensions; the rest is 0",
    ]
    return lines + [f"camera {name} is absent: black and masked" for name in absent]


def doubtful(
    batch: batches.Batch, assets: policy_assets.Assets | None, found: list[Range]
) -> list[str]:
    """A line for everything in a batch that a person should look at before training on it.

    Args:
      batch: of the loader, as numpy arrays.
      assets: of the policy; None for synthetic samples.
      found: its `ranges`.
    """
    lines = []
    for own in found:
        if own.is_constant:
            lines.append(f"{own.name} is constant ({own.after[0]:.3g} after normalization)")
        if own.beyond:
            far = max(own.after[0], own.after[2], key=abs)
            lines.append(
                f"{own.name} reaches {far:.3g} after normalization ({own.beyond:.1%} of its values "
                f"beyond ±{LIMIT:g}): are the statistics of this robot, in these units?"
            )
    for name, pictures in batch.observation.images.items():
        there = batch.observation.image_masks[name]
        black = there & (pictures.max(axis=(1, 2, 3)) < BLACK)
        if black.any():
            lines.append(f"{black.sum()} of {there.sum()} pictures of {name} are black")
    cut = truncated(batch, assets)
    if cut.any():
        budget = batch.observation.tokenized_prompt.shape[1]
        lines.append(
            f"{cut.sum()} of {len(cut)} prompts are longer than {budget} tokens and are cut: raise "
            "--model.max-token-len if the teacher was trained so, or shorten them"
        )
    (first, number), *_ = collections.Counter(_instructions(batch, assets)).most_common(1)
    is_meant = assets is not None and bool(assets.robot.prompt)
    if number == len(cut) > 1 and not is_meant:
        lines.append(f"all {number} prompts are equal: {first!r}")
    if (share := _padding(batch)) > PADDING:
        lines.append(
            f"{share:.0%} of the actions are padding beyond an episode's end: episodes are short "
            f"for chunks of {batch.actions.shape[1]}"
        )
    return lines


def _instructions(batch: batches.Batch, assets: policy_assets.Assets | None) -> list[str]:
    """The prompts without the state that π0.5 may have in them."""
    return [text.partition(", State:")[0] for text in prompts(batch, assets)]


def _padding(batch: batches.Batch) -> float:
    return float(1 - batch.action_mask.mean())


def _tokenizer(assets: policy_assets.Assets) -> tokenizer.Tokenizer:
    return tokenizer.Tokenizer(assets.tokenizer, assets.model.max_token_len)
