"""Bounds of activations of policies that cells run in 8 bits (`SLUG--int8`, see `sources`)."""

import json
import pathlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from shallow_pi import progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.evidence import frames, sources, training
from shallow_pi.evidence.claims import cells
from shallow_pi.inference import calibration, quantize
from shallow_pi.models import observation as observations
from shallow_pi.sims import tabletop

# Demonstrations, frames spread over them, and frames in one batch.
EPISODES, SAMPLES, BATCH = 8, 64, 16
# Of demonstrations that students are trained on.
SEED = training.SEEDS["student"]


def ensure(slugs: Sequence[str], runs: pathlib.Path) -> None:
    """Calibrate the policies among these that round activations, unless that was done.

    The bounds are those of ten integration steps, whose times include those of fewer. They lie
    beside the policy's assets, where `scripts/calibrate.py` writes them.
    """
    rounding = [slug for slug in slugs if quantize.rounds_activations(sources.scheme(slug))]
    for base in dict.fromkeys(slug.partition("--")[0] for slug in rounding):
        folder = runs / base
        if not sources.exists(base, runs):
            continue
        assets, params = sources.read(base, runs)
        if calibration.load(folder / run_folder.ASSETS, assets.model) is not None:
            continue
        progress.say(f"Calibrating {base}")
        episodes = frames.collect(tabletop.Suite(tasks=_tasks(folder)), EPISODES, SEED, 1)
        seen = frames.samples(assets, episodes).samples.observation
        rows = np.linspace(0, len(seen.state) - 1, SAMPLES).astype(int)
        shape = BATCH, assets.model.action_horizon, assets.model.action_dim
        found = calibration.calibrate(
            assets.model,
            jax.tree.map(jnp.asarray, params),
            _batches(seen, rows, shape),
            num_steps=cells.NUM_STEPS,
        )
        calibration.save(folder / run_folder.ASSETS, found)


def _tasks(folder: pathlib.Path) -> tuple[str, ...]:
    """The tasks that a policy was trained on; of one without a recipe, all."""
    path = folder / training.RECIPE_FILE
    kept = json.loads(path.read_text(encoding="utf-8"))["recipe"] if path.is_file() else {}
    return tuple(kept.get("tasks") or tabletop.LAYOUTS)


def _batches(
    seen: observations.Observation, rows: np.ndarray, shape: tuple[int, ...]
) -> Iterator[tuple[observations.Observation, np.ndarray]]:
    noise = np.random.default_rng(0)
    for chosen in np.split(rows, len(rows) // BATCH):
        batch = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], seen)
        yield batch.as_float(), noise.standard_normal(shape).astype(np.float32)
