"""Check an export that `Policy.from_checkpoint` reads: its parameters, statistics and actions."""

import dataclasses
import pathlib

import jax
import numpy as np

from shallow_pi.checkpoints import weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.deploy import policy as policies
from shallow_pi.deploy.export import student as students
from shallow_pi.models import batch as batches
from shallow_pi.models import layer_table, pi0
from shallow_pi.models import observation as observations

# Largest allowed difference of a normalized action; it is 0 where the same program runs.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


def verify(folder: pathlib.Path, exported: students.Student, student: students.Student) -> str:
    """Read the folder as a policy, and describe how its actions differ from the student's."""
    expected, model = pi0.abstract_params(exported.model), student.model
    written = weights.leaves(exported.params)
    # openpi and LeRobot compute every layer whole, and the policy below leaves out what is cut.
    cut = weights.leaves(layer_table.zero_cut(exported.model.layers, exported.params))
    if left := [path for path, leaf in written.items() if not np.array_equal(leaf, cut[path])]:
        raise ValueError(
            f"{folder} has other numbers than zeros in halves of layers that the student lacks: "
            f"{left}; a defect of the export, please report it; nothing was kept"
        )
    del cut
    read = weights.leaves(weights.load_params(folder, expected, what="export"))
    wrong = [
        path
        for path, leaf in written.items()
        if read[path].dtype != leaf.dtype or not np.array_equal(read[path], leaf)
    ]
    del read
    stats = policy_assets.load(folder).stats
    for key, given in student.assets.stats.items():
        found = dict(stats[key].items())
        for name, values in given.items():
            if name not in found or not np.array_equal(found[name], values):
                wrong.append(f"statistics {key}.{name}")
    if wrong:
        raise ValueError(
            f"{folder} was read back with other numbers than were written: {wrong}. The disk "
            "may be full or failing; nothing was kept"
        )
    dtype = np.dtype(model.dtype) if model.dtype == "float32" else jax.numpy.bfloat16
    cast = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf, dtype), student.params)
    # Samples are compared before the robot's transforms, which may be openpi's own.
    robot = dataclasses.replace(student.assets.robot, elsewhere="")
    own = dataclasses.replace(student.assets, robot=robot)
    ours = policies.Policy(own, cast, quantize="none")
    other = policies.Policy.from_checkpoint(folder, robot=robot, warm_up=False, quantize="none")
    observation, noise = _made_up(model)
    want = np.asarray(ours.sample(observation, noise))
    got = np.asarray(other.sample(observation, noise))
    difference = float(np.max(np.abs(got - want)))
    if not difference <= TOLERANCE[model.dtype]:
        raise ValueError(
            f"the actions of {folder} differ from the student's by {difference:.3g}, more than "
            f"{TOLERANCE[model.dtype]:g}: a defect of the export, please report it; nothing was "
            "kept"
        )
    return (
        "Read back after writing: every parameter equal, bit for bit; on the same observation and "
        f"noise the largest difference of a normalized action from the student's was "
        f"{difference:.1e}."
    )


def _made_up(model: pi0.Pi0Config) -> tuple[observations.Observation, np.ndarray]:
    """An observation with a prompt of half the maximum length, and noise."""
    length, random = model.max_token_len, batches.noise(model, 1)
    half = np.arange(length)[None] < (length + 1) // 2
    observation = dataclasses.replace(random.observation, tokenized_prompt_mask=half)
    return observation, np.asarray(random.actions)
