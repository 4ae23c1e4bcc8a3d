"""Demonstrations as one batch of all their frames, small enough to stay on the device.

All frames of 6,000 episodes of the tabletop (48 pixels wide) take 2 GB, as do those of 1,000
episodes of Meta-World (64 wide). There is no loader and no dataset on disk. `collect` records
the expert, `samples` gives what the model sees, equal to what the robot's transforms make of each
frame (`assets.Assets.inputs`).
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int

from shallow_pi import progress
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import pipelines, statistics, transforms
from shallow_pi.data.robots import tokenizer as prompts
from shallow_pi.models import batch as batches
from shallow_pi.models import pi0
from shallow_pi.sims import demonstrations, simulator


@dataclasses.dataclass(frozen=True)
class Frames:
    """Every frame of some episodes, in order."""

    samples: batches.Batch
    # Frames of the first n episodes, for every n from 0.
    ends: Int[np.ndarray, " e+1"]


def collect(
    suite: simulator.Suite, episodes: int, seed: int, workers: int, noise: float = 1.0
) -> list[demonstrations.Episode]:
    """The expert's episodes, the same for the same seed; more of them begin with the fewer."""
    found = []
    with progress.bar("Demonstrations", total=episodes) as advance:
        for episode in demonstrations.collect(suite, episodes, seed, noise, workers):
            found.append(episode)
            advance(1)
    return found


def make_assets(
    suite: simulator.Suite,
    model: pi0.Pi0Config,
    episodes: Sequence[demonstrations.Episode],
    tokenizer: pathlib.Path,
) -> policy_assets.Assets:
    """The assets of a teacher: statistics of these episodes, and a tokenizer made if absent."""
    robot = suite.robot
    if not tokenizer.is_file():
        prompts.train(suite.prompts(), tokenizer, vocab_size=model.vocab_size)
    lengths = [len(episode.vectors[robot.action_key]) for episode in episodes]
    stats = statistics.compute(
        np.concatenate([robot.state(episode.vectors) for episode in episodes]),
        np.concatenate([robot.actions(episode.vectors) for episode in episodes]),
        np.repeat(np.cumsum(lengths), lengths),
        robot,
        model.action_horizon,
    )
    names = suite.names()
    named = {
        "state": tuple(name for key in robot.state_keys for name in names[key]),
        "actions": tuple(name for key in robot.action_keys for name in names[key]),
    }
    return policy_assets.Assets(model, robot, tokenizer, stats, robot.name, named)


def samples(assets: policy_assets.Assets, episodes: Sequence[demonstrations.Episode]) -> Frames:
    """The model's samples of all frames, with the statistics and the tokenizer of `assets`.

    Raises:
      ValueError: a model that reads the state as text, whose prompts differ from frame to frame.
    """
    model, robot = assets.model, assets.robot
    if model.discrete_state_input:
        raise ValueError("the studies' models read the state as numbers, not as text")
    lengths = np.array([len(episode.vectors[robot.action_key]) for episode in episodes])
    ends = np.concatenate([[0], np.cumsum(lengths)])
    to_model = transforms.Composed(
        (
            pipelines.ToModel(robot),
            transforms.Normalize(assets.stats, assets.kind),
            transforms.PadDimensions(model.action_dim),
        )
    )
    reader = prompts.Tokenizer(assets.tokenizer, model.max_token_len)
    tokens = {prompt: reader.tokenize(prompt) for prompt in {e.prompt for e in episodes}}
    horizon, found = model.action_horizon, batches.zeros(model, int(ends[-1]))
    images: Mapping[str, np.ndarray] = found.observation.images
    for start, stop, episode in zip(ends[:-1], ends[1:], episodes, strict=True):
        at, length = slice(start, stop), stop - start
        ahead = np.arange(length)[:, None] + np.arange(horizon)
        actions = robot.actions(episode.vectors)[np.minimum(ahead, length - 1)]
        seen = to_model({"state": robot.state(episode.vectors), "actions": actions})
        found.observation.state[at], found.actions[at] = seen["state"], seen["actions"]
        found.action_mask[at] = ahead < length
        found.observation.tokenized_prompt[at] = tokens[episode.prompt][0]
        found.observation.tokenized_prompt_mask[at] = tokens[episode.prompt][1]
        for camera in model.cameras:
            if (key := robot.cameras.get(camera)) is None:
                found.observation.image_masks[camera][at] = False
            else:
                images[camera][at] = episode.images[key]
    return Frames(found, ends)
