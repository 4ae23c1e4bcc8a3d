"""Counted operations agree with the compiler's count and with the published sizes."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from shallow_pi.distill import losses
from shallow_pi.inference import forward, prepare, sampler, tuning
from shallow_pi.models import batch as batches
from shallow_pi.models import gemma, pi0, siglip
from shallow_pi.models import observation as observations
from shallow_pi.speed import flops
from shallow_pi.training import command_line, setup


def _config(pi05):
    """Small, but matrix products dominate, as they do at full size."""
    sizes = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 64}
    return pi0.Pi0Config(
        pi05=pi05,
        depth=3,
        backbone=gemma.GemmaConfig(width=256, mlp_dim=1024, **sizes),
        expert=gemma.GemmaConfig(width=128, mlp_dim=512, **sizes),
        image=siglip.SiglipConfig(width=128, depth=1, mlp_dim=512, num_heads=4, patch_size=14),
        image_size=56,
        vocab_size=64,
        cameras=("base_0_rgb", "left_wrist_0_rgb"),
        action_horizon=16,
        max_token_len=32,
        dtype="float32",
    )


def _compiled(function, *arguments):
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


UNEVEN = {
    "backbone_layers": ("whole", "whole", "keys_values"),
    "expert_layers": ("whole", "absent", "whole"),
}


@pytest.mark.parametrize(
    ("pi05", "once", "cut"),
    [
        (False, False, {}),
        (True, False, {}),
        (False, True, {}),
        (True, True, {}),
        (False, True, UNEVEN),
        (True, True, {"backbone_layers": ("keys_values", "whole", "whole"), "pooled_tokens": 4}),
        (False, True, {"scored_tokens": 4}),
    ],
    ids=["pi0", "pi05", "pi0, once", "pi05, once", "uneven", "uneven, pooled", "scored"],
)
def test_operations_are_those_the_compiler_counts(pi05, once, cut):
    """Unrolled, since the compiler counts the body of a loop once."""
    config = dataclasses.replace(_config(pi05), **cut)
    options = dataclasses.replace(tuning.ALL_ON, time_tables=once, state_once=once)
    params = pi0.abstract_params(config)
    times = sampler.integration_times(2)
    prepared = jax.eval_shape(lambda p: prepare.prepare(config, p, times, options), params)
    on_host = batches.spec(config, 1).observation
    observation = jax.eval_shape(observations.Observation.as_float, on_host)
    noise = jax.ShapeDtypeStruct((1, 16, 32), np.float32)
    sample = functools.partial(sampler.sample_prepared, config, num_steps=2, options=options)
    counted = flops.inference_flops(config, num_steps=2, options=options)
    assert _compiled(sample, prepared, observation, noise) == pytest.approx(counted.total, rel=0.05)

    prefill = functools.partial(forward.prefill, config)
    without_state = dataclasses.replace(options, state_once=False)
    expected = flops.inference_flops(config, options=without_state)
    found = _compiled(prefill, prepared, observation)
    assert found == pytest.approx(expected.vision + expected.prefix, rel=0.05)


@pytest.mark.parametrize(("depth", "teraflop"), [(18, 3.41), (9, 1.93), (6, 1.43), (4, 1.10)])
def test_operations_of_pi05_are_the_published_ones(depth, teraflop):
    """Two cameras, 200 prompt tokens, horizon 10, no optimization."""
    config = pi0.Pi0Config(
        pi05=True,
        depth=depth,
        cameras=pi0.CAMERAS[:2],
        max_token_len=200,
        action_horizon=10,
    )
    counted = flops.inference_flops(config, options=tuning.ALL_OFF)
    assert counted.total / 1e12 == pytest.approx(teraflop, rel=0.02)


def test_each_cut_saves_its_own_part():
    whole = pi0.at_depth(pi0.Pi0Config(), 6)
    kept = ("whole", *("keys_values",) * 3, "whole", "keys_values")
    backbone = dataclasses.replace(whole, backbone_layers=kept)
    expert = dataclasses.replace(whole, expert_layers=(*("absent",) * 4, "whole", "whole"))
    tower = dataclasses.replace(whole, image=dataclasses.replace(whole.image, depth=9))
    count = functools.partial(flops.inference_flops, options=tuning.ALL_ON)
    size = functools.partial(flops.weight_bytes, options=tuning.ALL_ON)
    for of in (count, size):
        # Of five backbone layers that are read, and the keys and values of one, two are left.
        assert 0.40 < of(backbone).prefix / of(whole).prefix < 0.44
        assert of(backbone).vision == of(whole).vision
        assert of(backbone).step == of(whole).step
        assert of(expert).step / of(whole).step == pytest.approx(1 / 3, abs=0.015)
        assert of(tower).vision / of(whole).vision == pytest.approx(1 / 3, abs=0.015)


def test_weights_are_those_of_the_layers():
    config = pi0.Pi0Config()
    counted = flops.weight_bytes(config)
    assert counted.prefix / 2 / 18 == pytest.approx(110.1e6, rel=0.01)
    assert counted.step / 2 / 18 == pytest.approx(17.3e6, rel=0.01)
    assert counted.vision / 2 == pytest.approx(415e6, rel=0.01)
    options = dataclasses.replace(tuning.ALL_OFF, quantize="w8", quantized=("vision", "expert"))
    rounded = flops.weight_bytes(config, options=options)
    assert rounded.step == counted.step / 2
    assert rounded.prefix == counted.prefix
    # The patches and the head keep their dtype.
    assert rounded.vision - counted.vision / 2 == 588 * 1152 + 1152 * 2048


def test_a_training_step_is_the_teachers_pass_and_three_of_the_students(tiny_config):
    """The prefix does not depend on the draws; they cost one pass of the suffix each."""
    student, teacher = tiny_config(depth=2), tiny_config(depth=5)
    alone = flops.training_flops(student, None, batch=1)
    both = flops.training_flops(student, teacher, batch=1)
    assert both - alone == flops.training_flops(teacher, None, batch=1) / 3
    assert flops.training_flops(student, teacher, batch=8) == 8 * both
    more = flops.training_flops(student, None, batch=1, draws=3) - alone
    step = flops.inference_flops(student, num_steps=1, options=tuning.ALL_OFF).step
    assert more == 3 * 2 * step


def test_reflow_costs_ten_suffixes_of_the_teacher_and_a_draw_of_the_student(tiny_config):
    student, teacher = tiny_config(depth=2), tiny_config(depth=5)
    plain, with_ends = (
        flops.training_flops(student, teacher, batch=3, draws=2, reflow=on) for on in (False, True)
    )
    own, others = (
        flops.inference_flops(model, num_steps=1, options=tuning.ALL_OFF).step
        for model in (student, teacher)
    )
    assert with_ends - plain == 3 * 2 * (10 * others + 3 * own)


@pytest.mark.parametrize("config", ["pi0_aloha_l6", "pi05_libero_l6"])
def test_the_teachers_ends_cost_less_than_15_percent_of_a_step_at_full_size(config):
    spec = setup.make_spec(command_line.load(command_line.configs(), config))
    spec = dataclasses.replace(spec, losses=losses.Losses(reflow=1.0))
    teacher = spec.teacher
    ends = 10 * flops.inference_flops(teacher, num_steps=1, options=tuning.ALL_OFF).step
    assert 0.005 < ends / flops.of_step(spec, batch=1) < 0.15


def test_a_frozen_tower_counts_once_for_both_models(tiny_config):
    """Forward for the teacher, forward and twice backward for the student, are four passes."""
    student, teacher = tiny_config(depth=2), tiny_config(depth=5)
    tower = flops.inference_flops(student, options=tuning.ALL_ON).vision
    trained, frozen = (
        flops.training_flops(student, teacher, batch=1, freeze=freeze)
        for freeze in ((), ("vision",))
    )
    assert trained - frozen == 3 * tower
