"""Both steps are the training's own, on one state that goes from hand to hand."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from shallow_pi.distill import losses
from shallow_pi.parallel import sharding
from shallow_pi.planning import memory
from shallow_pi.speed import flops, latency, plots, step
from shallow_pi.training import setup

FREEZE = ("vision", "embedder")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def parts(tiny_experiment, tmp_path_factory):
    experiment = tiny_experiment(tmp_path_factory.mktemp("run"), draws=2)
    student = dataclasses.replace(experiment.student, freeze=FREEZE)
    experiment = dataclasses.replace(experiment, student=student)
    mesh = sharding.MeshConfig(8).create()
    spec = setup.make_spec(experiment, mesh)
    return spec, mesh


@pytest.fixture(scope="module")
def measured(parts):
    """A timing, the state before the first step, and what the latency's calls were."""
    spec, mesh = parts
    kept, first = {}, []
    with pytest.MonkeyPatch.context() as patch:
        real = latency.median_latency

        def median_latency(calls, **more):
            kept.update(calls)
            first.extend(calls["distillation"].args[2])
            return real(calls, **more)

        patch.setattr(latency, "median_latency", median_latency)
        timing = step.measure(
            spec, mesh, batch_size=8, teacher_dtype="float32", repeats=2, warmup=1
        )
    return timing, first[0], kept


def test_steps_of_both_kinds_take_turns_on_one_state_that_is_donated(measured):
    timing, given, calls = measured
    assert list(timing.median_ms) == list(calls) == ["distillation", "fine-tuning"]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.params)), "as in training"
    with_teacher, alone = calls["distillation"](), calls["fine-tuning"]()
    assert "velocity_loss" in with_teacher
    assert "velocity_loss" not in alone
    (state,) = calls["distillation"].args[2]
    assert int(state.step) == 3 * 2 + 2, "three turns were timed, and two steps asked for here"
    assert np.isfinite(alone["loss"])


def test_counts_and_rates_are_those_of_the_step(parts, measured):
    spec, _ = parts
    timing, _, _ = measured
    count = functools.partial(flops.training_flops, batch=8, draws=2, freeze=FREEZE)
    assert timing.flops["distillation"] == count(spec.student, spec.teacher)
    assert timing.flops["fine-tuning"] == count(spec.student, None)
    assert timing.tokens == spec.student.prefix_tokens + 2 * (1 + spec.student.action_horizon)
    known = dataclasses.replace(
        timing,
        device="H100",
        median_ms={"distillation": 160.0, "fine-tuning": 100.0},
        flops={"distillation": 64, "fine-tuning": 32},
    )
    assert known.ratio == 1.6
    assert known.samples_per_second("distillation") == 50.0
    assert known.tokens_per_second("distillation") == 50.0 * timing.tokens
    assert known.utilization("distillation", 100.0) == 64 / 0.16 / (8 * 100.0)
    assert dataclasses.replace(known, device="cpu").utilization("distillation", 100.0) == 4.0


def test_the_plan_of_fine_tuning_holds_the_frozen_parts_of_the_teacher_alone(measured):
    plan = measured[0].plan
    assert 0 < plan["fine-tuning"]["teacher"] < plan["distillation"]["teacher"]
    for parts in plan.values():
        assert parts["in all"] > sum(parts.values()) - parts["in all"] - parts["batch"]


def test_a_batch_is_full_and_split_over_the_mesh(parts):
    spec, mesh = parts
    batch = step.made_up_batch(spec.student, mesh, 16)
    assert all(mask.all() for mask in batch.observation.image_masks.values())
    assert batch.observation.tokenized_prompt_mask.all()
    assert 0 < batch.observation.tokenized_prompt.max() < spec.student.vocab_size
    for leaf in jax.tree.leaves(batch):
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 2


def test_a_batch_that_does_not_fit_says_what_to_change(parts, monkeypatch):
    spec, mesh = parts

    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(step, "_advance", full)
    with pytest.raises(memory.DoesNotFitError) as caught:
        step.measure(spec, mesh, batch_size=8, teacher_dtype="float32")
    for words in (
        "a batch of 8 does not fit into the memory of cpu",
        "the distillation step is planned to need 0.",
        "try --batch-size 4, --accumulation 2",
        "--student.freeze vision",
    ):
        assert words in str(caught.value)


def test_another_error_of_the_device_is_left_unchanged():
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"),
        memory.explained(8),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such kernel")


def test_without_a_teacher_there_is_nothing_to_compare(parts):
    spec, mesh = parts
    every = dataclasses.replace(spec.losses, reflow=1.0, vision=1.0)
    alone = step.fine_tuning(dataclasses.replace(spec, losses=every, freeze=()))
    assert alone.losses.weights == dict.fromkeys(losses.TERMS, 0.0) | {"task": 1.0}
    with pytest.raises(ValueError, match="is the fine-tuning step already; name a config with bo"):
        step.measure(alone, mesh, batch_size=8)


@pytest.mark.parametrize(
    ("device", "dtype", "rate"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("NVIDIA H100 80GB HBM3", "float32", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_a_rate_is_stated_for_a_device_kind_in_bfloat16(device, dtype, rate):
    assert step.stated_rate(device, dtype) == rate


def test_a_timing_becomes_a_plot(measured, tmp_path):
    timing, _, _ = measured
    plots.training_step(tmp_path / "step.png", timing)
    assert (tmp_path / "step.png").stat().st_size > 1000
