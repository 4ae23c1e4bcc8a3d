"""Early exit: where nobody leaves it is the teacher, where all leave its first layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.distill import layer_map, student
from shallow_pi.evaluation.rivals import early_exit, rival, training
from shallow_pi.inference import sampler
from shallow_pi.models import pi0

# Compiled for each rival, and of use to who works on rivals alone.
pytestmark = pytest.mark.slow

_sample = jax.jit(sampler.sample_actions, static_argnames=("config", "num_steps", "options"))
EXITS = early_exit.EarlyExit(every=1)


@pytest.mark.parametrize("pi05", [False, True], ids=["pi0", "pi05"])
@pytest.mark.parametrize(("at_second", "depth"), [(-1.0, 3), (1e30, 2)], ids=["last", "second"])
def test_a_threshold_decides_the_depth(pi05, at_second, depth, setting, weights):
    config, params, observation, noise = setting(pi05)
    own = early_exit.init(params, 3)
    own["thresholds"] = jnp.array([-1.0, at_second, 1e30])
    cut = student.cut(config, params, layer_map.first(depth, 3))
    short = pi0.at_depth(config, depth)
    expected = _sample(short, cut, observation, noise, num_steps=4)
    run, held = jax.jit(EXITS.sample, static_argnums=0), weights(config, params, own)
    np.testing.assert_allclose(run(config, held, observation, noise), expected, atol=1e-4)
    alone = jax.tree.map(lambda leaf: leaf[:1], observation)
    np.testing.assert_allclose(run(config, held, alone, noise[:1]), expected[:1], atol=1e-4)


def test_observations_leave_at_their_own_exits(setting, weights):
    config, params, observation, noise = setting()
    own, changes = early_exit.init(params, 3), []
    velocity = jax.jit(pi0.velocity, static_argnums=0)
    for depth in (1, 2):
        cut = student.cut(config, params, layer_map.first(depth, 3))
        v, _ = velocity(pi0.at_depth(config, depth), cut, observation, noise, jnp.ones(2))
        changes.append(v)
    moved = np.sqrt(np.mean((changes[1] - changes[0]) ** 2, axis=(1, 2)))
    leaver = int(np.argmin(moved))
    run = jax.jit(EXITS.sample, static_argnums=0)

    def sample(threshold):
        own["thresholds"] = jnp.array([-1.0, threshold, 1e30])
        return np.asarray(run(config, weights(config, params, own), observation, noise))

    mixed, none, all_ = sample(float(moved.mean())), sample(-1.0), sample(1e30)
    np.testing.assert_allclose(mixed[leaver], all_[leaver], atol=1e-5)
    np.testing.assert_allclose(mixed[1 - leaver], none[1 - leaver], atol=1e-5)


def test_thresholds_are_quantiles_of_those_who_are_left():
    moved = np.stack([np.zeros(10), np.arange(10.0), np.arange(10.0)[::-1], np.zeros(10)])
    found = early_exit.thresholds(moved, np.array([0, 0.4, 0.3, 0.3]))
    # 0 … 3 leave first; of 4 … 9, with changes 5 … 0 at the next exit, three.
    assert found.tolist() == [-1.0, 3.0, 2.0, 1e30]


def test_shares_fall_by_the_ratio_and_nobody_leaves_at_the_first():
    made = early_exit.EarlyExit(every=6, ratio=0.5)
    assert made.exits(18) == (6, 12, 18)
    np.testing.assert_allclose(made.shares(18), [0, 2 / 3, 1 / 3])
    assert early_exit.EarlyExit(every=4).exits(18) == (4, 8, 12, 16, 18)
    with pytest.raises(ValueError, match="ratio above 0"):
        early_exit.EarlyExit(ratio=0)


def test_exits_are_trained_and_calibrated(own, params, tiny_batch, tmp_path):
    def feed():
        return iter([tiny_batch(own.model, 4, seed) for seed in range(4)])

    made = early_exit.EarlyExit(every=1, steps=2).make(rival.Material(own, params, feed), tmp_path)
    assert made.program.shapes.extra["thresholds"].shape == (2,)
    assert {path.name for path in tmp_path.iterdir()} == {"params", "thresholds-0.5.json"}
    shapes = jax.eval_shape(lambda: training.Trained(params, early_exit.init(params, 2))._asdict())
    assert shapes["own"]["kernel"].shape == (2, 16, 6)
