"""Make the policies of studies that are not there yet: teachers first, then their students.

Every policy becomes an ordinary step folder `RUNS/<slug>`, which the server and the evaluation load
like any other, with `recipe.json` beside its parameters. Parameters are stored in float16: hundreds
of policies then take little room. A teacher is rounded before anything is learned from it.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from shallow_pi import atomic, progress
from shallow_pi.checkpoints import run_folder, weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.distill import flow, layer_map, layer_scores
from shallow_pi.evidence import frames, many
from shallow_pi.evidence.claims import recipes
from shallow_pi.models import batch as batches
from shallow_pi.models import pi0
from shallow_pi.sims import demonstrations, simulator

RECIPE_FILE = "recipe.json"
# Among the step folders: the states of trainings that are not done.
UNFINISHED = "unfinished"
# Seeds of the expert's episodes: a student sees other scenes than its teacher did.
SEEDS = {"teacher": 0, "student": 1}
# Observations that the layers of a teacher are measured on.
MEASURED = 256


def missing(wanted: Sequence[recipes.Recipe], runs: pathlib.Path) -> list[recipes.Recipe]:
    """The recipes that have no folder yet.

    Raises:
      FileExistsError: the folder of one has no recipe, so that something else is in it.
    """
    found = [recipe for recipe in wanted if not _is_there(runs / recipe.slug)]
    for recipe in found:
        if (folder := runs / recipe.slug).exists():
            raise FileExistsError(
                f"{folder} has no {RECIPE_FILE}, so it was not trained here, and it is never "
                "overwritten: move it away to train that policy, or give another --runs"
            )
    return found


def _is_there(folder: pathlib.Path) -> bool:
    return (folder / RECIPE_FILE).is_file()


def save(
    runs: pathlib.Path,
    recipe: recipes.Recipe,
    params: PyTree,
    assets: policy_assets.Assets,
    metrics: Mapping[str, float],
    scores: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a policy's step folder, which appears whole; one that appeared meanwhile is kept.

    `assets` have the policy's model; `scores`, of a teacher, are those of its layers.
    """
    folder = runs / recipe.slug
    if _is_there(folder):
        progress.say(f"{folder} was trained by another process meanwhile, and is kept")
        return
    own = dataclasses.replace(assets, num_steps=recipe.num_steps)
    with run_folder.writing(folder, run_folder.AGAIN), atomic.folder(folder) as partial:
        weights.save_params(partial / run_folder.PARAMS, params)
        own.save(partial / run_folder.ASSETS)
        if scores is not None:
            text = json.dumps({name: list(map(float, score)) for name, score in scores.items()})
            (partial / recipes.SCORES_FILE).write_text(text + "\n", encoding="utf-8")
        content = {"recipe": dataclasses.asdict(recipe), "metrics": dict(metrics)}
        text = json.dumps(content, indent=2) + "\n"
        (partial / RECIPE_FILE).write_text(text, encoding="utf-8")


def rounded(params: PyTree) -> PyTree:
    """Parameters as they are stored, float16."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)


def teach(
    wanted: Sequence[recipes.Recipe],
    assets: policy_assets.Assets,
    data: frames.Frames,
    runs: pathlib.Path,
) -> None:
    """Train the teachers that are not there, and measure their layers.

    `assets` have the sizes of the tasks' config.
    """
    groups = many.group(missing(wanted, runs))
    trained = many.train(groups, data, assets.model, folder=runs / UNFINISHED)
    for recipe, params, metrics in trained:
        params, model = rounded(params), many.architecture(recipe, assets.model)
        scores = measure_layers(model, params, data)
        own = dataclasses.replace(assets, model=model)
        save(runs, recipe, params, own, metrics, scores)


def measure_layers(
    model: pi0.Pi0Config, params: PyTree, data: frames.Frames
) -> Mapping[str, np.ndarray]:
    """Scores of the layers by every strategy, at observations from all demonstrations.

    There are none where layers have one half: a backbone without one of them is another model.
    """
    if not model.is_even:
        return {}
    rows = np.linspace(0, data.ends[-1] - 1, MEASURED).astype(int)
    batch: batches.Batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), data.samples)
    noise_key, time_key = jax.random.split(jax.random.key(0))
    noise = flow.sample_noise(noise_key, batch.actions.shape)
    t = flow.sample_time(time_key, (MEASURED,))
    x_t, u = flow.interpolate(batch.actions, noise, t), flow.target_velocity(batch.actions, noise)
    inputs = batch.observation.as_float(), x_t, t, u
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    return {
        name: np.asarray(
            jax.jit(functools.partial(layer_scores.measure, name, model))(params, *inputs)
        )
        for name in layer_map.MEASURED
    }


def load_teacher(slug: str, runs: pathlib.Path) -> tuple[policy_assets.Assets, many.Teacher]:
    """A teacher's assets, its parameters in float32, and the scores of its layers.

    Raises:
      FileNotFoundError: it is not there.
    """
    folder = runs / slug
    if not _is_there(folder):
        raise FileNotFoundError(f"no teacher {slug} in {runs}: it has to be trained first")
    assets = policy_assets.load(folder)
    expected = pi0.abstract_params(assets.model)
    params = jax.device_get(weights.load_params(folder, expected, dtype="float32"))
    scores = json.loads((folder / recipes.SCORES_FILE).read_text(encoding="utf-8"))
    found = {name: np.array(score) for name, score in scores.items()}
    return assets, many.Teacher(assets.model, params, found)


def distil(wanted: Sequence[recipes.Recipe], data: frames.Frames, runs: pathlib.Path) -> None:
    """Train the students of one teacher that are not there, the first ones first.

    `data` has the teacher's statistics.
    """
    left = missing(wanted, runs)
    if not left:
        return
    assets, teacher = load_teacher(left[0].teacher, runs)
    trained = many.train(many.group(left), data, teacher.model, teacher, runs / UNFINISHED)
    for recipe, params, metrics in trained:
        own = dataclasses.replace(assets, model=teacher.student(recipe))
        save(runs, recipe, rounded(params), own, metrics)


def ensure(
    wanted: Sequence[recipes.Recipe],
    model: pi0.Pi0Config,
    suite: simulator.Suite,
    runs: pathlib.Path,
    workers: int,
    noise: float = 1.0,
) -> None:
    """Train the policies that are not there yet: teachers, then their students, by teacher.

    `model` has the sizes of the tasks' config, at any depth; `noise` is the scale of the
    perturbations of demonstrations.
    """
    runs.mkdir(parents=True, exist_ok=True)

    def record(left: Sequence[recipes.Recipe]) -> list[demonstrations.Episode]:
        most = max(recipe.demonstrations for recipe in left)
        return frames.collect(suite, most, SEEDS[left[0].role], workers, noise)

    if teachers := missing([recipe for recipe in wanted if recipe.role == "teacher"], runs):
        episodes = record(teachers)
        assets = frames.make_assets(suite, model, episodes, runs / f"{suite.robot.name}.model")
        teach(teachers, assets, frames.samples(assets, episodes), runs)
    students = missing([recipe for recipe in wanted if recipe.role == "student"], runs)
    episodes = record(students) if students else []
    for slug in dict.fromkeys(recipe.teacher for recipe in students):
        own = [recipe for recipe in students if recipe.teacher == slug]
        assets, _ = load_teacher(slug, runs)
        distil(own, frames.samples(assets, episodes), runs)
