"""The model's weights as inference wants them: prepared once, nothing computed twice.

Training runs both streams through scanned Linen layers (`gemma`). `inference` computes the same
functions of the same parameters with optimizations that leave the result unchanged:

- the prefix runs once, and what its last layer computes beyond keys and values falls away, because
  without a scan the compiler sees that nobody reads it;
- π0's state token depends on neither noise nor time, so its keys and values join the prefix cache;
- everything that depends on time alone (π0's half of an MLP, all of π0.5's adaptive modulations) is
  a table over the N integration times;
- query, key and value, and gate and up, are one matrix each, in the compute dtype;
- keys and values are written into one buffer a layer (see `attention`), never copied to be joined.

`tuning.InferenceOptions` switches each of them off, to measure its gain. `trim` drops what a batch
does not need: absent cameras and prompt padding.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from shallow_pi.inference import image_tower, tuning
from shallow_pi.models import layers, pi0
from shallow_pi.models import observation as observations

PROMPT_BUCKET = 16
# Keys a layer has room for are a multiple of this, so that no kernel has to pad them.
KEY_BLOCK = 128


class Layer(NamedTuple):
    """One layer of one stream (or a stack of them on a leading axis), in the compute dtype."""

    # 1 + scale in float32; None where norms are adaptive.
    attention_norm: Float[Array, " d"] | None
    mlp_norm: Float[Array, " d"] | None
    # D × (N·H + 2·K·H), or its three parts.
    qkv: tuple[Array, ...]
    # N·H × D
    out: Float[Array, "nh d"]
    # D × 2F, or its two parts.
    gate_up: tuple[Array, ...]
    # F × D
    down: Float[Array, "f d"]


class Tables(NamedTuple):
    """What depends on time alone, at n times."""

    # π0: the time's share of `action_time_mlp_in`, with its bias.
    hidden: Float[Array, "n e"] | None
    # π0.5: scale, shift and gate of both norms of every layer, and of the final norm.
    modulation: Float[Array, "n l 2 3 e"] | None
    final: Float[Array, "n 3 e"] | None


class Prepared(NamedTuple):
    """A model's weights as `sampler.sample_actions` takes them."""

    # Embedder and everything outside the layers, as in openpi's tree.
    params: PyTree
    image: image_tower.Tower
    # By layer, or stacked where layers are scanned.
    prefix: Any
    suffix: Any
    # None: made from `params` at every step.
    tables: Tables | None


def trim(
    config: pi0.Pi0Config, observation: observations.Observation
) -> tuple[pi0.Pi0Config, observations.Observation]:
    """Drop cameras nobody in the batch has, and prompt padding beyond a multiple of 16 tokens.

    Masked tokens are attended by nobody and count in no position, so actions stay as they are. Call
    it on the host: the shapes that come out depend on the masks.
    """
    seen = [c for c in config.cameras if np.asarray(observation.image_masks[c]).any()]
    seen = seen or [config.cameras[0]]
    columns = np.asarray(observation.tokenized_prompt_mask).any(axis=0)
    length = prompt_length(config, int(np.flatnonzero(columns).max(initial=0)) + 1)
    small = dataclasses.replace(config, cameras=tuple(seen), max_token_len=length)
    return small, dataclasses.replace(
        observation,
        images={name: observation.images[name] for name in seen},
        image_masks={name: observation.image_masks[name] for name in seen},
        tokenized_prompt=observation.tokenized_prompt[:, :length],
        tokenized_prompt_mask=observation.tokenized_prompt_mask[:, :length],
    )


def prompt_length(config: pi0.Pi0Config, words: int) -> int:
    """What `trim` leaves of the prompt where the longest has `words` tokens."""
    return min(-(-words // PROMPT_BUCKET) * PROMPT_BUCKET, config.max_token_len)


def cache_length(config: pi0.Pi0Config) -> int:
    """Keys a layer's buffer has room for: prefix, state and actions, rounded up.

    To `KEY_BLOCK`s, or where that would be much, to 16.
    """
    tokens = config.prefix_tokens + (not config.pi05) + config.action_horizon
    block = KEY_BLOCK if tokens >= 4 * KEY_BLOCK else 16
    return -(-tokens // block) * block


def prepare(
    config: pi0.Pi0Config,
    params: PyTree,
    times: Float[np.ndarray, " n"],
    options: tuning.InferenceOptions,
) -> Prepared:
    """Rearrange parameters for inference. Jit it: nothing is kept twice then.

    Args:
      config: the model.
      params: its parameters, in any float dtype.
      times: the integration times, for the tables.
      options: the optimizations to use.
    """
    stacks: list[Any] = [_stack(config, params, stream, options) for stream in (0, 1)]
    if options.unrolled_layers:
        # One array a layer: a slice of a stack would be copied at every call.
        stacks = [
            [jax.tree.map(lambda leaf, i=i: leaf[i], stack) for i in range(config.depth)]
            for stack in stacks
        ]
    llm = {k: v for k, v in params["PaliGemma"]["llm"].items() if k != "layers"}
    rest = {**params, "PaliGemma": {"llm": llm}}
    if config.pi05:
        rest["modulation"] = {
            name: params["PaliGemma"]["llm"]["layers"][f"{name}_1"]["Dense_0"]
            for name in ("pre_attention_norm", "pre_ffw_norm")
        }
    tables = make_tables(config, rest, jnp.asarray(times)) if options.time_tables else None
    prefix, suffix = stacks
    image = image_tower.prepare(
        config.image,
        params["PaliGemma"]["img"],
        jnp.dtype(config.dtype),
        fused=options.fused,
        unrolled=options.unrolled_layers,
    )
    return Prepared(rest, image, prefix, suffix, tables)


def make_tables(config: pi0.Pi0Config, params: PyTree, times: Float[Array, " n"]) -> Tables:
    """The tables at `times`, from `Prepared.params`."""
    width, dtype = config.expert.width, jnp.dtype(config.dtype)
    embedded = layers.time_embedding(times, width)
    if not config.pi05:
        time_half = {
            "kernel": params["action_time_mlp_in"]["kernel"][width:],
            "bias": params["action_time_mlp_in"]["bias"],
        }
        return Tables(dense(time_half, embedded), None, None)
    condition = nn.swish(dense(params["time_mlp_in"], embedded))
    condition = nn.swish(dense(params["time_mlp_out"], condition)).astype(dtype)

    def modulation(dense: PyTree) -> Array:
        flat = condition @ dense["kernel"].astype(dtype)
        flat = flat + jnp.expand_dims(dense["bias"].astype(dtype), -2)
        return flat.reshape(*flat.shape[:-1], 3, width)

    per_layer = [
        modulation(params["modulation"][name]) for name in ("pre_attention_norm", "pre_ffw_norm")
    ]
    final = modulation(params["PaliGemma"]["llm"]["final_norm_1"]["Dense_0"])
    return Tables(None, jnp.moveaxis(jnp.stack(per_layer, axis=2), 1, 0), final)


def _stack(
    config: pi0.Pi0Config, params: PyTree, stream: int, options: tuning.InferenceOptions
) -> Layer:
    """One stream's layers on a leading axis."""
    c = (config.backbone, config.expert)[stream]
    end, dtype = ("", "_1")[stream], jnp.dtype(config.dtype)
    tree = params["PaliGemma"]["llm"]["layers"]
    attention, mlp = tree["attn"], tree[f"mlp{end}"]
    depth = config.depth

    def matrix(w: Array, rows: int) -> Array:
        return w.astype(dtype).reshape(depth, rows, -1)

    query = matrix(jnp.swapaxes(attention[f"q_einsum{end}"]["w"], 1, 2), c.width)
    key_value = jnp.moveaxis(attention[f"kv_einsum{end}"]["w"], 3, 2)  # l 2 d k h
    key, value = (matrix(key_value[:, i], c.width) for i in (0, 1))
    gate, up = (mlp["gating_einsum"][:, i].astype(dtype) for i in (0, 1))
    parts: list[tuple[Array, ...]] = [(query, key, value), (gate, up)]
    if options.fused:
        parts = [(jnp.concatenate(part, axis=-1),) for part in parts]

    def norm(name: str) -> Array | None:
        leaf = tree[f"{name}{end}"]
        return 1 + leaf["scale"].astype(jnp.float32) if "scale" in leaf else None

    return Layer(
        attention_norm=norm("pre_attention_norm"),
        mlp_norm=norm("pre_ffw_norm"),
        qkv=parts[0],
        out=matrix(attention[f"attn_vec_einsum{end}"]["w"], c.num_heads * c.head_dim),
        gate_up=parts[1],
        down=mlp["linear"].astype(dtype),
    )


def multiply(x: Array, matrix: Array) -> Array:
    """As one matrix product, which XLA's CPU backend is fastest at."""
    rows = x.reshape(-1, x.shape[-1])
    return (rows @ matrix.astype(rows.dtype)).reshape(*x.shape[:-1], -1)


def dense(params: PyTree, x: Array) -> Array:
    """A Linen `Dense` without a dtype: in the wider of the input's and the parameters' dtypes."""
    dtype = jnp.promote_types(x.dtype, params["kernel"].dtype)
    bias = params["bias"].astype(dtype)
    return multiply(x.astype(dtype), params["kernel"]) + bias.reshape((1,) * (x.ndim - 1) + (-1,))
