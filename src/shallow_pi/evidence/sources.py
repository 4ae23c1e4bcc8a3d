"""The policies of cells by their slugs.

| slug | policy |
|---|---|
| `expert` | the suite's scripted expert |
| a recipe's slug | the step folder of that name among the runs |
| `SLUG--keep-0.3.7` | layers 0, 3 and 7 of that policy, without training |
| `SLUG--similarity-drop3` | the policy without the 3 layers that `layer_scores` of that name rank |
|                          | last, without training; also `sensitivity` |
| `SLUG--w8`               | its products in 8 bits (`inference.quantize`): weights alone, or with |
|                          | `int8` activations too (see `calibrating`) |
| `SLUG--efficientvla:...` | a rival of that policy (see `rival_runs`) |
"""

import dataclasses
import hashlib
import json
import pathlib
import re

import jax
import numpy as np
from jaxtyping import PyTree

from shallow_pi.checkpoints import run_folder
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.deploy import policy as deployed
from shallow_pi.deploy import step_folder
from shallow_pi.distill import layer_map, student
from shallow_pi.evidence import rival_runs
from shallow_pi.evidence.claims import recipes
from shallow_pi.inference import calibration, quantize

CUT = re.compile(r"(keep)-([0-9.]+)|(similarity|sensitivity)-drop([0-9]+)")


def exists(slug: str, runs: pathlib.Path) -> bool:
    """The policy can be loaded."""
    if rival_runs.is_rival(slug) and not rival_runs.exists(slug, runs):
        return False
    return slug == recipes.EXPERT or (runs / slug.partition("--")[0] / run_folder.PARAMS).is_dir()


def load(slug: str, runs: pathlib.Path, num_steps: int) -> deployed.Policy:
    """A policy that samples in `num_steps`.

    Raises:
      ValueError, FileNotFoundError: no such policy, or one that is not complete.
    """
    if rival_runs.is_rival(slug):
        return rival_runs.load(slug, runs, num_steps)
    assets, params = read(slug, runs)
    rounding, folder = scheme(slug), runs / slug.partition("--")[0]
    bounds = None
    if quantize.rounds_activations(rounding):
        bounds = calibration.load(folder / run_folder.ASSETS, assets.model)
    # A cell asks for these steps on purpose: no warning that it was trained, or calibrated, for
    # others.
    assets = dataclasses.replace(assets, num_steps=num_steps)
    if bounds is not None:
        bounds = dataclasses.replace(bounds, num_steps=num_steps)
    return deployed.Policy(assets, params, quantize=rounding, calibration=bounds)


def digest(slug: str, runs: pathlib.Path) -> str:
    """A short hash of the policy's parameters; "" for the expert."""
    if slug == recipes.EXPERT:
        return ""
    found = hashlib.sha256(slug.partition("--")[2].encode())
    if rival_runs.is_rival(slug):
        found.update(rival_runs.digest(slug, runs).encode())
    _, params = read(slug.partition("--")[0], runs)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()[:10]


def read(slug: str, runs: pathlib.Path) -> tuple[policy_assets.Assets, PyTree]:
    """A policy's assets and parameters."""
    base, _, way = slug.partition("--")
    folder = runs / base
    if not (folder / run_folder.PARAMS).is_dir():
        raise FileNotFoundError(f"no policy {base} in {runs}: train it, or give --runs")
    assets = policy_assets.load(folder)
    params = step_folder.params(folder, assets.model)
    if not way or scheme(slug) != "none":
        return assets, params
    kept = _kept(slug, assets.model.depth, folder)
    cut = student.cut(assets.model, params, kept)
    model = student.model(assets.model, kept)
    whole = dataclasses.replace(assets, model=model)
    return whole, jax.tree.map(np.asarray, cut)


def scheme(slug: str) -> quantize.Scheme:
    """The 8-bit scheme that a slug names, or none."""
    way = slug.partition("--")[2]
    return next((one for one in quantize.SCHEMES if one == way), "none")


def _kept(slug: str, depth: int, folder: pathlib.Path) -> layer_map.LayerMap:
    found = CUT.fullmatch(slug.partition("--")[2])
    if found is None:
        raise ValueError(
            f"policy {slug!r}: expected SLUG--keep-0.3.7, SLUG--similarity-drop3 or SLUG--w8"
        )
    if found[1]:
        return layer_map.explicit([int(layer) for layer in found[2].split(".")], depth)
    path = folder / recipes.SCORES_FILE
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: run scripts/reproduce.py skipping")
    score = np.array(json.loads(path.read_text(encoding="utf-8"))[found[3]])
    strategy: layer_map.Measured = "similarity" if found[3] == "similarity" else "sensitivity"
    return layer_map.measured(strategy, depth - int(found[4]), score)
