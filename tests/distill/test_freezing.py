"""Frozen parts: the teacher's own leaves, run once for both models, trained by nobody."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from shallow_pi.checkpoints import weights
from shallow_pi.distill import layer_map, losses, step, student
from shallow_pi.distill import spec as specs
from shallow_pi.models import layers, pi0
from shallow_pi.parallel import shapes, sharding

KEY = jax.random.key(5)
TASK = losses.Losses(velocity=0.0, attention=0.0)
FREEZE = ("vision", "embedder")


@pytest.fixture(scope="module")
def setting(tiny_config, tiny_params, tiny_batch):
    """A student with the teacher's tower and embedding, other layers, and plain SGD."""
    config = tiny_config(cameras=("base_0_rgb",))
    teacher = tiny_params(config)
    chosen = layer_map.explicit((0, 2), 3)
    spec = specs.Spec(
        student=pi0.at_depth(config, 2),
        optimizer=optax.sgd(0.1),
        schedule=optax.constant_schedule(0.1),
        losses=losses.Losses(task=1.0, velocity=0.5, attention=2.0, reflow=1.5),
        teacher=config,
        layer_map=chosen,
        ema_decay=0.5,
        execution=layers.Execution(remat="none"),
    )

    @jax.jit
    def start(teacher):
        trained, _ = student.split(student.cut(config, teacher, chosen), FREEZE)
        return student.join(jax.tree.map(lambda leaf: 1.1 * leaf, trained), teacher, FREEZE)

    return spec, teacher, start(teacher), tiny_batch(config)


_step = jax.jit(step.distill_step, static_argnums=0)
_init = jax.jit(step.init_state, static_argnums=0)


def _advance(spec, teacher, params, batch):
    return _step(spec, teacher, _init(spec, params), KEY, batch)


@pytest.fixture(scope="module")
def whole(setting):
    return _advance(*setting)


@pytest.fixture(scope="module")
def frozen(setting):
    spec, *rest = setting
    return _advance(dataclasses.replace(spec, freeze=FREEZE), *rest)


def _paths(tree):
    return set(weights.leaves(tree))


def test_a_tree_is_split_by_path_and_joined_again(setting):
    params = setting[2]
    for parts in ((), ("vision",), ("embedder",), FREEZE):
        trained, kept = student.split(params, parts)
        assert _paths(trained) | _paths(kept) == _paths(params)
        assert not _paths(trained) & _paths(kept)
        joined = student.join(trained, params, parts)
        jax.tree.map(np.testing.assert_array_equal, joined, params)
    _, kept = student.split(params, ("embedder",))
    assert _paths(kept) == {"PaliGemma/llm/embedder/input_embedding"}
    _, kept = student.split(params, ("vision",))
    assert {path.split("/")[1] for path in _paths(kept)} == {"img"}


def test_what_is_not_frozen_trains_as_if_everything_did(whole, frozen):
    """Same losses, and on the trained parts the same update (and average) bit for bit or nearly."""
    for name in ("loss", *(f"{term}_loss" for term in losses.TERMS[:4])):
        np.testing.assert_allclose(frozen[1][name], whole[1][name], rtol=1e-5)
    for tree, other in (
        (frozen[0].params, whole[0].params),
        (frozen[0].ema_params, whole[0].ema_params),
    ):
        expected = weights.leaves(other)
        for path, leaf in weights.leaves(tree).items():
            np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-5, err_msg=path)


def test_frozen_parts_are_in_no_state(setting, frozen):
    whole_paths = _paths(setting[1])
    held = {path for path in whole_paths if "/img/" in path or "embedder" in path}
    for tree in (frozen[0].params, frozen[0].ema_params):
        assert _paths(tree) == whole_paths - held
    assert "grad_norm/vision" not in frozen[1]
    assert "grad_norm/embedder" not in frozen[1]


def _tower_passes(spec, teacher, params, batch):
    """Number of times the batch's 8 patches of 12 × 12 × 3 numbers enter an image tower."""
    state = jax.eval_shape(functools.partial(step.init_state, spec), params)
    traced = jax.make_jaxpr(functools.partial(step.distill_step, spec))(teacher, state, KEY, batch)
    return str(traced).count(":f32[8,432] = reshape[")


def test_a_frozen_tower_runs_once_for_both_models(setting):
    spec, *rest = setting
    assert _tower_passes(spec, *rest) == 2  # The teacher's and the student's.
    assert _tower_passes(dataclasses.replace(spec, freeze=("embedder",)), *rest) == 2
    assert _tower_passes(dataclasses.replace(spec, freeze=("vision",)), *rest) == 1


def test_without_the_teachers_losses_its_frozen_parts_are_enough(setting):
    spec, teacher, params, batch = setting
    spec = dataclasses.replace(spec, losses=TASK, freeze=FREEZE)
    held = shapes.held_teacher(spec, teacher)
    assert _paths(held) == _paths(student.split(teacher, FREEZE)[1])
    state, metrics = _advance(spec, held, params, batch)
    expected, same = _advance(spec, teacher, params, batch)
    jax.tree.map(np.testing.assert_array_equal, (state, metrics), (expected, same))
    assert shapes.held_teacher(dataclasses.replace(spec, freeze=()), teacher) is None


def test_an_offloaded_teacher_makes_the_same_step(setting, frozen, offloads):
    """Its layers lie in the host's memory, split over devices, and nothing else does."""
    if not offloads:
        pytest.skip("this JAX's CPU devices have no memory of their host's beside their own")
    spec, teacher, params, batch = setting
    spec = dataclasses.replace(spec, freeze=FREEZE, offload_teacher=True)
    mesh = sharding.MeshConfig(fsdp=2).create(jax.devices()[:2])
    placed = jax.device_put(teacher, sharding.param_sharding(mesh, teacher))
    held = shapes.held_teacher(spec, placed)
    for path, leaf in weights.leaves(held).items():
        assert (leaf.sharding.memory_kind == "pinned_host") == ("llm/layers" in path), path
    place = functools.partial(jax.device_put, device=sharding.replicated(mesh))
    state, metrics = _step(spec, held, place(_init(spec, params)), place(KEY), place(batch))
    np.testing.assert_allclose(metrics["loss"], frozen[1]["loss"], rtol=1e-5)
    expected = weights.leaves(frozen[0].params)
    for path, leaf in weights.leaves(state.params).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("what", ["arrays", "shapes"])
def test_offloading_where_devices_cannot_is_refused(setting, what, monkeypatch):
    monkeypatch.setattr(shapes, "HOST_MEMORY", "memory_of_nobody")
    _, teacher, _, _ = setting
    mesh = sharding.MeshConfig(fsdp=2).create(jax.devices()[:2])
    placed = jax.device_put(teacher, sharding.param_sharding(mesh, teacher))
    if what == "shapes":
        placed = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            placed,
        )
    with pytest.raises(ValueError, match=r"--teacher\.offload needs .* leave it out"):
        shapes.offload(placed)
