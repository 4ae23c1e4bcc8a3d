"""Rivals of a student among the policies of studies: `TEACHER--efficientvla:layers=9,cache=2`.

`make` measures or trains a rival on demonstrations and keeps what it found in `RUNS/<slug>-<digest
of the teacher's parameters>`; the evaluation then needs the teacher's folder and that one. Of a
teacher that was trained again there is no rival until it is made. A rival has one training seed, a
student's demonstrations, and the data of every batch drawn without replacement.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from shallow_pi import progress
from shallow_pi.checkpoints import run_folder, weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.deploy import policy as deployed
from shallow_pi.deploy import step_folder
from shallow_pi.evaluation.rivals import rival, table
from shallow_pi.evidence import frames, training
from shallow_pi.evidence.claims import recipes
from shallow_pi.models import batch as batches
from shallow_pi.sims import demonstrations, simulator

# Written last: a folder with it is whole.
MADE_FILE = "rival.txt"
BATCH_SIZE = 64
# Demonstrations from which a rival that is not trained is measured; the others get a student's.
MEASURED = 40


def is_rival(slug: str) -> bool:
    """The slug names a rival of a teacher."""
    return slug.partition("--")[2].partition(":")[0] in table.RIVALS


def exists(slug: str, runs: pathlib.Path) -> bool:
    """The rival was made of the teacher that is there."""
    return _has_teacher(slug, runs) and (_folder(slug, runs) / MADE_FILE).is_file()


def make(slugs: Sequence[str], runs: pathlib.Path, data: frames.Frames) -> None:
    """Make the rivals that are not there; their teachers have to be.

    Args:
      slugs: of rivals.
      runs: folder of step folders.
      data: demonstrations, with the teacher's statistics.

    Raises:
      ValueError: fewer frames than a batch.
    """
    if data.ends[-1] < BATCH_SIZE:
        raise ValueError(
            f"rivals are made of at least {BATCH_SIZE} frames, got {data.ends[-1]}: record more "
            "demonstrations"
        )
    for slug in slugs:
        if not exists(slug, runs):
            progress.say(f"Making {slug}")
            _policy(slug, _material(slug, runs, data), runs)
            folder = _folder(slug, runs)
            folder.mkdir(parents=True, exist_ok=True)
            run_folder.write_text(folder / MADE_FILE, f"{slug}\n", run_folder.AGAIN)


def ensure(slugs: Sequence[str], runs: pathlib.Path, train: bool) -> None:
    """Make the rivals whose teacher is there, from demonstrations recorded for it.

    Args:
      slugs: of policies; others than rivals are ignored.
      runs: folder of step folders.
      train: also make those that need training, which takes as long as a student of all layers.
    """
    wanted = [slug for slug in dict.fromkeys(slugs) if is_rival(slug) and _has_teacher(slug, runs)]
    wanted = [slug for slug in wanted if not exists(slug, runs)]
    together = dict[tuple[str, int], list[str]]()
    for slug in wanted:
        is_trained = hasattr(_options(slug), "steps")
        count = recipes.STUDENT.demonstrations if is_trained else MEASURED
        if train or not is_trained:
            together.setdefault((slug.partition("--")[0], count), []).append(slug)
    for (base, count), slugs in together.items():
        assets = policy_assets.load(runs / base)
        suite = simulator.find(assets.robot.name, {})
        seen = frames.collect(suite, count, training.SEEDS["student"], demonstrations.cpus())
        make(slugs, runs, frames.samples(assets, seen))


def load(slug: str, runs: pathlib.Path, num_steps: int) -> deployed.Policy:
    """A rival that was made, sampling in `num_steps`.

    Raises:
      FileNotFoundError: it was not, or of another teacher.
    """
    if not exists(slug, runs):
        raise FileNotFoundError(
            f"no rival {slug} of the teacher that is in {runs}: make it, or give --runs"
        )
    found = _material(slug, runs, None)
    assets = dataclasses.replace(found.assets, num_steps=num_steps)
    return _policy(slug, dataclasses.replace(found, assets=assets), runs)


def digest(slug: str, runs: pathlib.Path) -> str:
    """A short hash of everything that was measured or trained for a rival."""
    found, folder = hashlib.sha256(slug.encode()), _folder(slug, runs)
    for path in sorted(folder.glob("*.json")):
        found.update(path.read_bytes())
    if (folder / run_folder.PARAMS).is_dir():
        stored = weights.load_params(folder, weights.stored_params(folder), what="rival")
        for leaf in jax.tree.leaves(stored):
            found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()[:10]


def _teacher(slug: str, runs: pathlib.Path) -> pathlib.Path:
    return runs / slug.partition("--")[0]


def _has_teacher(slug: str, runs: pathlib.Path) -> bool:
    return (_teacher(slug, runs) / run_folder.PARAMS).is_dir()


def _folder(slug: str, runs: pathlib.Path) -> pathlib.Path:
    name = slug.translate(str.maketrans(":,=", "---"))
    return runs / f"{name}-{weights.digest(_teacher(slug, runs))}"


def _policy(slug: str, material: rival.Material, runs: pathlib.Path) -> deployed.Policy:
    return _options(slug).make(material, _folder(slug, runs))


def _options(slug: str) -> rival.Rival:
    return table.find(slug.partition("--")[2])


def _material(slug: str, runs: pathlib.Path, data: frames.Frames | None) -> rival.Material:
    folder = _teacher(slug, runs)
    assets = policy_assets.load(folder)
    params = step_folder.params(folder, assets.model)

    def feed() -> Iterator[batches.Batch]:
        assert data is not None, "what a rival needs of the data is kept when it is made"
        rng, total = np.random.default_rng(0), int(data.ends[-1])
        while True:
            order = rng.permutation(total)
            for start in range(0, total - BATCH_SIZE + 1, BATCH_SIZE):
                rows = order[start : start + BATCH_SIZE]
                yield jax.tree.map(lambda leaf, rows=rows: leaf[rows], data.samples)

    return rival.Material(assets, params, feed)
