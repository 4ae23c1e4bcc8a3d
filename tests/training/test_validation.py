"""Held-out errors: their definition, their units, and that they are the same everywhere."""

import dataclasses
import pathlib

import exact_stats
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.data import sources
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import normalize, pipelines, transforms
from shallow_pi.data.robots import robot as robots
from shallow_pi.distill import layer_map, losses, step, student
from shallow_pi.distill import spec as specs
from shallow_pi.models import observation, pi0
from shallow_pi.parallel import sharding
from shallow_pi.training import config, optimizer, validation

ONE, EIGHT = sharding.MeshConfig(), sharding.MeshConfig(data=2, fsdp=4)


def _mesh(config, devices=8):
    return config.create(jax.devices()[:devices])


def _held_out(actions, mask, state):
    return validation.HeldOut((), actions, mask, state)


def _assets(model, robot, kind_is_quantile=False):
    generator = np.random.default_rng(3)

    def stats(dim):
        return exact_stats.of(generator.normal(0.3, 0.5, (200, dim)))

    return policy_assets.Assets(
        model=dataclasses.replace(model, pi05=kind_is_quantile),
        robot=robot,
        tokenizer=pathlib.Path("none"),
        stats={"state": stats(robot.state_dim), "actions": stats(robot.action_dim)},
        asset_id=robot.name,
    )


@pytest.mark.parametrize("quantile", [False, True])
@pytest.mark.parametrize("name", ["turntable", "aloha", "libero", "droid_position"])
def test_model_actions_go_back_to_what_the_robot_recorded(tiny_config, name, quantile):
    """Through units, differences from the state, normalization and padding."""
    robot = robots.find(name)
    assets = _assets(tiny_config(action_dim=16), robot, quantile)
    generator = np.random.default_rng(0)
    state = generator.uniform(0.1, 0.9, (3, robot.state_dim)).astype(np.float32)
    actions = generator.uniform(0.1, 0.9, (3, 5, robot.action_dim)).astype(np.float32)
    to_model = transforms.Composed(
        (
            pipelines.ToModel(robot),
            transforms.Normalize(assets.stats, assets.kind),
            transforms.PadDimensions(16),
        )
    )
    rows = [to_model({"state": s, "actions": a}) for s, a in zip(state, actions, strict=True)]
    given = (np.stack([row[key] for row in rows]) for key in ("actions", "state"))
    np.testing.assert_allclose(validation.to_robot(assets, *given), actions, atol=2e-5)


def test_errors_are_means_over_actions_that_exist(tiny_config):
    """Two samples of three actions; the last of the second is past its episode's end."""
    robot = dataclasses.replace(
        robots.UR5, delta=(), groups=(robots.Group("a", 2), robots.Group("b", 5, "rad"))
    )
    assets = _assets(tiny_config(action_dim=8), robot)
    unit = normalize.NormStats(np.zeros(7), np.ones(7), np.zeros(7), np.ones(7))
    scaled = dataclasses.replace(unit, std=np.array([1, 1, 10, 10, 10, 10, 10]))
    assets = dataclasses.replace(assets, stats={"state": unit, "actions": scaled})
    mask = np.array([[True, True, True], [True, True, False]])
    zero = np.zeros((2, 3, 8), np.float32)
    held_out = _held_out(zero, mask, np.zeros((2, 8), np.float32))
    off = zero.copy()
    off[0, 0, :7] = 1
    off[1, 0, 0] = -0.5
    off[1, 2], off[..., 7] = 100, 100
    found = validation.errors("e", off, zero, held_out, assets)
    assert found == pytest.approx({"e": 7.5 / 35, "e/a": 2.5 / 10, "e/b": 50 / 25}, rel=1e-4)
    assert validation.errors("e", zero, zero, held_out, assets)["e/b"] == 0
    named = dataclasses.replace(assets, names={"actions": ("x", "y/z", *"stuvw")})
    joints = validation.errors("e", off, zero, held_out, named)
    expected = {"e/a/x": 1.5 / 5, "e/a/y_z": 1 / 5} | {f"e/b/{name}": 10 / 5 for name in "stuvw"}
    assert joints == pytest.approx(found | expected, rel=1e-4)
    whole = validation.errors("e", off, zero, held_out, None)
    assert whole == pytest.approx({"e": (7.5 + 5 * 100) / 40})


def _source(model, length=10, kind=sources.SyntheticSource):
    return kind(model, seed=1, length=length)


def test_samples_and_noise_do_not_depend_on_the_mesh(tiny_config):
    source = _source(tiny_config())
    one = validation.read(source, 13, 8, _mesh(ONE, devices=1), seed=5)
    eight = validation.read(source, 13, 64, _mesh(EIGHT), seed=5)
    assert [noise.shape[0] for _, noise in one.batches] == [7] * 2, "not 8 and 5 of 8"
    assert [noise.shape[0] for _, noise in eight.batches] == [16]
    for held in (one, eight):
        exists = held.action_mask.any(axis=1)
        np.testing.assert_array_equal(exists, np.arange(len(exists)) < 13)
    for name in ("actions", "action_mask", "state"):
        np.testing.assert_array_equal(*(getattr(held, name)[:13] for held in (one, eight)))
    noise = [np.concatenate([n for _, n in held.batches])[:13] for held in (one, eight)]
    np.testing.assert_array_equal(*noise)
    assert len(np.unique(noise[0][:, 0, 0])) == 13, "also where a sample is there twice"
    expected = [source[place * 10 // 13].observation.state for place in range(13)]
    np.testing.assert_array_equal(one.state[:13], expected)


def _spec(model, teacher=None, **changes):
    schedule = optimizer.CosineSchedule(warmup_steps=1, peak_lr=1e-3, decay_steps=9).create()
    weights = losses.Losses() if teacher else losses.Losses(velocity=0.0, attention=0.0)
    return specs.Spec(
        student=model,
        optimizer=optimizer.AdamW().create(schedule),
        schedule=schedule,
        losses=weights,
        teacher=teacher,
        layer_map=layer_map.uniform(model.depth, teacher.depth) if teacher else None,
        **changes,
    )


def _created(spec, teacher_params, mesh, kind=sources.SyntheticSource, batch_size=8, **changes):
    chosen = config.ValidationConfig(**({"samples": 8, "num_steps": 2} | changes))
    return validation.create(
        chosen,
        _source(spec.student, kind=kind),
        None,
        spec,
        teacher_params,
        mesh=mesh,
        batch_size=batch_size,
        seed=0,
    )


@pytest.fixture(scope="module")
def pair(tiny_config, tiny_params):
    """A teacher of three layers, its student of two, and the measurement on one device."""
    teacher = tiny_config()
    spec = _spec(pi0.at_depth(teacher, 2), teacher)
    params = tiny_params(teacher)
    cut = jax.jit(student.cut, static_argnums=(0, 2))(teacher, params, spec.layer_map)
    state = jax.jit(step.init_state, static_argnums=0)(spec, cut)
    found = _created(spec, params, _mesh(ONE, 1)).measure(params, state)
    return spec, params, state, found


@pytest.mark.slow
def test_a_student_for_8_bits_is_measured_with_rounded_weights(pair):
    spec, params, state, found = pair
    chosen = dataclasses.replace(spec, quantize="fp8")
    measured = _created(chosen, params, _mesh(ONE, 1)).measure(params, state)
    rounded = dataclasses.replace(state, params=step.rounded(chosen, state.params))
    expected = _created(spec, params, _mesh(ONE, 1)).measure(params, rounded)
    for name, value in expected.items():
        # The attention loss is 1e-4: its rounding is not relative to it.
        assert measured[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    assert measured["validation/error_to_teacher"] != pytest.approx(
        found["validation/error_to_teacher"], rel=1e-4
    )


def test_all_errors_and_losses_are_measured(pair):
    _, _, _, found = pair
    assert list(found) == [
        "validation/error_to_data",
        "validation/error_to_teacher",
        "validation/teacher_error_to_data",
        "validation/attention_loss",
        "validation/task_loss",
        "validation/velocity_loss",
    ]
    zero = [name for name, value in found.items() if value <= 0]
    assert zero == ["validation/attention_loss"], "the first layer's, which is the teacher's own"


def test_a_sharded_measurement_is_the_same(pair):
    spec, params, state, expected = pair
    mesh = _mesh(EIGHT)
    params, state = (
        jax.device_put(tree, sharding.param_sharding(mesh, tree)) for tree in (params, state)
    )
    found = _created(spec, params, mesh).measure(params, state)
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_samples_that_do_not_fill_the_devices_are_measured_alone(pair):
    """Five on one device and on eight, by every loss that is a mean over observations."""
    spec, params, state, _ = pair
    over_tokens = dataclasses.replace(spec.losses, vision=1.0, attention_queries="all")
    spec = dataclasses.replace(spec, losses=over_tokens)
    moved = jax.tree.map(lambda leaf: 1.5 * leaf, state.params)
    state = dataclasses.replace(state, params=moved)
    expected = _created(spec, params, _mesh(ONE, 1), samples=5).measure(params, state)
    assert min(expected[f"validation/{term}_loss"] for term in ("vision", "attention")) > 1e-4
    mesh = _mesh(EIGHT)
    params, state = (
        jax.device_put(tree, sharding.param_sharding(mesh, tree)) for tree in (params, state)
    )
    found = _created(spec, params, mesh, samples=5).measure(params, state)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_a_student_that_is_its_teacher_has_no_error_to_it(tiny_config, tiny_params):
    model = tiny_config()
    spec, params = _spec(model, model), tiny_params(model)
    found = _created(spec, params, _mesh(ONE, 1)).measure(params, step.init_state(spec, params))
    assert found[validation.TO_TEACHER] == pytest.approx(0, abs=1e-6)
    assert found[validation.TO_DATA] == pytest.approx(found[validation.TEACHER_TO_DATA])
    assert found["validation/velocity_loss"] == pytest.approx(0, abs=1e-6)


def test_the_average_is_measured_where_it_is_what_is_saved(pair):
    """Whatever step the state is at."""
    spec, params, state, expected = pair
    averaging = dataclasses.replace(spec, ema_decay=0.9, augmentation=observation.Augmentation())
    other = jax.tree.map(lambda leaf: leaf + 1, jax.device_get(state.params))
    later = dataclasses.replace(state, step=state.step + 7, params=other, ema_params=state.params)
    found = _created(averaging, params, _mesh(ONE, 1)).measure(params, later)
    assert found == pytest.approx(expected, rel=1e-5)


class _Ending(sources.SyntheticSource):
    """The later a sample, the fewer of its actions exist."""

    def __getitem__(self, i):
        sample = super().__getitem__(i)
        return sample.replace(action_mask=np.arange(len(sample.actions)) < max(1, 5 - i))


def test_held_out_losses_do_not_depend_on_the_size_of_a_batch(pair):
    """The actions that exist are 5, 4, 3, 2 in one batch of four and 1 a sample in the other."""
    spec, params, state, _ = pair
    masking = dataclasses.replace(spec.losses, mask_padded_actions=True)
    spec = dataclasses.replace(spec, losses=masking)
    whole, halves = (
        _created(spec, params, _mesh(ONE, 1), kind=_Ending, batch_size=size) for size in (8, 4)
    )
    expected = whole.measure(params, state)
    assert len(halves.held_out.batches) == 2
    assert halves.measure(params, state) == pytest.approx(expected, rel=1e-5, abs=1e-8)
    (batch, _), _ = halves.held_out.batches
    first, second = (halves.losses(params, state, batch, jnp.int32(n)) for n in range(2))
    assert float(first["task_loss"]) != pytest.approx(float(second["task_loss"]), rel=1e-3), (
        "every sample has noise and a time of its own"
    )


@pytest.mark.slow
def test_held_out_losses_cost_no_update(pair):
    """The backward pass is twice the forward pass; nobody reads it, so nobody computes it."""
    spec, params, state, _ = pair
    (batch, _), *_ = _created(spec, params, _mesh(ONE, 1)).held_out.batches
    key, counts = jax.random.key(0), step.Counts(jnp.float32(40), jnp.float32(8))

    def operations(function, *arguments):
        compiled = jax.jit(function, static_argnums=0).lower(spec, *arguments).compile()
        cost = compiled.cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    measured = operations(validation.losses, key, counts, params, state, batch, jnp.int32(0))
    assert measured < 0.6 * operations(step.distill_step, params, state, key, batch)


def test_without_held_out_data_or_interval_nothing_is_measured(tiny_config):
    spec = _spec(tiny_config())
    assert _created(spec, None, _mesh(ONE, 1), interval=0) is None
    more = {"mesh": _mesh(ONE, 1), "batch_size": 8, "seed": 0}
    assert validation.create(config.ValidationConfig(), None, None, spec, None, **more) is None


def test_without_a_teacher_there_is_no_error_to_it(tiny_config):
    spec = _spec(tiny_config())
    found = _created(spec, None, _mesh(ONE, 1))
    assert found.criterion == validation.TO_DATA
    assert found.teacher_actions is None


def test_a_measurement_is_due_at_every_interval_and_at_the_end(tiny_config):
    found = _created(_spec(tiny_config()), None, _mesh(ONE, 1), interval=3)
    assert [n for n in range(1, 9) if found.is_due(n, 8)] == [3, 6, 8]
