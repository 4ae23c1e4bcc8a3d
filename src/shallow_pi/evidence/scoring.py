"""Scores of a teacher's layers over the denoising steps, for untrained cuts and plots.

`similarity` is the mean cosine between input and output of a layer, `sensitivity` the rise of the
velocity error when it alone is skipped (`layer_scores`), both on the straight lines from noise to
the teacher's plans at held-out observations. The backbone sees neither noise nor time, so the
action expert's similarity, which alone changes on the way, is kept apart as well.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from shallow_pi import atomic, progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.distill import layer_scores
from shallow_pi.evaluation import policies
from shallow_pi.evidence import running, sources
from shallow_pi.evidence.claims import cells, recipes
from shallow_pi.models import pi0
from shallow_pi.sims import tabletop


def ensure(slugs: Sequence[str], runs: pathlib.Path, results: pathlib.Path) -> None:
    """Measure the layers that cuts among these policies are chosen by, unless that was done.

    The scores lie beside the policy's parameters, and a copy among the results. Scores that were
    there, by which students were cut, are kept.
    """
    for base in dict.fromkeys(slug.partition("--")[0] for slug in slugs if "-drop" in slug):
        path = runs / base / recipes.SCORES_FILE
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not {"similarity_by_step", "sensitivity_by_step"} <= set(found):
            found = measure(base, runs) | found
            run_folder.write_text(path, json.dumps(found) + "\n", run_folder.AGAIN)
        results.mkdir(parents=True, exist_ok=True)
        atomic.write(results / recipes.SCORES_FILE, path.read_bytes())


def measure(slug: str, runs: pathlib.Path, observations: int = 32) -> dict[str, object]:
    """Both scores of each layer, their means and, by `NAME_by_step`, at each integration step."""
    policy = running.policy(slug, runs, cells.NUM_STEPS)
    seeds = tuple(range(cells.OBSERVATION_SEED, cells.OBSERVATION_SEED + observations))
    held = running.held_out(tuple(tabletop.LAYOUTS), seeds)
    noise = policies.noise(np.array([[seed, 0] for seed in seeds]), *policy.noise_shape)
    batch = policy.prepare([one.observation for one in held])
    actions = np.asarray(policy.sample(batch, noise))
    model, (_, params) = policy.assets.model, sources.read(slug, runs)
    observation = jax.device_put(batch.as_float())
    measures = {
        "similarity": jax.jit(layer_scores.similarity, static_argnums=0),
        "sensitivity": jax.jit(layer_scores.sensitivity, static_argnums=0),
        "expert_similarity": jax.jit(_expert, static_argnums=0),
    }
    found: dict[str, list[list[float]]] = {name: [] for name in measures}
    with progress.bar("Layer scores", total=cells.NUM_STEPS) as advance:
        for step in range(cells.NUM_STEPS):
            t = np.full(len(seeds), 1 - step / cells.NUM_STEPS, np.float32)
            x_t = t[:, None, None] * noise + (1 - t[:, None, None]) * actions
            for name, score in measures.items():
                values = score(model, params, observation, x_t, t)
                found[name].append([round(float(v), 6) for v in values])
            advance(1)
    means = {name: np.mean(rows, axis=0).round(6).tolist() for name, rows in found.items()}
    return {"policy": slug, **means, **{f"{name}_by_step": rows for name, rows in found.items()}}


def _expert(config: pi0.Pi0Config, *given: Any) -> Array:
    return layer_scores.cosines(config, *given).expert
