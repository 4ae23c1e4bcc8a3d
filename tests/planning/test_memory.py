"""The memory of a step is estimated, and parameters are sharded over the fewest devices."""

import dataclasses
import math
import re
import types

import jax
import numpy as np
import pytest

from shallow_pi.distill import losses
from shallow_pi.models import pi0
from shallow_pi.parallel import sharding
from shallow_pi.planning import accelerators, compile, memory, report
from shallow_pi.training import setup

GIGA = 10**9


@pytest.fixture(scope="module")
def full_size(tiny_experiment, tmp_path_factory):
    """The spec of π0, 18 → 6 layers, at openpi's sizes."""
    experiment = tiny_experiment(tmp_path_factory.mktemp("run"))
    student = dataclasses.replace(experiment.student, depth=6)
    return dataclasses.replace(experiment, model=pi0.Pi0Config(), student=student, ema_decay=0.0)


def _estimate(experiment, mesh=(1, 1, 1), batch=32):
    devices = jax.devices()[: mesh[0] * mesh[1] * mesh[2]]
    mesh = sharding.MeshConfig(*mesh).create(devices)
    return memory.estimate(setup.make_spec(experiment), mesh, batch, "bfloat16")


def _with(experiment, **changes):
    student = dataclasses.replace(experiment.student, freeze=changes.pop("freeze", ()))
    return dataclasses.replace(experiment, student=student, **changes)


def test_the_arguments_of_a_step_are_counted_to_the_byte(full_size):
    """FACTS of the paper's sizes: 3.238 and 1.709 billion parameters, 942 million frozen."""
    found = _estimate(_with(full_size, remat="layers"))
    assert found.given["teacher"] == 2 * 3_238_048_528
    assert found.given["student"] == found.gradient == 4 * 1_709_150_992
    assert 0 <= found.given["moments"] - 2 * found.given["student"] < 100
    assert found.total == sum(found.given.values()) + found.gradient + found.activations
    frozen = _estimate(_with(full_size, remat="layers", freeze=("vision", "embedder")))
    held = frozen.given["student"] / 4
    assert 1_709_150_992 - held == pytest.approx(415e6 + 257_152 * 2048, rel=0.01)
    assert frozen.given["teacher"] == found.given["teacher"]
    low = dataclasses.replace(full_size.optimizer, moments="bfloat16")
    half = _estimate(_with(full_size, remat="layers", optimizer=low))
    assert half.given["moments"] == pytest.approx(found.given["moments"] / 2, rel=1e-6)


def test_the_whole_teacher_lies_beside_the_state_before_the_first_step(full_size):
    """The student is cut out of it: more than a small batch of few trained parameters needs."""
    alone = full_size.losses.only(task=1.0)
    parts = _with(full_size, remat="layers", freeze=("vision", "embedder"), losses=alone)
    found = _estimate(parts, batch=1)
    state = found.given["student"] + found.given["moments"] + found.given["batch"]
    assert found.start == 2 * 3_238_048_528 + state
    assert found.total == found.start > sum(found.parts.values())
    assert " GB at the start (teacher " in str(found)
    spec = setup.make_spec(parts)
    mesh = sharding.MeshConfig().create(jax.devices()[:1])
    lines = report.estimated(spec, mesh, 1, "bfloat16")
    assert [line.split()[0] for line in lines[1:8]] == [
        *("teacher", "student", "moments", "batch", "gradient", "activations", "before")
    ]
    many = _estimate(parts, batch=64)
    assert many.start < many.total == sum(many.parts.values())


def test_activations_grow_the_less_is_recomputed_and_with_the_rows_of_a_device(full_size):
    sizes = [
        _estimate(_with(full_size, remat=remat)).activations for remat in ("layers", "dots", "none")
    ]
    assert sizes == sorted(sizes)
    assert sizes[2] > 2 * sizes[0]
    one = _estimate(_with(full_size, remat="layers"))
    assert (
        _estimate(_with(full_size, remat="layers"), (8, 1, 1), 256).activations == one.activations
    )
    twice = _estimate(_with(full_size, remat="layers"), batch=64).activations
    assert twice == pytest.approx(2 * one.activations, rel=1e-6)


def test_over_tensor_every_device_keeps_the_whole_inputs_of_layers(full_size):
    """Of 32 observations: six layers of both streams, and 27 of the image tower's three cameras."""
    experiment = _with(full_size, remat="layers")
    one, two, four = (_estimate(experiment, (1, 1, ways)).activations for ways in (1, 2, 4))
    inputs = 2 * 32 * (6 * (816 * 2048 + 51 * 1024) + 27 * 3 * 256 * 1152)
    images = 3 * 4 * 32 * 3 * 3 * 224**2
    assert one - two == pytest.approx(2 * (two - four), rel=1e-6)
    assert one - 2 * (one - two) == pytest.approx(inputs + images, rel=1e-6)


def test_the_attention_of_more_tokens_is_compared_in_more_floats(full_size):
    """Logits and log-probabilities of both models, 8 heads, 816 keys: of 50, 867 and 48 tokens."""
    actions, every, text = (
        _estimate(_with(full_size, losses=losses.Losses(attention_queries=queries))).activations
        for queries in ("actions", "all", "text")
    )
    one = 32 * 4 * 4 * 8 * 816
    assert every - actions == pytest.approx(817 * one, rel=1e-6)
    assert actions - text == pytest.approx(2 * one, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "queries", "prompt"),
    [("layers", "actions", 8), ("none", "actions", 8), ("layers", "all", 200)],
)
def test_an_estimate_is_near_what_the_compiler_plans(
    tiny_experiment, tmp_path, remat, queries, prompt
):
    """Uses models with more activations than parameters."""
    experiment = tiny_experiment(tmp_path, remat=remat, batch_size=64)
    experiment = dataclasses.replace(
        experiment,
        model=dataclasses.replace(experiment.model, max_token_len=prompt),
        losses=dataclasses.replace(experiment.losses, attention_queries=queries),
    )
    mesh = sharding.MeshConfig().create(jax.devices()[:1])
    spec = setup.make_spec(experiment, mesh)
    _, planned = compile.build(spec, mesh, 64)
    found = memory.estimate(spec, mesh, 64, "bfloat16")
    assert found.given == planned.given
    assert 0.5 < (found.activations + found.gradient) / planned.temporary < 2


def _devices(count, room, monkeypatch):
    monkeypatch.setattr(accelerators, "memory_of", lambda device: room)
    return jax.devices()[:count]


@pytest.mark.parametrize(
    ("room", "chosen"),
    [(None, -1), (80 * GIGA, 1), (24 * GIGA, 2), (16 * GIGA, 4), (8 * GIGA, 8), (GIGA, 8)],
)
def test_parameters_are_sharded_over_the_fewest_devices_that_fit(
    full_size, monkeypatch, room, chosen
):
    """If no sharding fits, the widest is used, and the run warns."""
    spec = setup.make_spec(_with(full_size, remat="layers"))
    devices = _devices(8, room, monkeypatch)
    found = memory.choose(sharding.MeshConfig(), devices, spec, 64, "bfloat16")
    assert found == sharding.MeshConfig(fsdp=chosen)
    if room and room > GIGA:
        needed = memory.estimate(spec, found.create(devices), 64, "bfloat16").total
        less = sharding.MeshConfig(fsdp=max(chosen // 2, 1)).create(devices)
        assert needed <= memory.USABLE * room
        assert (
            chosen == 1 or memory.estimate(spec, less, 64, "bfloat16").total > memory.USABLE * room
        )


def test_a_number_of_devices_that_does_not_divide_the_model_is_left_out(full_size, monkeypatch):
    """Three of six devices: no width of openpi's sizes divides by three."""
    spec = setup.make_spec(_with(full_size, remat="layers"))
    devices = _devices(6, 8 * GIGA, monkeypatch)
    found = memory.choose(sharding.MeshConfig(), devices, spec, 66, "bfloat16")
    assert found == sharding.MeshConfig(fsdp=2)


def test_processes_that_know_other_memories_choose_alike(full_size, monkeypatch):
    """A device reports its memory to its own process alone; the others know its kind, or nothing.

    The other processes' answers are given.
    """
    spec, others = setup.make_spec(_with(full_size, remat="layers")), [96 * GIGA, 24 * GIGA]
    monkeypatch.setattr(memory.processes, "gather", lambda value: [value, *others])
    for own in (None, 80 * GIGA):
        devices = _devices(8, own, monkeypatch)
        found = memory.choose(sharding.MeshConfig(), devices, spec, 64, "bfloat16")
        assert found == sharding.MeshConfig(fsdp=2)
    auto = dataclasses.replace(full_size, batch_size=32, remat="auto")
    others[:] = [None, 96 * GIGA]
    for own in (None, 96 * GIGA):
        mesh = sharding.MeshConfig().create(_devices(1, own, monkeypatch))
        assert setup.make_spec(auto, mesh).execution.remat == "dots"


def test_a_mesh_given_in_the_config_is_kept(full_size, monkeypatch):
    spec, devices = setup.make_spec(full_size), _devices(8, GIGA, monkeypatch)
    for mesh in (sharding.MeshConfig(fsdp=1), sharding.MeshConfig(data=4)):
        assert memory.choose(mesh, devices, spec, 64, "bfloat16") == mesh


def test_a_run_reports_its_mesh_and_warns_if_it_may_not_fit(full_size, monkeypatch):
    devices = _devices(8, 16 * GIGA, monkeypatch)
    experiment = dataclasses.replace(full_size, batch_size=64, remat="layers")
    mesh = setup.make_mesh(experiment, devices)
    first, second, third = setup.describe_mesh(experiment, mesh)
    assert first == "Mesh: data 2 × fsdp 4 × tensor 1 (8 cpu)"
    assert re.fullmatch(r"Memory per device: about [\d.]+ GB \(teacher .*\) of 16 GB", second)
    assert third == (
        "Recomputed: all activations of a layer but its input (--remat layers); attention: xla in "
        "the image tower, xla in the prefix"
    )
    big = dataclasses.replace(experiment, batch_size=512)
    assert "may not fit: try --student.freeze" in setup.describe_mesh(big, mesh)[-1]


@pytest.mark.parametrize(("room", "chosen"), [(None, "layers"), (40, "layers"), (96, "dots")])
def test_remat_is_chosen_by_memory(full_size, monkeypatch, room, chosen):
    devices = _devices(1, room and room * GIGA, monkeypatch)
    mesh = sharding.MeshConfig().create(devices)
    auto = dataclasses.replace(full_size, batch_size=32, remat="auto")
    assert setup.make_spec(auto, mesh).execution.remat == chosen
    assert setup.make_spec(_with(auto, remat="none"), mesh).execution.remat == "none"


def test_attention_is_chosen_by_device(full_size, monkeypatch):
    mesh = sharding.MeshConfig().create(jax.devices()[:1])
    monkeypatch.setattr(setup.sharding, "batch_sharding", lambda mesh: None)
    monkeypatch.setattr(accelerators, "memory_of", lambda device: None)

    def chosen(device, present=True, **changes):
        devices = np.array([types.SimpleNamespace(**device)])
        on = types.SimpleNamespace(devices=devices)
        monkeypatch.setattr(jax, "devices", lambda: list(devices) if present else [])
        spec = setup.make_spec(_with(full_size, **changes), on)
        return spec.execution.tower_attention, spec.execution.prefix_attention

    hopper = {"device_kind": "H100", "platform": "gpu", "compute_capability": "9.0"}
    assert chosen(hopper) == ("cudnn", "cudnn")
    assert chosen(hopper, attention="tower") == ("cudnn", "xla")
    assert chosen(hopper, attention="xla") == ("xla", "xla")
    assert chosen({"platform": "gpu", "compute_capability": "8.6"}) == ("cudnn", "xla")
    assert chosen({"platform": "gpu", "compute_capability": "10.0"}) == ("cudnn", "xla")
    assert chosen({"platform": "gpu", "compute_capability": "7.5"}) == ("xla", "xla")
    assert chosen({"platform": "tpu"}) == ("xla", "xla")
    wide = dataclasses.replace(full_size.model, dtype="float32")
    assert chosen(hopper, model=wide) == ("xla", "xla")
    with pytest.raises(ValueError, match=r"--attention cudnn: .* the model in float32: use 'xla'"):
        chosen(hopper, model=wide, attention="cudnn")
    assert chosen(hopper, present=False) == ("xla", "xla")
    with pytest.raises(ValueError, match=r"--attention cudnn: JAX looks at the GPU .* is not here"):
        chosen(hopper, present=False, attention="cudnn")
    with pytest.raises(ValueError, match=r"--attention tower: .*, and JAX's backend is cpu"):
        setup.make_spec(_with(full_size, attention="tower"), mesh)


def test_a_strategy_that_measures_can_be_planned_but_not_stepped(full_size):
    """Its layers are chosen in a run; memory does not depend on which."""
    student = dataclasses.replace(full_size.student, strategy="similarity")
    measured = dataclasses.replace(full_size, student=student)
    assert setup.make_spec(measured).layer_map is None
    assert _estimate(measured) == _estimate(full_size)
    with pytest.raises(ValueError, match=r"none is chosen yet.*--student.layers"):
        _ = setup.make_spec(measured).attention_layers


@pytest.mark.parametrize("mesh", [(1, 1, 1), (2, 4, 1)])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_largest_batch_fits_and_the_next_one_does_not(full_size, mesh, accumulation):
    experiment = _with(full_size, remat="layers", accumulation=accumulation)
    spec = setup.make_spec(experiment)
    devices = sharding.MeshConfig(*mesh).create(jax.devices()[: math.prod(mesh)])
    found = memory.largest_batch(spec, devices, 80 * GIGA, "bfloat16")
    multiple = mesh[0] * mesh[1] * accumulation
    assert found % multiple == 0

    def total(batch):
        return memory.estimate(spec, devices, batch, "bfloat16").total

    assert total(found) <= memory.USABLE * 80 * GIGA < total(found + multiple)
    assert memory.largest_batch(spec, devices, GIGA, "bfloat16") == 0


def test_the_report_of_an_estimate_agrees_with_itself(full_size):
    """A batch fits where it is at most the largest one, and no size is shown as zero."""
    spec = setup.make_spec(_with(full_size, remat="layers"))
    mesh = sharding.MeshConfig().create(jax.devices()[:1])
    for batch in (1, 64, 500):
        heading, *lines = report.estimated(spec, mesh, batch, "bfloat16")
        assert heading.startswith(f"batch {batch} on 1 device (data 1 × fsdp 1 × tensor 1)")
        assert not any(" 0.00 " in line for line in lines)
        for name in accelerators.TABLE:
            (line,) = (line for line in lines if line.split()[0] == name)
            match = re.search(r": (fits|does not fit); (?:largest batch (\d+)|no batch fits)", line)
            assert (match[1] == "fits") == (batch <= int(match[2] or 0)), line
    assert report.estimated(spec, mesh, 4, "bfloat16", "h100")[-1].split()[0] == "h100"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("cpu", ""),
    ],
)
def test_memory_is_what_a_device_reports_else_that_of_its_kind(kind, name):
    device = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: None)
    assert accelerators.find(kind) == accelerators.TABLE.get(name)
    assert accelerators.memory_of(device) == (accelerators.TABLE[name].memory if name else None)
    reports = types.SimpleNamespace(device_kind=kind, memory_stats=lambda: {"bytes_limit": 5})
    assert accelerators.memory_of(reports) == 5


@pytest.mark.parametrize(
    ("teacher", "written"),
    [
        (3_000_000_000, "3.02 GB (teacher 3.00, gradient 0.02)"),
        (300_000, "20.30 MB (teacher 0.30, gradient 20.00)"),
    ],
)
def test_an_estimate_is_written_in_one_unit_that_suits_its_total(teacher, written):
    found = memory.Estimate({"teacher": teacher, "ema": 0}, gradient=20_000_000, activations=0)
    assert str(found) == written
