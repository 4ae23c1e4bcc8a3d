"""openpi's side of the parity: its model on the shared inputs, under the names of the results.

Importing it puts the stand-ins in place and sets openpi's vocabulary, a module constant, to the
tests' small one.
"""

import stand_ins

stand_ins.install()

# ruff: noqa: E402 (openpi comes after the stand-ins)
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import openpi.models.gemma
import parity
from openpi.models import model as openpi_model
from openpi.models import pi0 as openpi_pi0
from openpi.shared import nnx_utils

from shallow_pi.checkpoints import weights
from shallow_pi.interop import openpi as interop
from shallow_pi.models import parameters, pi0

openpi.models.gemma.PALIGEMMA_VOCAB_SIZE = parity.VOCAB_SIZE


def shapes(config: pi0.Pi0Config) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of openpi's model, by path."""
    model = nnx.eval_shape(interop.model_config(config).create, jax.random.key(0))
    tree = nnx.split(model)[1].to_pure_dict()
    return {path: tuple(leaf.shape) for path, leaf in weights.leaves(tree).items()}


def model(config: pi0.Pi0Config, params: dict) -> openpi_pi0.Pi0:
    """openpi's model with these parameters, every path of which it must want."""
    wanted, given = set(shapes(config)), set(weights.leaves(params))
    assert wanted == given, f"openpi's tree and ours differ in {sorted(wanted ^ given)}"
    return interop.model_config(config).load(params)


def results(config: pi0.Pi0Config) -> dict[str, np.ndarray]:
    """The inputs through openpi's transforms."""
    params = parity.nested(parity.parameters(shapes(config)))
    return {name: parity.thinned(value) for name, value in _results(config, params).items()}


def _results(config: pi0.Pi0Config, params: dict) -> dict[str, jax.Array]:
    policy, samples = model(config, params), parity.batch(config)
    observation = observe(samples)
    actions, t = jnp.asarray(samples["actions"]), jnp.asarray(parity.times())
    prefix, _, _ = nnx_utils.module_jit(policy.embed_prefix)(observation)
    suffix, _, _, condition = nnx_utils.module_jit(policy.embed_suffix)(observation, actions, t)
    images = observation.images[config.cameras[0]]
    found = {
        "image_tokens": policy.PaliGemma.img(images, train=False)[0],
        "prompt_tokens": prefix[:, -config.max_token_len :],
        "suffix_tokens": suffix,
        **_tower(config, policy),
        "loss": nnx_utils.module_jit(policy.compute_loss)(
            jax.random.key(parity.SEED), observation, actions
        ),
        "actions": sample(model(config, in_dtype(params, config.dtype)), samples),
    }
    return found if condition is None else found | {"condition": condition}


def observe(samples: dict) -> openpi_model.Observation:
    """openpi's observation of a batch."""
    return openpi_model.Observation.from_dict(jax.tree.map(jnp.asarray, samples))


def sample(policy: openpi_pi0.Pi0, samples: dict, noise: np.ndarray | None = None) -> jax.Array:
    """Actions from the shared noise, or from this one."""
    noise = parity.noise(policy) if noise is None else noise
    run = nnx_utils.module_jit(policy.sample_actions)
    key, steps = jax.random.key(0), parity.NUM_STEPS
    return run(key, observe(samples), num_steps=steps, noise=jnp.asarray(noise))


def in_dtype(params: dict, dtype: str) -> dict:
    """The parameters as serving holds them."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def padded(params: dict, layers: tuple[int, ...], depth: int = 18) -> dict:
    """The student's layers at their teacher's indices, zeros between: each adds nothing."""

    def pad(path: tuple, leaf: jax.Array) -> jax.Array:
        if parameters.stack(weights.path_name(path)) != "layers":
            return leaf
        zeros = jnp.zeros((depth, *leaf.shape[1:]), leaf.dtype)
        return zeros.at[jnp.asarray(layers)].set(leaf)

    return jax.tree_util.tree_map_with_path(pad, params)


def _tower(config: pi0.Pi0Config, policy: openpi_pi0.Pi0) -> dict[str, jax.Array]:
    inputs = {name: jnp.asarray(value) for name, value in parity.tower_inputs(config).items()}
    suffix, valid = inputs["suffix"], inputs["valid"]
    opens = np.zeros(valid.shape[1] + suffix.shape[1], bool)
    opens[valid.shape[1]] = opens[-config.action_horizon] = True
    mask = jnp.concatenate([valid, jnp.ones(suffix.shape[:2], bool)], axis=1)
    condition = inputs["condition"].astype(config.dtype) if config.pi05 else None
    (_, suffix), (keys, values) = nnx.jit(lambda tower, *arrays: tower(*arrays))(
        policy.PaliGemma.llm,
        [inputs["prefix"], suffix],
        jnp.cumsum(mask, axis=1) - 1,
        openpi_pi0.make_attn_mask(mask, jnp.asarray(opens)),
        [None, condition],
    )
    keys, values = (
        x[:, :, : valid.shape[1]] * valid[None, :, :, None, None] for x in (keys, values)
    )
    return {"tower": suffix, "keys": keys, "values": values}
