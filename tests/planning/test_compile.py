"""The step compiled from shapes: what is promised of a layout, read from the program."""

import dataclasses

import jax
import pytest

from shallow_pi.models import pi0
from shallow_pi.parallel import shapes, sharding
from shallow_pi.planning import accelerators, compile, hlo, memory, report
from shallow_pi.training import setup

BATCH = 16


@pytest.fixture(scope="module")
def experiment(tiny_experiment, tmp_path_factory):
    return tiny_experiment(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def spec(experiment):
    return setup.make_spec(experiment)


@pytest.fixture(scope="module")
def programs(experiment):
    """By (data, fsdp, tensor)."""
    found = {}
    for layout in ((8, 1, 1), (1, 8, 1)):
        mesh = sharding.MeshConfig(*layout).create()
        _, found[layout] = compile.build(setup.make_spec(experiment, mesh), mesh, BATCH)
    return found


def _bytes(params, size):
    return size * sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_bytes_of_what_is_given_are_those_of_the_arrays(spec, programs):
    """Data-parallel devices hold everything whole, and an eighth of the batch."""
    given = programs[8, 1, 1].given
    student = pi0.abstract_params(spec.student)
    assert given["teacher"] == _bytes(pi0.abstract_params(spec.teacher), 2)
    assert given["student"] == given["ema"] == _bytes(student, 4)
    # Two moments, and the counts of the optimizer's parts.
    assert 0 <= given["moments"] - 2 * given["student"] < 100
    one_row = shapes.abstract_batch(spec.student, sharding.MeshConfig(8).create(), 8)
    assert given["batch"] == BATCH // 8 * memory.bytes_per_device(one_row)


@pytest.mark.slow
def test_splitting_parameters_takes_less_of_each_device(programs):
    whole, split = programs[8, 1, 1].given, programs[1, 8, 1].given
    for what in ("teacher", "student", "moments", "ema"):
        assert split[what] < 0.6 * whole[what]
    assert split["batch"] == whole["batch"]


@pytest.mark.slow
def test_data_parallel_steps_exchange_gradients_and_nothing_else(spec, programs):
    """One gradient's worth of bytes, metrics apart; rows of the batch stay where they are."""
    totals = hlo.totals(programs[8, 1, 1].collectives)
    assert {kind for kind, (count, _) in totals.items() if count} == {"all-reduce"}
    gradient = _bytes(pi0.abstract_params(spec.student), 4)
    assert 0.99 * gradient <= totals["all-reduce"][1] <= 1.05 * gradient


@pytest.mark.slow
def test_split_parameters_are_gathered_and_not_the_batch(spec, programs):
    """One gradient is exchanged; each model's layers are gathered once a pass, two the student's.

    A program that split activations by their width instead would exchange them in every layer.
    """
    totals = hlo.totals(programs[1, 8, 1].collectives)
    student = _bytes(pi0.abstract_params(spec.student), 4)
    teacher = _bytes(pi0.abstract_params(spec.teacher), 4)
    exchanged = totals["all-reduce"][1] + totals["reduce-scatter"][1]
    assert exchanged <= 1.05 * student
    assert totals["all-gather"][1] <= teacher + 2 * student


PROGRAM = compile.Program(
    devices=8,
    batch_size=16,
    given={"teacher": 3 * 10**9, "student": 2 * 10**6, "ema": 0},
    temporary=5 * 10**8,
    total=4 * 10**9,
    host=0,
    collectives=[
        hlo.Collective("all-reduce", 3, 100, "", group=8),
        hlo.Collective("all-gather", 2, 50, "", group=8),
    ],
)
ACCELERATOR = accelerators.Accelerator("made up", memory=5 * 10**9, flops=1000.0, links=20.0)


def test_a_forecast_is_work_and_traffic_over_the_stated_rates():
    """A sum over devices is scattered and gathered: twice its bytes.

    The result of a reduce-scatter is a fourth of what four devices scatter.
    """
    scattered = hlo.Collective("reduce-scatter", 1, 10, "", group=4)
    program = dataclasses.replace(PROGRAM, collectives=[*(PROGRAM.collectives or ()), scattered])
    computation, communication = compile.predict(program, 90.0, ACCELERATOR)
    assert computation == pytest.approx(90 / 1000 / compile.UTILIZATION)
    assert communication == pytest.approx((3 * 100 * 2 + 2 * 50 + 4 * 10) / 10)
    without_links = dataclasses.replace(ACCELERATOR, links=0.0)
    assert compile.predict(PROGRAM, 90.0, without_links)[1] is None
    unread = dataclasses.replace(PROGRAM, collectives=None)
    assert compile.predict(unread, 90.0, ACCELERATOR) == (computation, None)


@pytest.mark.parametrize(("room", "verdict"), [(5, "fits"), (4, "does not fit")])
def test_the_report_of_a_program_has_its_parts_verdict_and_forecast(room, verdict):
    """The runtime leaves 92 % of a device to the program."""
    mesh = sharding.MeshConfig(8).create()
    device = dataclasses.replace(ACCELERATOR, memory=room * 10**9)
    lines = report.planned(PROGRAM, mesh, 90.0, device)
    assert lines[0] == "batch 16 on 8 devices (data 8 × fsdp 1 × tensor 1); memory per device:"
    words = [line.split() for line in lines]
    assert ["teacher", "3.00", "GB"] in words
    assert ["student", "2.00", "MB"] in words
    assert ["total", "4.00", "GB"] in words
    assert [*verdict.split(), "in", f"{room}.00", "GB", "of", "memory"] in words
    assert ["all-reduce", "3", "times,", "0.30", "kB"] in words
    assert "0.20 s of computation" in lines[-1]
    assert "70.00 s of communication" in lines[-1]
    unread = dataclasses.replace(PROGRAM, collectives=None)
    assert any("communication: unknown" in x for x in report.planned(unread, mesh, 90.0, None))
    found = report.contents(PROGRAM, 90.0, device)
    assert found["collectives"]["all-reduce"] == {"times": 3, "bytes": 300}
    assert found["predicted_seconds"]["exchange"] == pytest.approx(70)


def test_a_batch_the_mesh_cannot_split_is_refused(spec):
    with pytest.raises(ValueError, match="batch size 12 is not divisible by the 8 devices"):
        compile.build(spec, sharding.MeshConfig(8).create(), 12)


@pytest.mark.parametrize("name", ["v9:1x1", "h100:many", "v5e"])
def test_an_unknown_topology_names_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"(?s)topology '{name}'.*v5e:4x4.*h100:8"):
        compile.topology(name)


def test_no_devices_or_two_kinds_are_an_error():
    with pytest.raises(ValueError, match="--devices must be 1 or more, got 0"):
        compile.devices(0)
    with pytest.raises(ValueError, match="--devices 4 and --topology v5e:4x4 both say the devices"):
        compile.devices(4, "v5e:4x4")
