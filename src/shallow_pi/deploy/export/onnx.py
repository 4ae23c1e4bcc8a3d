"""ONNX graphs of the sampler, for TensorRT and ONNX Runtime: a robot's computer without JAX.

`policy.onnx` is the whole sampler with its steps unrolled; `prefix.onnx` (images and prompt to
keys and values) and `step.onnx` (noisy actions, time, keys and values to the velocity) are its
parts, for a custom loop. Shapes are fixed, batch 1: there are graphs for several prompt lengths
(`policy_16.onnx`), and all graphs share `weights.bin`. Cameras that the robot lacks would be masked
everywhere, so the graphs omit them.
"""

import contextlib
import dataclasses
import gc
import importlib.util
import json
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from shallow_pi import progress
from shallow_pi.deploy import warm_up
from shallow_pi.deploy.export import onnx_graph, tensorrt_operators
from shallow_pi.deploy.export import student as students
from shallow_pi.inference import forward, quantize, sampler, tuning
from shallow_pi.inference import prepare as preparation
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0

DTYPES: tuple[str, ...] = ("float16", "float32", "bfloat16")
BUILT_IN: frozenset[str] = frozenset()
DESCRIPTION, WEIGHTS = "onnx.json", "weights.bin"
# On NVIDIA's GPUs JAX rounds the factors of products in float32 to TF32, unless it is told not to.
_FLOAT32_PRODUCTS = "highest"
# Largest allowed difference of a normalized action from the sampler's in float32. In 16 bits it is
# a share of the largest action, if that is above 1: far more than rounding does, and less than
# another function would.
TOLERANCE = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 2e-1}
_USAGE = """\
ONNX graphs in {dtype}{bits}, opset {opset}, batch 1, {steps} integration steps. `onnx.json` names
the graphs for prompts of up to {lengths} tokens; all of them share `weights.bin`.

| graph | inputs | outputs |
|---|---|---|
| `policy.onnx` | {inputs}, `noise` | `actions`, normalized |
| `prefix.onnx` | {inputs} | `keys_i` and `values_i` of layers {read}, `valid` |
| `step.onnx` | `x`, `t`, `keys_i`, `values_i`, `valid` | `velocity` |

`images` are bytes (1, {count}, {size}, {size}, 3), cameras in the order {cameras}. With NVIDIA's
TensorRT 10, on the target computer:

    trtexec --onnx=policy.onnx --stronglyTyped --saveEngine=policy.engine
"""
_RUNNER = """
With ONNX Runtime on CPU, CUDA or TensorRT, without JAX (`examples/onnx_runtime` in the repository
of shallow_pi; works with any openpi client):

    python runner.py /path/to/{folder} --port 8000
"""


def check(student: students.Student) -> None:
    """Raise for an operator set that cannot hold the graphs, or a package that is missing."""
    opset, dtype = student.opset, student.model.dtype
    if opset not in onnx_graph.OPSETS:
        raise ValueError(
            f"--opset {opset}: graphs are written for {onnx_graph.OPSETS[0]} to "
            f"{onnx_graph.OPSETS[-1]}, the newest that TensorRT 10 reads"
        )
    if student.quantize != "none" and dtype != "float32" and opset < 19:
        raise ValueError(
            f"products in 8 bits take activations in {dtype} from ONNX's opset 19 on: give "
            f"--opset 19, or --dtype float32, got --opset {opset}"
        )
    for package in ("onnx", "onnxruntime"):  # It writes the graphs, and runs them to compare.
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"--format onnx needs the package {package}: uv sync --extra onnx")


def prepare(student: students.Student) -> students.Student:
    """The student, unchanged."""
    return student


@jax.default_matmul_precision(_FLOAT32_PRODUCTS)
def write(folder: pathlib.Path, student: students.Student) -> None:
    """Write the graphs of every prompt length, their weights, and `onnx.json`."""
    import onnx

    model = student.assets.seen
    prepared = prepared_weights(model, student, any_time=True)
    lengths, graphs = _lengths(student), {}
    with onnx_graph.Weights(folder / WEIGHTS) as weights:
        for length in lengths:
            at = dataclasses.replace(model, max_token_len=length)
            end = "" if length == model.max_token_len else f"_{length}"
            graphs[str(length)] = {name: f"{name}{end}.onnx" for name in _PARTS}
            for name, part in _PARTS.items():
                function, inputs, outputs = part(at, student.num_steps)
                made = onnx_graph.convert(
                    function, prepared, inputs, outputs, weights, student.opset
                )
                tensorrt_operators.check(onnx_graph.operators(made), name)
                onnx.save_model(made, folder / graphs[str(length)][name])
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    content = {
        "dtype": model.dtype,
        "opset": student.opset,
        "num_steps": student.num_steps,
        "quantize": student.quantize,
        "action_horizon": model.action_horizon,
        "action_dim": model.action_dim,
        "image_size": model.image_size,
        "cameras": list(model.cameras),
        "discrete_state_input": model.discrete_state_input,
        "normalization": student.assets.kind,
        "graphs": graphs,
        # File sizes reveal an incomplete copy.
        "files": files,
    }
    (folder / DESCRIPTION).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def usage(folder: str, student: students.Student) -> str:
    """The graphs' inputs and outputs, and two ways to run them."""
    model, lengths = student.assets.seen, _lengths(student)
    # The runner lacks openpi's own transforms.
    runner = "" if student.assets.robot.elsewhere else _RUNNER.format(folder=folder)
    graphs = _USAGE.format(
        bits="" if student.quantize == "none" else f" with products in {student.quantize} (Q/DQ)",
        cameras=", ".join(model.cameras),
        count=len(model.cameras),
        dtype=model.dtype,
        inputs=", ".join(f"`{name}`" for name in _inputs(model)),
        lengths=", ".join(map(str, lengths)),
        opset=student.opset,
        read=", ".join(map(str, _read_layers(model))),
        size=model.image_size,
        steps=student.num_steps,
    )
    return graphs + runner


@jax.default_matmul_precision(_FLOAT32_PRODUCTS)
def verify(folder: pathlib.Path, exported: students.Student, student: students.Student) -> str:
    """Check the graphs, and compare them with the sampler in float32 on the same noise.

    One program holds memory at a time: at full size each needs a copy of its weights in float32.
    """
    import onnx

    model, content = student.assets.seen, json.loads((folder / DESCRIPTION).read_text())
    for graphs in content["graphs"].values():
        for file in graphs.values():
            onnx.checker.check_model(folder / file)
    lengths = [dataclasses.replace(model, max_token_len=int(n)) for n in content["graphs"]]
    wanted = [_sampled(at, student, student.quantize) for at in lengths]
    is_exact = model.dtype == "float32"
    largest = 1.0 if is_exact else max(1.0, float(np.max(np.abs(wanted))))
    differences, limit, rounding = [], TOLERANCE[model.dtype] * largest, ""
    if student.quantize != "none":
        # A difference of one bit before a rounding is a whole step behind it.
        exact = _sampled(model, student, "none")
        steps = float(np.max(np.abs(exact - wanted[lengths.index(model)])))
        limit = max(limit, steps / 2) if is_exact else limit + 4 * steps
        rounding = f" ({student.quantize} itself changes an action by {steps:.1e})"
    with contextlib.ExitStack() as stack:
        run = folder
        if model.dtype == "bfloat16":
            # ONNX Runtime has no products of bfloat16 on a CPU.
            run = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        for at, graphs, want in zip(lengths, content["graphs"].values(), wanted, strict=True):
            # The parts are the same graph: once is enough.
            needed = graphs if at == model else {"policy": graphs["policy"]}
            if run != folder:
                for file in needed.values():
                    onnx_graph.write_in_float32(folder / file, run / file)
            inputs = made_up(at)
            got = [_run(run / graphs["policy"], inputs)["actions"]]
            if at == model:
                got.append(_by_parts(run, graphs, inputs, student.num_steps))
            differences += [np.max(np.abs(one - want)) for one in got]
    # Not Python's max, which passes over a NaN.
    worst = float(np.max(differences))
    if not worst <= limit:
        raise ValueError(
            f"the actions of {folder} differ from the sampler's by {worst:.3g}, where at most "
            f"{limit:.3g} is allowed: "
            + (
                "a defect of the export, please report it; nothing was kept"
                if is_exact
                else "give --dtype float32, for its range and precision; nothing was kept"
            )
        )
    arithmetic = ""
    if model.dtype == "bfloat16":
        arithmetic = " with the graphs' arithmetic widened to float32"
        progress.warn(
            "ONNX Runtime has no bfloat16 on a CPU: the graphs were compared in float32, so their "
            "rounding is unchecked; compare actions on the target computer"
        )
    return (
        "Checked by `onnx.checker`; every operator is one that TensorRT reads. On the same "
        f"observation and noise, ONNX Runtime on a CPU{arithmetic} and the sampler in float32 "
        f"differed by at most {worst:.1e} in a normalized action{rounding}."
    )


def _inputs(model: pi0.Pi0Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Inputs of the prefix graph."""
    size, spec = model.image_size, jax.ShapeDtypeStruct
    found = {
        "images": spec((1, len(model.cameras), size, size, 3), np.uint8),
        "prompt": spec((1, model.max_token_len), np.int32),
        "prompt_mask": spec((1, model.max_token_len), np.bool_),
    }
    return found if model.pi05 else found | {"state": spec((1, model.action_dim), np.float32)}


def _observation(model: pi0.Pi0Config, given: Sequence[Array]) -> observations.Observation:
    """The inputs of a graph as an observation, every camera present."""
    images, prompt, mask, *state = given
    floats = observations.Observation({"all": images}, {}, None, None, None).as_float()
    return observations.Observation(
        images={name: floats.images["all"][:, i] for i, name in enumerate(model.cameras)},
        image_masks=dict.fromkeys(model.cameras, jnp.ones(1, bool)),
        state=state[0] if state else jnp.zeros((1, model.action_dim)),
        tokenized_prompt=prompt,
        tokenized_prompt_mask=mask,
    )


_Part = tuple[Callable[..., Sequence[Array]], dict[str, jax.ShapeDtypeStruct], list[str]]


def policy_part(model: pi0.Pi0Config, num_steps: int) -> _Part:
    def sample(prepared: preparation.Prepared, *given: Array) -> Sequence[Array]:
        *observed, noise = given
        observation = _observation(model, observed)
        return [
            sampler.sample_prepared(
                model, prepared, observation, noise, num_steps=num_steps, options=tuning.ALL_ON
            )
        ]

    return sample, _inputs(model) | {"noise": _noise(model)}, ["actions"]


def _prefix(model: pi0.Pi0Config, num_steps: int) -> _Part:
    def prefix(prepared: preparation.Prepared, *given: Array) -> Sequence[Array]:
        observation = _observation(model, given)
        cache, valid = forward.prefill(model, prepared, observation)
        cache, valid = forward.append_state(model, prepared, observation.state, cache, valid)
        return [*jax.tree.leaves([cache[i] for i in _read_layers(model)]), valid]

    return prefix, _inputs(model), list(_cache(model))


def _step(model: pi0.Pi0Config, num_steps: int) -> _Part:
    def step(prepared: preparation.Prepared, *given: Array) -> Sequence[Array]:
        x, t, *rest, valid = given
        held = dict(zip(_read_layers(model), zip(rest[::2], rest[1::2], strict=True), strict=True))
        cache = [held.get(i) for i in range(model.depth)]
        tables = preparation.make_tables(model, prepared.params, t)
        return [forward.velocity(model, prepared, cache, valid, x, tables)[0]]

    time = {"t": jax.ShapeDtypeStruct((1,), np.float32)}
    return step, {"x": _noise(model)} | time | _cache(model), ["velocity"]


_PARTS: dict[str, Callable[[pi0.Pi0Config, int], _Part]] = {
    "policy": policy_part,
    "prefix": _prefix,
    "step": _step,
}


def _noise(model: pi0.Pi0Config) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, model.action_horizon, model.action_dim), np.float32)


def _read_layers(model: pi0.Pi0Config) -> list[int]:
    """The layers whose keys and values the steps read: those of the expert."""
    return [i for i, kind in enumerate(model.layers) if kind.expert == "whole"]


def _cache(model: pi0.Pi0Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Tensors that the prefix hands to the steps."""
    c, slots = model.backbone, preparation.cache_length(model)
    spec = jax.ShapeDtypeStruct((1, slots, c.num_kv_heads, c.head_dim), jnp.dtype(model.dtype))
    names = [f"{kind}_{i}" for i in _read_layers(model) for kind in ("keys", "values")]
    return dict.fromkeys(names, spec) | {"valid": jax.ShapeDtypeStruct((1, slots), np.bool_)}


def _lengths(student: students.Student) -> list[int]:
    """Prompt lengths to write graphs for: those of usual prompts, and the maximum."""
    usual = warm_up.prompt_lengths(student.assets, None)
    return sorted({*usual, student.model.max_token_len})


@jax.default_matmul_precision(_FLOAT32_PRODUCTS)
def prepared_weights(
    model: pi0.Pi0Config, student: students.Student, *, any_time: bool = False
) -> preparation.Prepared:
    """The weights of the sampler; for any time also those of a step whose time is an input."""
    times, dtype = sampler.integration_times(student.num_steps), jnp.dtype(model.dtype)

    def prepare(params: PyTree) -> preparation.Prepared:
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        options = dataclasses.replace(tuning.ALL_ON, quantize=student.quantize)
        found = preparation.prepare(model, cast, times, options, student.bounds)
        timed = preparation.time_weights(model, cast) if any_time else {}
        return found._replace(params={**found.params, **timed})

    return jax.jit(prepare)(jax.tree.map(jnp.asarray, student.params))


def made_up(model: pi0.Pi0Config) -> dict[str, np.ndarray]:
    """Inputs of `policy.onnx` with a prompt of half the length."""
    generator, found = np.random.default_rng(0), {}
    for name, spec in (_inputs(model) | {"noise": _noise(model)}).items():
        if name == "prompt_mask":
            found[name] = np.arange(spec.shape[1])[None] < (spec.shape[1] + 1) // 2
        elif spec.dtype == np.float32:
            found[name] = generator.standard_normal(spec.shape).astype(np.float32)
        else:
            high = 256 if name == "images" else model.vocab_size
            found[name] = generator.integers(0, high, spec.shape, spec.dtype)
    return found


def _sampled(
    model: pi0.Pi0Config, student: students.Student, scheme: quantize.Scheme
) -> np.ndarray:
    """The sampler's actions in float32, from `made_up` inputs, with products by a scheme."""
    wide, steps = dataclasses.replace(model, dtype="float32"), student.num_steps
    options = dataclasses.replace(tuning.default(), quantize=scheme)

    def sample(params: PyTree, *given: Array) -> Array:
        *observed, noise = given
        times = sampler.integration_times(steps)
        prepared = preparation.prepare(wide, params, times, options, student.bounds)
        observation = _observation(wide, observed)
        return sampler.sample_prepared(
            wide, prepared, observation, noise, num_steps=steps, options=options
        )

    params = jax.tree.map(jnp.asarray, student.params)
    actions = np.array(jax.jit(sample)(params, *made_up(model).values()))
    # The program and what it holds.
    del sample
    gc.collect()
    return actions


def _run(path: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a graph by name; the session ends with the call."""
    session = _session(path)
    return dict(
        zip([o.name for o in session.get_outputs()], session.run(None, inputs), strict=True)
    )


def _session(path: pathlib.Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Neither is worth its memory in a few calls.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _by_parts(
    folder: pathlib.Path, graphs: dict[str, str], inputs: dict[str, np.ndarray], num_steps: int
) -> np.ndarray:
    """The actions of `prefix.onnx` and a loop over `step.onnx`."""
    observed = {name: value for name, value in inputs.items() if name != "noise"}
    cache = _run(folder / graphs["prefix"], observed)
    session, x = _session(folder / graphs["step"]), inputs["noise"]
    for t in sampler.integration_times(num_steps):
        (velocity,) = session.run(None, {"x": x, "t": np.array([t], np.float32), **cache})
        x = x - np.float32(1 / num_steps) * velocity
    return np.asarray(x)
