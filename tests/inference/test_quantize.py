"""A sampler in 8 bits: which products are rounded, how bounds are measured, and what is refused."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shallow_pi.inference import calibration, prepare, quantize, sampler, tuning
from shallow_pi.models import layers, quantized

STEPS = 2


@pytest.fixture(scope="module")
def make(tiny_config, tiny_params, tiny_observation):
    """Makes a model, its parameters, observations, noise, and the bounds of its activations."""

    @functools.cache
    def made(pi05):
        config = tiny_config(pi05=pi05)
        params, observation = tiny_params(config), tiny_observation(config)
        noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6)), jnp.float32)
        found = calibration.calibrate(config, params, [(observation, noise)], num_steps=STEPS)
        return config, params, observation, noise, found

    return made


@pytest.fixture(scope="module", params=[False, True], ids=["pi0", "pi05"])
def each(request, make):
    return make(request.param)


@pytest.fixture(scope="module")
def setting(make):
    return make(False)


def _sample(setting, scheme, parts=quantize.PARTS, base=tuning.SCANNED, params=None):
    config, own, observation, noise, found = setting
    options = dataclasses.replace(base, quantize=scheme, quantized=parts)
    bounds = found.bounds(scheme) if quantize.rounds_activations(scheme) else None

    @jax.jit
    def run(params):
        times = sampler.integration_times(STEPS)
        prepared = prepare.prepare(config, params, times, options, bounds)
        return sampler.sample_prepared(
            config, prepared, observation, noise, num_steps=STEPS, options=options
        )

    return run(own if params is None else params)


def _error(found, expected):
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def test_actions_are_close_in_every_scheme_and_the_same_scanned_or_unrolled(each):
    exact = _sample(each, "none")
    for scheme, most in {"w8": 0.03, "int8": 0.06, "wf8": 0.12, "fp8": 0.15}.items():
        found = _sample(each, scheme)
        assert 1e-4 < _error(found, exact) < most
        if scheme == "int8":  # A sum in another order can turn a rounding.
            unrolled = _sample(each, scheme, base=tuning.ALL_ON)
            assert _error(unrolled, found) < 0.2 * _error(found, exact)


def test_halves_of_layers_that_a_model_lacks_are_left_out(
    tiny_config, tiny_params, tiny_observation
):
    config = tiny_config(
        backbone_layers=("whole", "keys_values", "whole"),
        expert_layers=("whole", "whole", "absent"),
    )
    params, observation = tiny_params(config), tiny_observation(config)
    noise = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 6)), jnp.float32)
    found = calibration.calibrate(config, params, [(observation, noise)], num_steps=STEPS)
    assert found.largest["backbone"]["down"][1] == found.largest["expert"]["qkv"][2] == 1.0
    assert found.largest["backbone"]["qkv"][1] != 1.0
    setting = config, params, observation, noise, found
    exact = _sample(setting, "none")
    assert 1e-4 < _error(_sample(setting, "int8"), exact) < 0.06


def test_each_part_can_be_rounded_by_itself(setting):
    config, params, *_, found = setting
    times = sampler.integration_times(STEPS)
    for part in quantize.PARTS:
        options = dataclasses.replace(tuning.ALL_ON, quantize="int8", quantized=(part,))
        made = jax.eval_shape(
            functools.partial(
                prepare.prepare, config, times=times, options=options, bounds=found.bounds("int8")
            ),
            params,
        )
        stacks = {"vision": made.image.layers, "backbone": made.prefix, "expert": made.suffix}
        for name, stack in stacks.items():
            leaves = jax.tree.leaves(stack, is_leaf=lambda x: isinstance(x, quantized.Quantized))
            count = sum(isinstance(leaf, quantized.Quantized) for leaf in leaves)
            assert count == (4 * len(stack) if name == part else 0)
        untouched = jax.tree.leaves((made.params, made.tables, made.image.head, made.image.patches))
        assert {leaf.dtype for leaf in untouched} == {jnp.dtype("float32")}


_seen = jax.jit(quantize.straight_through, static_argnums=(1, 2))


def test_a_policy_of_rounded_weights_is_the_one_that_training_saw(each):
    """Rounding what is rounded already changes nothing, in openpi's tree as in fused matrices."""
    config, params = each[:2]
    scheme = "w8" if config.pi05 else "wf8"
    seen = _seen(params, scheme)
    plain, rounded = _sample(each, "none", params=seen), _sample(each, scheme)
    assert _error(rounded, plain) < 1e-5
    changed = {
        "/".join(key.key for key in path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), params, seen)
        )
        if leaf
    }
    assert len(changed) == 6 + 5 + 5
    assert not [name for name in changed if "embed" in name or "norm" in name.lower()]
    only = _seen(params, "int8", ("expert",))
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), params, only)
    assert jax.tree.all(same["PaliGemma"]["img"])
    assert same["PaliGemma"]["llm"]["layers"]["mlp"] == {"gating_einsum": True, "linear": True}
    assert not any(same["PaliGemma"]["llm"]["layers"]["mlp_1"].values())


def test_bounds_are_the_largest_and_a_percentile_of_what_the_products_multiply(setting):
    config, params, observation, noise, found = setting
    assert (found.observations, found.num_steps) == (2, STEPS)
    for part, depth in quantize.depths(config).items():
        assert set(found.largest[part]) == set(quantize.PRODUCTS[part])
        for name, values in found.largest[part].items():
            assert len(values) == depth
            assert all(0 < w <= v for v, w in zip(values, found.within[part][name], strict=True))
    # The first product of the image tower multiplies normed patches, whatever the sampler does.
    weights = params["PaliGemma"]["img"]
    kernel = weights["embedding"]["kernel"].reshape(-1, config.image.width)
    images = jnp.stack([observation.images[name] for name in config.cameras], axis=1)
    cut = images.reshape(4, 2, 12, 2, 12, 3).swapaxes(2, 3).reshape(4, 4, -1)
    x = cut @ kernel + weights["embedding"]["bias"] + weights["pos_embedding"]
    norm = weights["Transformer"]["encoderblock"]["LayerNorm_0"]
    normed = np.abs(layers.layer_norm(x, norm["scale"][0], norm["bias"][0]))
    masks = np.stack([observation.image_masks[name] for name in config.cameras], axis=1)
    normed = normed[masks.reshape(-1)]
    assert found.largest["vision"]["qkv"][0] == pytest.approx(float(normed.max()), rel=1e-5)
    # Tokens that do not exist do not count.
    there = observation.tokenized_prompt_mask
    other = dataclasses.replace(
        observation,
        images={k: jnp.where(masks[:, i, None, None, None], observation.images[k], 9.0)
                for i, k in enumerate(config.cameras)},
        tokenized_prompt=jnp.where(there, observation.tokenized_prompt, 3),
    )  # fmt: skip
    half = calibration.calibrate(config, params, [(other, noise)], num_steps=STEPS, percentile=50.0)
    assert half.within["vision"]["qkv"][0] == pytest.approx(float(np.median(normed)), rel=0.04)
    assert half.largest == found.largest


def test_a_calibration_is_read_back(setting, tmp_path, tiny_config):
    config, *_, found = setting
    assert calibration.load(tmp_path, config) is None
    path = calibration.save(tmp_path, found)
    assert path == tmp_path / "calibration.json"
    again = calibration.load(tmp_path, config)
    for scheme in ("int8", "fp8"):
        for a, b in zip(*(jax.tree.leaves(c.bounds(scheme)) for c in (found, again)), strict=True):
            np.testing.assert_array_equal(a, b)
    deeper = tiny_config(pi05=config.pi05, depth=4)
    with pytest.raises(ValueError, match="expected 4 positive bounds for backbone qkv"):
        calibration.load(tmp_path, deeper)
    content = json.loads(path.read_text())
    content["within"]["expert"]["down"][0] = -1.0
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not fit the model beside it"):
        calibration.load(tmp_path, config)


def test_activations_are_not_rounded_without_bounds(setting):
    config, params, observation, noise, _ = setting
    options = dataclasses.replace(tuning.SCANNED, quantize="int8")
    with pytest.raises(ValueError, match=r"'int8' rounds activations.*weights alone: 'w8'"):
        jax.eval_shape(
            functools.partial(sampler.sample_actions, config, num_steps=1, options=options),
            params,
            observation,
            noise,
        )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantize": "int4"}, "quantize must be one of none, int8, fp8, w8, wf8, got 'int4'"),
        ({"quantized": ("tower",)}, "parts to quantize are vision, backbone, expert, got tower"),
        ({"quantize": "w8", "quantized": ()}, "quantize is 'w8' and no part is named"),
    ],
)
def test_unknown_schemes_and_parts_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tuning.ALL_ON, **fields)


def test_calibration_refuses_what_it_cannot_measure(setting):
    config, params, observation, noise, _ = setting
    with pytest.raises(ValueError, match=r"--percentile must lie in \(0, 100\], got 0"):
        calibration.calibrate(config, params, [], num_steps=1, percentile=0)
    with pytest.raises(ValueError, match="no observations to calibrate on"):
        calibration.calibrate(config, params, [], num_steps=1)
    with pytest.raises(ValueError, match="actions are not finite"):
        calibration.calibrate(config, params, [(observation, noise * np.nan)], num_steps=1)
