"""Every study in miniature: the whole way from cells to the page, with tiny untrained policies."""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import PyTree

from shallow_pi.checkpoints import run_folder, weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import normalize, tokenizer
from shallow_pi.data.robots import robot as robots
from shallow_pi.evidence import calibrating, factorial, frames, page, rival_runs, running, scoring
from shallow_pi.evidence.claims import cells, late_claims, recipes, rows
from shallow_pi.evidence.claims.claim import Claim
from shallow_pi.models import batch as batches
from shallow_pi.models import gemma, pi0, siglip
from shallow_pi.sims import tabletop, turntable

LAYER = gemma.GemmaConfig(width=8, mlp_dim=8, num_heads=2, num_kv_heads=1, head_dim=8)
MODEL = pi0.Pi0Config(
    depth=18,
    backbone=LAYER,
    expert=LAYER,
    image=siglip.SiglipConfig(width=8, depth=1, mlp_dim=8, num_heads=1, patch_size=24),
    image_size=48,
    vocab_size=448,
    cameras=("base_0_rgb", "left_wrist_0_rgb"),
    action_dim=4,
    action_horizon=20,
    max_token_len=16,
    dtype="float32",
)
EPISODES, SECONDS = 2, 1.2


def run(chosen: Sequence[Claim], workers: int, folder: pathlib.Path) -> list[pathlib.Path]:
    """Measure a few cells of every claim: each kind of column once; write the page."""
    wanted = list(dict.fromkeys(cell for claim in chosen for cell in _some(claim)))
    runs, results = folder / "runs", folder / "results"
    make_policies([cell.policy for cell in wanted], runs)
    rivals = [cell.policy for cell in wanted if rival_runs.is_rival(cell.policy)]
    made_up = batches.noise(MODEL, rival_runs.BATCH_SIZE, 0)
    ends = np.array([0, rival_runs.BATCH_SIZE])
    rival_runs.make(rivals, runs, frames.Frames(made_up, ends))
    scoring.ensure([cell.policy for cell in wanted], runs, results)
    calibrating.ensure([cell.policy for cell in wanted], runs)
    factorial.ensure(chosen, runs, results)
    todo = running.jobs(wanted, cells.read(results), rows.teacher_of, EPISODES)
    todo = [dataclasses.replace(job, max_seconds=SECONDS) for job in todo]
    running.run(todo, runs, results / "cells.jsonl", workers)
    return page.write(folder / "evidence.md", results, EPISODES)


def _some(claim: Claim) -> list[cells.Cell]:
    """Each kind of column in its last cell, of a small student mostly, and the first two rows once.

    Columns that differ in tasks, lateness or integration steps alone are of one kind.
    """
    every, found = claim.cells(), dict[object, cells.Cell]()
    for cell in reversed(every):
        at = cell.situation
        found.setdefault((cell.kind, at.sim, at.start, at.late > 0, at.executor), cell)
    for row in claim.variants[:2]:
        found[row.label] = next(cell for cell in every if cell.policy == row.policies[0])
    return list(found.values())


def make_policies(slugs: Sequence[str], runs: pathlib.Path) -> None:
    """Write an 18-layer teacher and a 2-layer student with random parameters under these names."""
    runs.mkdir(parents=True)
    suite = tabletop.Suite()
    tokens = runs / "tokenizer.model"
    tokenizer.train(suite.prompts(), tokens, vocab_size=MODEL.vocab_size)
    bases = [slug.partition("--")[0] for slug in slugs]
    for base in dict.fromkeys([rows.TEACHER, *map(rows.teacher_of, bases), *bases]):
        if base == recipes.EXPERT:
            continue
        whole = base in (rows.TEACHER, recipes.METAWORLD_TEACHER.slug)
        model = MODEL if whole else _small(base)
        robot = turntable.Suite().robot if base in late_claims.TURNTABLE else suite.robot
        if base in rows.RECIPES and rows.RECIPES[base].suite == "metaworld_mt10":
            robot = robots.METAWORLD
        spread = {
            name: normalize.NormStats(
                mean=np.zeros(size), std=np.full(size, 0.1), q01=-np.ones(size), q99=np.ones(size)
            )
            for name, size in (("state", robot.state_dim), ("actions", robot.action_dim))
        }
        weights.save_params(runs / base / run_folder.PARAMS, _random(model))
        policy_assets.Assets(model, robot, tokens, spread, robot.name).save(
            runs / base / run_folder.ASSETS
        )


def _small(slug: str) -> pi0.Pi0Config:
    """Two layers, of the kind and the widths of the policy's teacher."""
    teacher = rows.RECIPES.get(rows.teacher_of(slug), recipes.TEACHER)
    return recipes.teacher_model(dataclasses.replace(teacher, depth=2), MODEL)


def _random(model: pi0.Pi0Config) -> PyTree:
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(scale=0.3, size=leaf.shape).astype(np.float32),
        pi0.abstract_params(model),
    )
