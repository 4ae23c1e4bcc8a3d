"""The reflow loss: the teacher's end points, the straight line to them, and who learns from it."""

import dataclasses
import functools

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.distill import flow, layer_map, losses, step
from shallow_pi.inference import sampler, tuning
from shallow_pi.models import cached, layer_table, pi0
from shallow_pi.models.layers import Execution

KEY = jax.random.key(5)
# Scanned, which compiles quickest.
_sample = jax.jit(
    functools.partial(sampler.sample_actions, num_steps=10, options=tuning.SCANNED),
    static_argnums=0,
)
_step = jax.jit(step.distill_step, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _ends(config, params, observation, noise):
    """The teacher's end points as the step makes them: a cache of the joint pass, ten steps."""
    found = pi0.outputs(config, params, observation, noise, jnp.ones(noise.shape[:2]), cache=True)
    own = cached.suffix_params(params, Execution())

    def velocity(x_t, t):
        return cached.velocity(config, own, found.cache, x_t, t)

    times = sampler.integration_times(10)
    return flow.integrate(velocity, noise, times), found.velocity, velocity(noise, jnp.ones((2, 3)))


@pytest.fixture(scope="module")
def reflowing(setting):
    """All four losses, two draws, padded actions left out, two deployed steps."""
    spec, teacher, state, batch = setting
    mask = np.random.default_rng(0).random((8, 5)) < 0.5
    spec = dataclasses.replace(
        spec,
        losses=losses.Losses(1.0, 0.5, 2.0, reflow=1.5, mask_padded_actions=True),
        draws=2,
        num_steps=2,
    )
    return spec, teacher, state, batch.replace(action_mask=mask)


@pytest.fixture(scope="module")
def result(reflowing):
    spec, teacher, state, batch = reflowing
    return _step(spec, teacher, state, KEY, batch)


def test_a_step_is_that_of_float64(reflowing, result):
    """Of the line to the teacher's end points, over the actions that exist."""
    spec, teacher, state, batch = reflowing
    inputs = jax.jit(step.draw_inputs, static_argnums=0)(spec, jax.random.fold_in(KEY, 0), batch)
    gradient = jax.tree.map(lambda a, b: 10 * (a - b), state.params, result[0].params)
    float64.check(spec, teacher, state.params, inputs, result[1], gradient)


def test_it_is_in_the_loss_by_its_weight_and_changes_no_other(reflowing, result):
    spec, teacher, state, batch = reflowing
    metrics = result[1]
    parts = [float(metrics[f"{name}_loss"]) for name in losses.TERMS[:4]]
    assert min(parts) > 1e-3
    np.testing.assert_allclose(metrics["loss"], np.dot([1.0, 0.5, 2.0, 1.5], parts), rtol=1e-5)
    without = dataclasses.replace(spec, losses=dataclasses.replace(spec.losses, reflow=0.0))

    @jax.jit
    def forward(teacher, state):
        found = step.distill_step(without, teacher, state, KEY, batch)[1]
        return {name: found[name] for name in found if name.endswith("_loss")}

    plain = forward(teacher, state)
    assert "reflow_loss" not in plain
    for name in losses.TERMS[:3]:
        np.testing.assert_allclose(
            plain[f"{name}_loss"], metrics[f"{name}_loss"], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
def test_end_points_are_the_samplers(pi05, tiny_config, tiny_params, tiny_observation):
    """With an absent camera and padded prompts; over the cache as in the joint pass.

    The π0 has an expert that reads the last state.
    """
    backbone, expert = ((), ()) if pi05 else layer_table.reads_last(1, 2)
    config = tiny_config(pi05=pi05, backbone_layers=backbone, expert_layers=expert)
    params, observation = tiny_params(config), tiny_observation(config)
    noise = jax.random.normal(KEY, (2, 3, config.action_horizon, config.action_dim))
    ends, joint, over_cache = _ends(config, params, observation, noise)
    np.testing.assert_allclose(over_cache, joint, atol=1e-5)
    for r in range(3):
        expected = _sample(config, params, observation, noise[:, r])
        np.testing.assert_allclose(ends[:, r], expected, atol=1e-5)
    assert np.abs(ends - noise).max() > 0.1


def test_a_student_that_is_a_teacher_with_a_straight_flow_has_no_loss(reflowing):
    """Its velocity is one vector everywhere, so that every path is straight."""
    spec, teacher, _, batch = reflowing
    out = teacher["action_out_proj"]
    straight = {**teacher, "action_out_proj": {**out, "kernel": 0 * out["kernel"]}}
    same = dataclasses.replace(spec, student=spec.teacher, layer_map=layer_map.uniform(3, 3))
    losses_of = jax.jit(lambda *given: step.distill_step(same, *given)[1]["reflow_loss"])
    bent = losses_of(teacher, step.init_state(same, teacher), KEY, batch)
    assert bent > 1e-4
    found = losses_of(straight, step.init_state(same, straight), KEY, batch)
    np.testing.assert_allclose(found, 0.0, atol=1e-10)


@pytest.fixture(scope="module")
def alone(reflowing):
    """A step of the reflow loss alone, its spec first."""
    spec, teacher, state, batch = reflowing
    only = losses.Losses(0.0, 0.0, 0.0, reflow=1.5, mask_padded_actions=True)
    spec = dataclasses.replace(spec, losses=only)
    return spec, *_step(spec, teacher, state, KEY, batch)


def test_gradients_agree_with_finite_differences_and_none_reaches_the_teacher(reflowing, alone):
    """Along the gradient, which SGD's update shows, and along a random direction."""
    _, teacher, state, batch = reflowing
    spec, moved, _ = alone
    params = jax.tree.map(np.asarray, state.params)
    gradient = jax.tree.map(lambda x, y: (x - np.asarray(y)) / 0.1, params, moved.params)
    generator = np.random.default_rng(1)
    for direction in (gradient, jax.tree.map(lambda x: generator.normal(size=x.shape), params)):
        length = np.sqrt(sum(np.square(x).sum() for x in jax.tree.leaves(direction)))
        found = []
        for by in (5e-3 / length, -5e-3 / length):
            near = jax.tree.map(lambda x, d, by=by: np.float32(x + by * d), params, direction)
            nearby = dataclasses.replace(state, params=near)
            found.append(float(_step(spec, teacher, nearby, KEY, batch)[1]["loss"]))
        products = jax.tree.map(lambda x, d: (x * d).sum(), gradient, direction)
        expected = sum(jax.tree.leaves(products)) / length
        np.testing.assert_allclose((found[0] - found[1]) / 1e-2, expected, rtol=2e-2)

    @jax.jit
    @jax.grad
    def of_teacher(teacher):
        return step.distill_step(spec, teacher, state, KEY, batch)[1]["loss"]

    for path, leaf in weights.leaves(of_teacher(teacher)).items():
        np.testing.assert_array_equal(leaf, 0.0, path)


def test_accumulated_microbatches_make_the_step_of_the_whole_batch(reflowing, result):
    spec, teacher, state, batch = reflowing
    cut = dataclasses.replace(spec, accumulation=4)
    found, metrics = _step(cut, teacher, state, KEY, batch)
    np.testing.assert_allclose(metrics["reflow_loss"], result[1]["reflow_loss"], rtol=1e-5)
    expected = weights.leaves(result[0].params)
    for path, leaf in weights.leaves(found.params).items():
        np.testing.assert_allclose(leaf, expected[path], atol=1e-5, err_msg=path)


def test_its_gradient_norm_is_named(reflowing, alone):
    spec, _, metrics = alone
    _, *given, batch = reflowing
    norms = jax.jit(step.loss_gradient_norms, static_argnums=0)(spec, *given, KEY, batch)
    assert set(norms) == {"grad_norm_of/reflow_loss"}
    np.testing.assert_allclose(norms["grad_norm_of/reflow_loss"], metrics["grad_norm"], rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_times_are_uniform_but_for_the_share_of_the_deployed_ones(share):
    deployed = sampler.integration_times(2)
    t = np.asarray(flow.sample_line_time(KEY, (4000,), deployed, share))
    among = np.isin(t, deployed)
    np.testing.assert_allclose(among.mean(), share, atol=0.03)
    assert set(t[among]) == (set(deployed) if share else set())
    if share < 1:
        np.testing.assert_allclose(
            np.quantile(t[~among], [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.04
        )
        assert t.min() > 0
