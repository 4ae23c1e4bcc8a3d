"""Every kind of layout of eight devices makes the step of one, and exchanges what it has to.

Each layout's step is compiled once: it is run, and its program is read.
"""

import contextlib
import functools
import math
import os
import tempfile

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from shallow_pi.checkpoints import weights
from shallow_pi.distill import layer_map, losses, step, student
from shallow_pi.distill import spec as specs
from shallow_pi.models import gemma, layers, pi0, siglip
from shallow_pi.parallel import sharding
from shallow_pi.planning import hlo
from shallow_pi.training import optimizer

# (data, fsdp, tensor)
LAYOUTS = [
    (8 // (fsdp * tensor), fsdp, tensor)
    for fsdp in (1, 2, 4, 8)
    for tensor in (1, 2, 4, 8)
    if fsdp * tensor <= 8
]
# Whose step is cut into two microbatches; the result is the same.
ACCUMULATED = (2, 2, 2)
# Every layout is a program to compile: these split by all three axes, by one, by two unevenly.
FAST = (ACCUMULATED,)
SLOW = ((8, 1, 1), (1, 8, 1), (1, 1, 8), (1, 4, 2))
every_kind = pytest.mark.parametrize(
    "layout", [*FAST, *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)], ids=str
)
STEPS, BATCH, TEACHER, STUDENT = 3, 16, 3, 2
WIDTH, EXPERT, IMAGE, HEAD, HORIZON, PROMPT = 40, 24, 16, 4, 5, 6
IMAGE_TOKENS = 4  # Tokens of the one camera.
PREFIX, SUFFIX = IMAGE_TOKENS + PROMPT, 1 + HORIZON


def _config(depth):
    heads = {"num_heads": 8, "num_kv_heads": 1, "head_dim": HEAD}
    return pi0.Pi0Config(
        depth=depth,
        backbone=gemma.GemmaConfig(width=WIDTH, mlp_dim=48, **heads),
        expert=gemma.GemmaConfig(width=EXPERT, mlp_dim=32, **heads),
        image=siglip.SiglipConfig(width=IMAGE, depth=2, mlp_dim=56, num_heads=8, patch_size=4),
        image_size=8,
        vocab_size=32,
        cameras=("base_0_rgb",),
        action_dim=6,
        action_horizon=HORIZON,
        max_token_len=PROMPT,
        dtype="float32",
    )


def _spec(layout, mesh):
    # With 1e-8 in its place Adam makes whole steps of the rounding errors that are all the gradient
    # of a key's bias consists of, since softmax undoes it.
    adamw = optimizer.AdamW(eps=1e-3, clip_norm=0.5)
    schedule = optimizer.CosineSchedule(warmup_steps=1, peak_lr=0.01, decay_steps=10, end_lr=0.01)
    schedule = schedule.create()
    return specs.Spec(
        student=_config(STUDENT),
        optimizer=adamw.create(schedule),
        schedule=schedule,
        losses=losses.Losses(task=1.0, velocity=0.5, attention=2.0, reflow=1.5),
        teacher=_config(TEACHER),
        layer_map=layer_map.explicit((0, 2), TEACHER),
        accumulation=2 if layout == ACCUMULATED else 1,
        ema_decay=0.5,
        execution=layers.Execution(remat="none", rows=sharding.batch_sharding(mesh)),
    )


@contextlib.contextmanager
def _warnings_of_xla(found):
    """Compiler output on stderr, bypassing Python's; a cached program writes none."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            jax.config.update("jax_compilation_cache_dir", folder)
            compilation_cache.reset_cache()
            file.seek(0)
            found.append(file.read().decode(errors="replace"))


@pytest.fixture(scope="module")
def given(tiny_params, tiny_batch):
    """Teacher, the student's first parameters, batch: on the host."""
    teacher = tiny_params(_config(TEACHER))
    chosen = layer_map.explicit((0, 2), TEACHER)
    cut = jax.jit(student.cut, static_argnums=(0, 2))(_config(TEACHER), teacher, chosen)
    cut, others = jax.device_get((cut, tiny_params(_config(STUDENT), seed=3)))
    moved = jax.tree.map(lambda x, y: x + np.float32(0.1) * y, cut, others)
    return jax.device_get((teacher, moved, tiny_batch(_config(TEACHER), b=BATCH)))


@pytest.fixture(scope="module")
def run(given):
    """Runs a layout's step three times: (state, metrics of each step, program, warnings)."""
    teacher, params, batch = given

    @functools.cache
    def of(layout):
        mesh = sharding.MeshConfig(*layout).create(jax.devices()[: math.prod(layout)])
        spec = _spec(layout, mesh)
        start = functools.partial(step.init_state, spec)
        layout_of = functools.partial(sharding.param_sharding, mesh)
        state_layout, teacher_layout = layout_of(jax.eval_shape(start, params)), layout_of(teacher)
        rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        state = jax.device_put(start(params), state_layout)
        held = jax.device_put(teacher, teacher_layout)
        fed, key = jax.device_put(batch, rows), jax.device_put(jax.random.key(5), whole)
        advance = jax.jit(
            functools.partial(step.distill_step, spec),
            out_shardings=(state_layout, whole),
            donate_argnums=1,
        )
        warnings = []
        with _warnings_of_xla(warnings):
            compiled = advance.lower(held, state, key, fed).compile()
        history = []
        for _ in range(STEPS):
            state, metrics = compiled(held, state, key, fed)
            history.append(jax.device_get(metrics))
        return jax.device_get(state), history, hlo.collectives(compiled.as_text()), warnings[0]

    return of


def _assert_close(actual, expected, atol=1e-5):
    expected = weights.leaves(expected)
    for path, leaf in weights.leaves(actual).items():
        scale = max(1.0, float(np.abs(expected[path]).max()))
        np.testing.assert_allclose(leaf / scale, expected[path] / scale, atol=atol, err_msg=path)


@every_kind
def test_three_steps_on_eight_devices_are_those_of_one(layout, run, given):
    state, history, *_ = run((1, 1, 1))
    split_state, split_history, *_ = run(layout)
    for metrics, expected in zip(split_history, history, strict=True):
        norms = {name for name in metrics if "norm" in name}
        _assert_close(*({n: m[n] for n in m.keys() - norms} for m in (metrics, expected)))
        # Sums of squares over all parameters, of gradients that three steps have carried apart.
        _assert_close(*({n: m[n] for n in norms} for m in (metrics, expected)), atol=1e-4)
    _assert_close(split_state.params, state.params)
    _assert_close(split_state.ema_params, state.ema_params)
    _assert_close(split_state.opt_state, state.opt_state)
    # Three steps went far enough to tell.
    assert abs(history[-1]["loss"] - history[0]["loss"]) > 1e-2
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), state.params, given[1])
    assert max(jax.tree.leaves(moved)) > 1e-2


@every_kind
def test_no_layout_gathers_more_than_a_layer_at_once(layout, run):
    """Nor more in all than each layer's parameters, split over `tensor`, once a pass.

    The teacher's suffix passes ten times more for the reflow loss.
    """
    gathered = [c for c in run(layout)[2] if c.kind == "all-gather"]
    _, fsdp, tensor = layout
    if fsdp == 1:
        assert not gathered
        return
    without = sharding.MeshConfig(8 // tensor, 1, tensor).create()
    most, total = 0, 0
    for depth, passes in ((TEACHER, 1), (STUDENT, 2)):
        shapes = pi0.abstract_params(_config(depth))
        wheres = weights.leaves(sharding.param_sharding(without, shapes))
        for path, leaf in weights.leaves(shapes).items():
            size = 4 * math.prod(wheres[path].shard_shape(leaf.shape))
            stacked = "/layers/" in path or "/encoderblock/" in path
            most = max(most, size // leaf.shape[0] if stacked else size)
            suffix = "PaliGemma" not in path or "_1/" in path
            total += (passes + step.TEACHER_STEPS * (suffix and depth == TEACHER)) * size
    if layout == ACCUMULATED:
        total *= 2
    assert max(c.bytes for c in gathered) <= most
    assert sum(c.times * c.bytes for c in gathered) <= total


@pytest.mark.slow
def test_heads_and_columns_stay_split_over_tensor(run):
    """Megatron's exchange: a sum for each block's output, and for each product back to its input.

    The two products of an MLP and the three of the image encoder's heads have their gradients
    summed over devices one by one, at least by XLA's CPU backend. The one kv head is on all
    devices, so that its gradient is a sum of theirs: the prefix's from both attentions.
    """
    found = run((1, 1, 8))[2]
    assert {c.kind for c in found} == {"all-reduce"}
    prefix, suffix, image = PREFIX * WIDTH, SUFFIX * EXPERT, IMAGE_TOKENS * IMAGE
    # For the reflow loss the student has two draws, and the teacher ten passes of the suffix more.
    kv = 2 * (2 * PREFIX + 2 * SUFFIX) * HEAD
    teacher = 2 * (prefix + (1 + step.TEACHER_STEPS) * suffix)
    student_both_ways = 5 * (prefix + 2 * suffix) + kv
    image_forward, image_backward = 2 * 2 * image, 2 * 4 * image
    ends = 2 * PROMPT * WIDTH + (1 + step.TEACHER_STEPS + 2) * HORIZON * EXPERT
    numbers = TEACHER * teacher + STUDENT * student_both_ways
    numbers += 2 * image_forward + ends + image_backward
    # Back into the MLP of actions and time, and of the compared layer's prefix keys.
    numbers += 2 * HORIZON * 2 * EXPERT + PREFIX * HEAD
    exchanged = sum(c.times * c.bytes for c in found)
    # Besides, norms of the gradient.
    assert 4 * BATCH * numbers <= exchanged <= 4 * BATCH * numbers + 1000


@every_kind
def test_xla_copies_no_array_for_want_of_a_better_way(layout, run):
    assert "nvoluntary full rematerialization" not in run(layout)[3]


@pytest.mark.parametrize("pi05", [False, True])
def test_no_large_parameter_is_whole_where_fsdp_was_asked_for(pi05):
    shapes = pi0.abstract_params(pi0.Pi0Config(pi05=pi05))
    leaves = weights.leaves(shapes)
    for layout in LAYOUTS:
        mesh = sharding.MeshConfig(*layout).create()
        for path, where in weights.leaves(sharding.param_sharding(mesh, shapes)).items():
            shape, part = leaves[path].shape, where.shard_shape(leaves[path].shape)
            if 4 * math.prod(shape) >= sharding.LARGE_BYTES:
                assert math.prod(shape) >= layout[1] * math.prod(part), (layout, path)
