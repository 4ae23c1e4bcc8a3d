"""An expert that reads the backbone's last state alone: its velocity, its cut and three losses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shallow_pi.distill import layer_map, losses, step, student
from shallow_pi.distill import spec as specs
from shallow_pi.models import gemma, layer_table, layers, pi0
from shallow_pi.training import config


def _reads_last(made, backbone, expert):
    first, second = layer_table.reads_last(backbone, expert)
    return dataclasses.replace(
        made, depth=backbone + expert, backbone_layers=first, expert_layers=second
    )


@pytest.fixture(scope="module")
def teacher(tiny_config, tiny_params):
    made = _reads_last(tiny_config(), 3, 2)
    return made, layer_table.zero_cut(made.layers, tiny_params(made))


def _spec(teacher, kept, student_model):
    return specs.Spec(
        student=student_model,
        optimizer=optax.sgd(0.1),
        schedule=optax.constant_schedule(0.1),
        losses=losses.Losses(),
        teacher=teacher,
        layer_map=layer_map.explicit(kept, 5),
    )


@pytest.mark.slow
def test_every_expert_layer_reads_the_state_behind_all_backbone_layers(teacher, tiny_observation):
    made, params = teacher
    observation = tiny_observation(made)
    x_t = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6)), jnp.float32)
    t = jnp.array([0.3, 0.9])
    found, _ = jax.jit(pi0.velocity, static_argnums=0)(made, params, observation, x_t, t)
    stack = layer_table.unstack(params["PaliGemma"]["llm"]["layers"], 5)
    model = pi0.Pi0(made)
    prefix, valid, *_ = model.apply({"params": params}, observation, method="embed_prefix")
    given = (observation.state, x_t[:, None], t[:, None])
    suffix, _ = model.apply({"params": params}, *given, method="embed_suffix")
    geometry = gemma.Geometry.create(valid, 8, suffix.shape[2], 5)
    for weights in stack[:3]:
        prefix, _, _ = gemma.prefix_layer(weights, prefix, geometry)
    for weights in stack[3:]:
        cached = gemma.prefix_keys_values(weights, prefix, geometry)
        suffix, _ = gemma.suffix_layer(weights, suffix, cached, geometry)
    normed, _ = gemma.norm(params["PaliGemma"]["llm"]["final_norm_1"], suffix, None)
    expected = layers.dense(params["action_out_proj"], normed[:, 0, -5:])
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.slow
def test_its_student_is_trained_by_three_losses(teacher, tiny_batch):
    made, params = teacher
    spec = _spec(made, (0, 2, 4), _reads_last(made, 2, 1))
    assert spec.attention_layers == (2, 4)  # The only pair with an expert.
    cut = jax.jit(lambda p: student.cut(made, p, spec.layer_map, spec.student))(params)
    run = jax.jit(step.distill_step, static_argnums=0)
    init = jax.jit(step.init_state, static_argnums=0)
    given = (jax.random.key(0), tiny_batch(made))
    state, metrics = run(spec, params, init(spec, cut), *given)
    for name in ("task_loss", "velocity_loss", "attention_loss"):
        assert float(metrics[name]) > 1e-4, name
    # Halves that the student lacks stay zero.
    moved = state.params["PaliGemma"]["llm"]["layers"]["attn"]
    assert float(jnp.abs(moved["q_einsum"]["w"][2]).max()) == 0.0
    assert float(jnp.abs(moved["q_einsum_1"]["w"][:2]).max()) == 0.0
    assert float(jnp.abs(moved["kv_einsum"]["w"][2]).max()) > 0.0

    whole = _spec(made, range(5), made)
    losses_of = jax.jit(lambda *given: step.distill_step(whole, *given)[1])
    metrics = losses_of(params, init(whole, params), *given)
    for name in ("velocity_loss", "attention_loss"):
        np.testing.assert_allclose(metrics[name], 0.0, atol=1e-6)


def test_a_student_of_other_halves_is_refused(teacher):
    made, _ = teacher
    for kept, student_model in (
        ((0, 2, 4), pi0.at_depth(made, 3)),
        ((0, 3, 4), _reads_last(made, 2, 1)),
    ):
        with pytest.raises(ValueError, match="must keep the same halves"):
            _spec(made, kept, student_model)


def test_offloading_layers_that_are_not_whole_is_refused(teacher):
    made, _ = teacher
    with pytest.raises(ValueError, match=r"--teacher.offload copies layers that are whole"):
        dataclasses.replace(_spec(made, range(5), made), offload_teacher=True)


def test_flags_name_the_layers_of_such_a_student(tiny_config):
    made = _reads_last(tiny_config(), 18, 18)
    chosen = config.StudentConfig(
        layers=(0, 9, 17, 18, 27, 35), backbone_layers=(0, 9, 17), expert_layers=(18, 27, 35)
    )
    assert chosen.cut(made) == _reads_last(made, 3, 3)
