"""ONNX exports: the sampler's actions, and errors for what cannot be a graph."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.data.robots import assets
from shallow_pi.deploy import policy
from shallow_pi.deploy.export import export, tensorrt_operators
from shallow_pi.deploy.export import student as students
from shallow_pi.inference import prepare as preparation
from shallow_pi.inference import sampler
from shallow_pi.models import pi0

onnx = pytest.importorskip("onnx", reason="onnx is an extra, absent beside openpi's pins")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is an extra")

from shallow_pi.deploy.export import onnx as onnx_format  # noqa: E402 (after the skip)
from shallow_pi.deploy.export import onnx_graph  # noqa: E402


@pytest.fixture(scope="module")
def steps(own, tiny_params, tmp_path_factory):
    """Step folders of a π0 that pools image tokens, and of an uneven π0.5 that scores them."""
    uneven = {
        "depth": 3,
        "backbone_layers": ("whole", "whole", "keys_values"),
        "expert_layers": ("whole", "absent", "whole"),
        "scored_tokens": 2,
    }
    found = {}
    for name, changes in (
        ("pi0", {"pooled_tokens": 2}),
        ("pi05", {"pi05": True, "discrete_state_input": True, "max_token_len": 40} | uneven),
    ):
        model = dataclasses.replace(own.model, **changes)
        found[name] = tmp_path_factory.mktemp(name) / "2"
        weights.save_params(found[name] / "params", tiny_params(model))
        dataclasses.replace(own, model=model).save(found[name] / "assets")
    return found


@pytest.fixture(scope="module")
def exported(steps, tmp_path_factory):
    """ONNX in float32; tests must not change them."""
    folder = tmp_path_factory.mktemp("onnx")
    return {
        name: export.export(
            step, "onnx", folder / name, dtype="float32", num_steps=2, opset=17 + (name == "pi05")
        )
        for name, step in steps.items()
    }


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_onnx_graphs_hold_operators_of_tensorrt_in_fixed_shapes(exported, name):
    content = json.loads((exported[name] / "onnx.json").read_text())
    assert content["graphs"][str(7 if name == "pi0" else 40)] == {
        "policy": "policy.onnx",
        "prefix": "prefix.onnx",
        "step": "step.onnx",
    }
    model = onnx.load(exported[name] / "policy.onnx", load_external_data=False)
    assert model.opset_import[0].version == (17 if name == "pi0" else 18)
    counts = onnx_graph.operators(model)
    assert set(counts) <= tensorrt_operators.SUPPORTED
    # One a layer of the tower, the backbone (the last layer's is not read) and each step's expert;
    # π0's state sees the prefix in every layer but the last too. π0.5 has keys and values alone in
    # its last backbone layer, and no expert in its second.
    assert counts["Softmax"] == (1 + 1 + 1 + 2 * 2 if name == "pi0" else 1 + 2 + 2 * 2)
    assert "ReduceMax" not in counts
    large = [w for w in model.graph.initializer if w.data_location == onnx.TensorProto.EXTERNAL]
    assert {w.external_data[0].value for w in large} == {"weights.bin"}
    assert not [w for w in model.graph.initializer if w.data_type == onnx.TensorProto.DOUBLE]


def test_the_card_says_how_far_the_actions_are(exported):
    card = (exported["pi0"] / "README.md").read_text()
    assert "trtexec --onnx=policy.onnx" in card
    assert "ONNX Runtime on a CPU and the sampler in float32 differed by at most" in " ".join(
        card.split()
    )
    assert "shallow-pi serve" not in card
    assert "{" not in card
    # Those of the graphs, whatever the student was trained for.
    assert "| integration steps | 2 |" in card
    # Those that the steps read: π0.5's second layer has no expert.
    for name, read in (("pi0", "0, 1"), ("pi05", "0, 2")):
        text = (exported[name] / "README.md").read_text()
        assert f"`keys_i` and `values_i` of layers {read}, `valid` |" in text


def test_a_folder_of_graphs_is_no_policy_and_says_what_it_is(exported):
    with pytest.raises(ValueError, match="an export as graphs, which run as its README"):
        policy.Policy.from_checkpoint(exported["pi0"])
    with pytest.raises(ValueError, match="give the step folder that was exported"):
        export.export(exported["pi0"], "onnx", exported["pi0"].with_name("again"))


def _student(step, dtype, scale=1.0):
    """The student of a step folder as an export has it, its parameters multiplied by a number."""
    own = assets.load(step)
    params = weights.load_params(step, pi0.abstract_params(own.model), what="student")
    own = dataclasses.replace(own, model=dataclasses.replace(own.model, dtype=dtype))
    return students.Student(own, jax.tree.map(lambda x: scale * np.asarray(x), params), 2)


def test_actions_that_are_no_numbers_are_refused(steps, exported, tmp_path):
    """As a float16 graph gives them whose activations overflow, or a damaged file of weights."""
    shutil.copytree(exported["pi0"], tmp_path / "x")
    file = tmp_path / "x" / "weights.bin"
    file.write_bytes(b"\xff" * file.stat().st_size)
    student = _student(steps["pi0"], "float32")
    with pytest.raises(ValueError, match="differ from the sampler's by nan"):
        onnx_format.verify(tmp_path / "x", student, student)


def test_float16_holds_its_weights_in_half_the_bytes(steps, exported, tmp_path):
    folder = export.export(steps["pi0"], "onnx", tmp_path / "half", num_steps=2)
    sizes = [
        json.loads((one / "onnx.json").read_text())["files"]["weights.bin"]
        for one in (folder, exported["pi0"])
    ]
    assert sizes[0] < sizes[1]
    model = onnx.load(folder / "policy.onnx", load_external_data=False)
    types = {w.data_type for w in model.graph.initializer if len(w.dims) == 2}
    assert onnx.TensorProto.FLOAT16 in types
    other = _student(steps["pi0"], "float16", scale=0.5)
    with pytest.raises(ValueError, match=r"where at most 0\.\d+ is allowed: give --dtype float32"):
        onnx_format.verify(folder, other, other)


def test_bfloat16_is_compared_in_float32_arithmetic_with_a_warning(steps, tmp_path, capsys):
    folder = export.export(steps["pi05"], "onnx", tmp_path / "x", dtype="bfloat16", num_steps=1)
    assert "their rounding is unchecked" in capsys.readouterr().err
    card = " ".join((folder / "README.md").read_text().split())
    found = re.search(r"widened to float32 and the sampler .* at most (\S+) in a normalized", card)
    # The weights' own rounding is in both; the tables of time are rounded in the graph alone.
    assert float(found[1]) < 2e-2
    model = onnx.load(folder / "policy.onnx", load_external_data=False)
    kinds = {w.data_type for w in model.graph.initializer if len(w.dims) == 2}
    assert onnx.TensorProto.BFLOAT16 in kinds
    assert not [one for one in folder.iterdir() if one.is_dir() and one.name != "assets"]


@pytest.mark.parametrize(
    ("format", "options", "match"),
    [
        ("onnx", {"opset": 16}, "--opset 16: graphs are written for 17 to 20"),
        ("onnx", {"opset": 21}, "the newest that TensorRT 10 reads"),
        ("onnx", {"dtype": "int8"}, "has --dtype float16, float32, bfloat16, not 'int8'"),
        ("stablehlo", {"dtype": "float16"}, "has --dtype bfloat16, float32, not 'float16'"),
        ("openpi", {"dtype": "float32"}, "--dtype is for graphs"),
        ("openpi", {"opset": 19}, "--opset 19 is for --format onnx, not openpi"),
        ("openpi", {}, "--num-steps 1 is for graphs, --format openpi keeps the 10 that the stud"),
    ],
)
def test_a_graph_that_cannot_be_is_refused_and_nothing_is_left(
    steps, tmp_path, format, options, match
):
    with pytest.raises(ValueError, match=match):
        export.export(steps["pi0"], format, tmp_path / "out" / "x", num_steps=1, **options)
    assert not list(tmp_path.glob("out/*"))


def test_weights_and_reference_are_of_products_in_float32(steps, tmp_path, monkeypatch):
    """JAX multiplies float32 in TF32 on a GPU, whose rounding is above the tolerance."""
    seen = []
    for module, name in ((preparation, "prepare"), (sampler, "sample_prepared")):
        function = getattr(module, name)

        def watched(*args, function=function, **kwargs):
            seen.append(jax.config.jax_default_matmul_precision)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)
    folder = tmp_path / "x"
    export.export(steps["pi0"], "onnx", folder, dtype="float32", num_steps=1)
    assert len(seen) >= 4
    assert set(seen) == {"highest"}
    assert jax.config.jax_default_matmul_precision is None


def test_an_interrupted_export_leaves_nothing(steps, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_format, "verify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export.export(steps["pi0"], "onnx", tmp_path / "x", num_steps=1)
    assert not list(tmp_path.iterdir())


def convert(function, shape, tmp_path, known=()):
    spec = {"x": jax.ShapeDtypeStruct(shape, np.float32)}
    with onnx_graph.Weights(tmp_path / "weights.bin") as file:
        made = onnx_graph.convert(lambda k, x: [function(x, *k)], known, spec, ["y"], file)
    onnx.save_model(made, tmp_path / "x.onnx")
    return ort.InferenceSession(str(tmp_path / "x.onnx"))


def test_an_operator_that_onnx_lacks_is_named_with_its_line(tmp_path):
    with pytest.raises(
        ValueError, match=r"primitive 'sort' \(.*test_export_graphs.py:\d+"
    ) as error:
        convert(jnp.sort, (4,), tmp_path)
    assert "onnx_nodes.py" in str(error.value)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda x: jnp.cumsum(x, axis=0), "cumsum along another than the last axis"),
        (lambda x: jax.lax.integer_pow(x, 5), "integer_pow by 5"),
        (lambda x: x[:, x[0].astype(int)], "gather of anything but rows"),
    ],
)
def test_forms_that_no_graph_needs_are_refused(tmp_path, function, match):
    with pytest.raises(ValueError, match=match):
        convert(function, (3, 3), tmp_path)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jax.nn.softmax(x, axis=0),
        lambda x: jnp.exp(x) / jnp.sum(jnp.exp(x), axis=-1, keepdims=True),
        lambda x: jnp.einsum("abc,bd->dac", x, x[0]),
        lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0)), constant_values=2.0) * 2,
        lambda x: jax.lax.dynamic_update_slice(jnp.zeros((2, 5, 4)), x, (0, 1, 0)),
        lambda x: jnp.where(jnp.cumsum(x > 0, axis=-1) > 1, x, -1.0),
        lambda x: jnp.stack([x[:, ::2], x[:, 1:]], axis=1).reshape(4, -1).T,
    ],
)
def test_nodes_compute_what_jax_computes(tmp_path, function):
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(np.float32)
    (found,) = convert(function, x.shape, tmp_path).run(None, {"x": x})
    np.testing.assert_allclose(found, function(jnp.asarray(x)), rtol=1e-5, atol=1e-6)


def test_equal_weights_are_written_once(tmp_path):
    table = np.ones((64, 64), np.float32)
    session = convert(lambda x, a, b: x @ a @ b, (2, 64), tmp_path, (table, table.copy()))
    assert (tmp_path / "weights.bin").stat().st_size == table.nbytes
    assert session.run(None, {"x": np.ones((2, 64), np.float32)})[0][0, 0] == 64 * 64


def test_a_graph_with_other_operators_is_refused():
    with pytest.raises(ValueError, match=r"policy has operators outside the list .*: Einsum, Loop"):
        tensorrt_operators.check(["Add", "Loop", "Einsum"], "policy")


def test_models_may_compute_in_float16_but_nothing_trains_in_it(own):
    assert dataclasses.replace(own.model, dtype="float16").dtype == "float16"
    with pytest.raises(ValueError, match="dtype must be"):
        pi0.Pi0Config(dtype="float64")
