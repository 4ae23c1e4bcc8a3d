"""The sampler as one StableHLO program for CPU, CUDA and TPU, which needs only JAX to run.

`policy.stablehlo` is serialized by `jax.export`; `weights.safetensors` is its first argument, a
flat dictionary of arrays. Batch 1, prompts padded to full length, the robot's cameras only.
"""

import pathlib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.flax

from shallow_pi.checkpoints import safetensors_file
from shallow_pi.deploy.export import onnx
from shallow_pi.deploy.export import student as students

DTYPES: tuple[str, ...] = ("bfloat16", "float32")
BUILT_IN: frozenset[str] = frozenset()
PROGRAM, WEIGHTS = "policy.stablehlo", "weights.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")
# Largest allowed difference of a normalized action from the same function called here.
TOLERANCE = 1e-6
_USAGE = """\
One program for {platforms} in {dtype}{bits}, batch 1, {steps} integration steps. It needs JAX
({version} or newer) and safetensors, but not shallow_pi:

    import jax, jax.export, numpy as np
    from safetensors.flax import load_file

    policy = jax.export.deserialize(bytearray(open("{program}", "rb").read()))
    weights = load_file("{weights}")
    inputs = {{
        {inputs}
    }}
    actions = jax.jit(policy.call)(weights, inputs)["actions"]

Actions are normalized; images are bytes, cameras in the order {cameras}; tokenizer and statistics
are in `assets/`.
"""


def check(student: students.Student) -> None:
    """Every student has a program."""


def prepare(student: students.Student) -> students.Student:
    """The student, unchanged."""
    return student


def write(folder: pathlib.Path, student: students.Student) -> None:
    """Write the program and its weights."""
    weights = _weights(student)
    program = jax.export.export(_program(student, weights[1]), platforms=PLATFORMS)(
        *jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (weights[0], _inputs(student))
        )
    )
    (folder / PROGRAM).write_bytes(program.serialize())
    arrays = {name: np.ascontiguousarray(leaf) for name, leaf in weights[0].items()}
    safetensors_file.save(arrays, folder / WEIGHTS, {"format": "flax"})


def usage(folder: str, student: students.Student) -> str:
    """Ten lines of Python that run it."""
    model = student.assets.seen
    lines = [
        f'"{name}": np.zeros({spec.shape}, "{np.dtype(spec.dtype).name}"),'
        for name, spec in _inputs(student).items()
    ]
    return _USAGE.format(
        bits="" if student.quantize == "none" else f" with products in 8 bits ({student.quantize})",
        cameras=", ".join(model.cameras),
        dtype=model.dtype,
        inputs="\n        ".join(lines),
        platforms=", ".join(PLATFORMS),
        program=PROGRAM,
        steps=student.num_steps,
        version=jax.__version__,
        weights=WEIGHTS,
    )


def verify(folder: pathlib.Path, exported: students.Student, student: students.Student) -> str:
    """Read the program back and compare it on this machine with the exported function."""
    read = safetensors.flax.load_file(folder / WEIGHTS)
    weights, tree = _weights(student)
    wrong = [n for n, leaf in weights.items() if not np.array_equal(read[n], np.asarray(leaf))]
    if wrong:
        raise ValueError(
            f"{folder / WEIGHTS} was read back with other numbers than were written: {wrong}. The "
            "disk may be full or failing; nothing was kept"
        )
    inputs = onnx.made_up(student.assets.seen)
    program = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
    got = np.asarray(jax.jit(program.call)(read, inputs)["actions"])
    want = np.asarray(_program(student, tree)(weights, inputs)["actions"])
    difference = float(np.max(np.abs(got - want)))
    if not difference <= TOLERANCE:
        raise ValueError(
            f"the actions of {folder} differ from the sampler's by {difference:.3g}, more than "
            f"{TOLERANCE:g}: a defect of the export, please report it; nothing was kept"
        )
    return (
        "Read back after writing: every weight equal, bit for bit; on the same observation and "
        f"noise the program and the sampler differed by at most {difference:.1e} in a normalized "
        f"action (on {jax.default_backend()})."
    )


def _inputs(student: students.Student) -> dict[str, jax.ShapeDtypeStruct]:
    return onnx.policy_part(student.assets.seen, student.num_steps)[1]


def _weights(student: students.Student) -> tuple[dict[str, jax.Array], jax.tree_util.PyTreeDef]:
    """The prepared weights by name, and their tree."""
    leaves, tree = jax.tree.flatten(onnx.prepared_weights(student.assets.seen, student))
    return {f"w{i:04}": leaf for i, leaf in enumerate(leaves)}, tree


def _program(student: students.Student, tree: jax.tree_util.PyTreeDef) -> jax.stages.Wrapped:
    function, inputs, _ = onnx.policy_part(student.assets.seen, student.num_steps)

    def run(weights: dict[str, jax.Array], given: dict[str, jax.Array]) -> dict[str, jax.Array]:
        leaves = [jnp.asarray(weights[name]) for name in sorted(weights)]
        prepared = jax.tree.unflatten(tree, leaves)
        return {"actions": function(prepared, *(given[name] for name in inputs))[0]}

    return jax.jit(run)
