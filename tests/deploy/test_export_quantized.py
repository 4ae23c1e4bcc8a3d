"""Exports in 8 bits: the sampler's integers in an ONNX graph, and refusals by name."""

import dataclasses
import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.deploy import policy
from shallow_pi.deploy.export import export, onnx_graph, stablehlo
from shallow_pi.deploy.export import student as students
from shallow_pi.inference import calibration
from shallow_pi.models import batch as batches

STEPS = 2


@pytest.fixture(scope="module")
def step(own, params, tmp_path_factory):
    """A step folder with a calibration."""
    folder = tmp_path_factory.mktemp("run") / "2"
    weights.save_params(folder / "params", params)
    own.save(folder / "assets")
    observation = batches.noise(own.model, 4).observation.as_float()
    noise = np.random.default_rng(0).standard_normal((4, 5, 6)).astype(np.float32)
    found = calibration.calibrate(own.model, params, [(observation, noise)], num_steps=STEPS)
    calibration.save(folder / "assets", found)
    return folder


def _export(step, folder, format="onnx", **options):
    return export.export(step, format, folder, num_steps=STEPS, **options)


def _difference(folder):
    card = " ".join((folder / "README.md").read_text().split())
    found = re.search(
        r"differed by at most (\S+) in a normalized action \(int8 itself .* by (\S+)\)", card
    )
    return float(found[1]), float(found[2])


@pytest.mark.slow
def test_onnx_in_int8_is_the_sampler_in_int8(step, tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is an extra, absent beside openpi's pins")
    pytest.importorskip("onnxruntime", reason="onnxruntime is an extra")
    folder = _export(step, tmp_path / "x", dtype="float32", quantize="int8")
    difference, rounding = _difference(folder)
    assert difference <= max(1e-4, rounding / 2)
    assert rounding > 1e-3
    content = json.loads((folder / "onnx.json").read_text())
    assert content["quantize"] == "int8"
    model = onnx.load(folder / "policy.onnx")
    nodes = {output: node for node in model.graph.node for output in node.output}
    constants = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer}
    counts = onnx_graph.operators(model)
    # Tower 1 x 4; prefix 4 and the last layer's keys and values; state 4 and 1; steps 2 x 2 x 4.
    expected = 4 + 4 + 1 + 4 + 1 + STEPS * 8
    assert counts["QuantizeLinear"] == expected
    assert counts["DequantizeLinear"] == 2 * expected
    for node in model.graph.node:
        if node.op_type != "MatMul" or nodes.get(node.input[1], node).op_type != "DequantizeLinear":
            continue
        left, right = (nodes[name] for name in node.input)
        values, scales, zeros = (constants[name] for name in right.input)
        assert (left.op_type, nodes[left.input[0]].op_type) == (
            "DequantizeLinear",
            "QuantizeLinear",
        )
        assert (values.dtype, zeros.dtype) == (np.int8, np.int8)
        assert scales.shape == zeros.shape == values.shape[1:]
        assert constants[left.input[1]].shape == ()
        assert not zeros.any()


@pytest.mark.slow
def test_opset_19_takes_activations_in_float16(step, tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx is an extra, absent beside openpi's pins")
    pytest.importorskip("onnxruntime", reason="onnxruntime is an extra")
    folder = _export(step, tmp_path / "half", opset=19, quantize="int8")
    difference, rounding = _difference(folder)
    assert difference < 4 * rounding
    model = onnx.load(folder / "policy.onnx", load_external_data=False)
    kinds = {w.data_type for w in model.graph.initializer if len(w.dims) == 2}
    assert {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT16} <= kinds


@pytest.mark.parametrize(
    ("format", "options", "match"),
    [
        ("openpi", {"quantize": "int8"}, "--format openpi holds float weights alone"),
        ("lerobot", {"quantize": "w8"}, "--format lerobot holds float weights alone"),
        ("onnx", {"quantize": "fp8"}, "--quantize fp8: --format onnx has --quantize int8"),
        ("onnx", {"quantize": "int4"}, "quantize must be one of none, int8, fp8"),
    ],
)
def test_a_format_without_such_products_is_refused_by_name(step, tmp_path, format, options, match):
    with pytest.raises(ValueError, match=match):
        _export(step, tmp_path / "x", format, **options)
    assert not list(tmp_path.iterdir())


def test_float16_activations_need_a_newer_opset(step, tmp_path):
    pytest.importorskip("onnx", reason="onnx is an extra, absent beside openpi's pins")
    with pytest.raises(ValueError, match="float16 from ONNX's opset 19 on: give --opset 19"):
        _export(step, tmp_path / "x", quantize="int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "other"),
    [("stablehlo", r"round weights alone \(w8\)"), ("onnx", r"round nothing \(none\)")],
)
def test_a_student_that_was_not_calibrated_is_refused(format, other, own, params, tmp_path):
    """The error names what the format can do without a calibration."""
    weights.save_params(tmp_path / "2" / "params", params)
    own.save(tmp_path / "2" / "assets")
    bounds = r"needs bounds in assets/calibration.json: run scripts/calibrate\.py .*, or "
    with pytest.raises(ValueError, match=f"{bounds}{other}$"):
        _export(tmp_path / "2", tmp_path / "x", format, quantize="int8")


@pytest.mark.parametrize(
    ("format", "options", "steps"),
    [
        ("stablehlo", {"num_steps": 5}, "samples in 5 integration steps and was trained for 10"),
        ("openpi", {"any_size": True}, ""),
    ],
)
def test_steps_and_float_weights_that_it_was_not_trained_for_are_warned_of(
    format, options, steps, own, tmp_path, capsys
):
    dataclasses.replace(own, quantize="int8").save(tmp_path / "2" / "assets")
    with pytest.raises(ValueError, match="holds no parameters"):
        export.export(tmp_path / "2", format, **options)
    told = " ".join(capsys.readouterr().err.split())
    assert steps in told
    assert f"8 bits (int8), and --format {format} holds its unrounded weights" in told


@pytest.mark.parametrize("scheme", ["int8", "w8"])
def test_stablehlo_holds_int8_weights(step, tmp_path, scheme):
    folder = _export(step, tmp_path / "x", "stablehlo", dtype="float32", quantize=scheme)
    import safetensors.flax

    found = safetensors.flax.load_file(folder / stablehlo.WEIGHTS)
    assert sum(leaf.dtype == jnp.int8 for leaf in found.values()) == 4 * (1 + 2 + 2)
    card = (folder / "README.md").read_text()
    assert f"in float32 with products in 8 bits ({scheme}), batch 1" in card


def test_a_calibration_stays_beside_the_layers_that_it_is_of(
    step, own, tmp_path, capsys, monkeypatch
):
    """Without it a policy that was trained for int8 would be served with rounded weights alone."""
    shutil.copytree(step, tmp_path / "2")
    dataclasses.replace(own, quantize="int8").save(tmp_path / "2" / "assets")
    folder = export.export(tmp_path / "2", "openpi", tmp_path / "x", any_size=True)
    name = f"assets/{calibration.FILE_NAME}"
    assert (folder / name).read_bytes() == (step / name).read_bytes()
    assert policy.Policy.from_checkpoint(folder, num_steps=STEPS, warm_up=False).quantize == "int8"
    assert (
        "| compute | float32, trained for products in 8 bits (int8) |"
        in (folder / "README.md").read_text()
    )
    assert "is left out" not in capsys.readouterr().err
    monkeypatch.setattr(students, "DEPTH", 3)
    folder = export.export(tmp_path / "2", "openpi-padded", tmp_path / "y", any_size=True)
    assert not (folder / name).exists()
    assert "calibration.json is left out" in " ".join(capsys.readouterr().err.split())


def test_a_scheme_without_bounds_is_refused_before_parameters_are_read(own, tmp_path):
    own.save(tmp_path / "2" / "assets")
    with pytest.raises(ValueError, match=r"needs bounds in assets/calibration\.json"):
        _export(tmp_path / "2", tmp_path / "x", "stablehlo", quantize="int8")
