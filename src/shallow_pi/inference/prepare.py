"""Weights prepared once for inference, so that nothing is computed twice.

Training runs both streams through scanned Linen layers (`gemma`). Inference calls the same
equations (`layers`) on the same parameters, with optimizations that leave the result unchanged:

- the prefix runs once, and without a scan the compiler drops what nobody reads: everything that
  the last layer computes beyond its keys and values;
- π0's state token depends on neither noise nor time, so its keys and values join the prefix cache;
- everything that depends on time alone (π0's half of an MLP, all of π0.5's adaptive modulations) is
  a table over the N integration times;
- query, key and value, and gate and up, are one matrix each, in the compute dtype;
- keys and values are written into one buffer per layer (see `attention`) and never concatenated;
- halves of layers that a model lacks (`models.layer_table`) are left out.

`tuning.InferenceOptions` switches each of them off, to measure its gain. `trim` drops what a batch
does not need: absent cameras and prompt padding.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from shallow_pi.inference import image_tower, quantize, tuning
from shallow_pi.models import layer_table, layers, pi0
from shallow_pi.models import observation as observations

PROMPT_BUCKET = 16
# A layer's key buffer is a multiple of this long, so that no kernel has to pad it.
KEY_BLOCK = 128


class Layer(NamedTuple):
    """One layer of one stream (or a stack of them on a leading axis), in the compute dtype.

    A layer of keys and values alone has a norm and `qkv` without queries, an absent one nothing.
    """

    # 1 + scale in float32; None where norms are adaptive.
    attention_norm: Float[Array, " d"] | None
    mlp_norm: Float[Array, " d"] | None
    # D × (N·H + 2·K·H), or its three parts.
    qkv: tuple[layers.Matrix, ...]
    # N·H × D
    out: layers.Matrix | None
    # D × 2F, or its two parts.
    gate_up: tuple[layers.Matrix, ...]
    # F × D
    down: layers.Matrix | None


class Tables(NamedTuple):
    """Everything that depends on time alone, at n times."""

    # π0: the time's share of `action_time_mlp_in`, with its bias.
    hidden: Float[Array, "n e"] | None
    # π0.5: scale, shift and gate of both norms of every layer, and of the final norm.
    modulation: Float[Array, "n l 2 3 e"] | None
    final: Float[Array, "n 3 e"] | None


# One for each layer, or one of stacked arrays if layers are scanned.
Stack = list[Layer] | Layer


class Prepared(NamedTuple):
    """A model's weights as `sampler.sample_actions` takes them."""

    # Embedder and everything outside the layers, as in openpi's tree; without tables also
    # `time_weights`.
    params: PyTree
    image: image_tower.Tower
    prefix: Stack
    suffix: Stack
    # None: computed from `params` at every step.
    tables: Tables | None


def trim(
    config: pi0.Pi0Config, observation: observations.Observation, lengths: Sequence[int] = ()
) -> tuple[pi0.Pi0Config, observations.Observation]:
    """Drop cameras nobody in the batch has, and prompt padding beyond a multiple of 16 tokens.

    No token attends to masked ones and no position counts them, so actions do not change. Call it
    on the host: the shapes of the result depend on the masks.

    `lengths` are the prompt lengths that programs are compiled for; the shortest that fits is kept.
    """
    seen = [c for c in config.cameras if np.asarray(observation.image_masks[c]).any()]
    seen = seen or [config.cameras[0]]
    columns = np.asarray(observation.tokenized_prompt_mask).any(axis=0)
    length = prompt_length(config, int(np.flatnonzero(columns).max(initial=0)) + 1)
    length = min((one for one in lengths if one >= length), default=length)
    small = dataclasses.replace(config, cameras=tuple(seen), max_token_len=length)
    return small, dataclasses.replace(
        observation,
        images={name: observation.images[name] for name in seen},
        image_masks={name: observation.image_masks[name] for name in seen},
        tokenized_prompt=observation.tokenized_prompt[:, :length],
        tokenized_prompt_mask=observation.tokenized_prompt_mask[:, :length],
    )


def prompt_length(config: pi0.Pi0Config, words: int) -> int:
    """The prompt length after `trim`, if the longest prompt has `words` tokens."""
    return min(-(-words // PROMPT_BUCKET) * PROMPT_BUCKET, config.max_token_len)


def cache_length(config: pi0.Pi0Config, queries: int = 0) -> int:
    """Slots of a layer's buffer: prefix, state, actions and rows for queries, rounded up.

    Rounded to `KEY_BLOCK`, or in a small model to 16.
    """
    tokens = config.prefix_tokens + (not config.pi05) + config.action_horizon
    block = KEY_BLOCK if tokens >= 4 * KEY_BLOCK else 16
    return -(-(tokens + queries) // block) * block


def prepare(
    config: pi0.Pi0Config,
    params: PyTree,
    times: Float[np.ndarray, " n"],
    options: tuning.InferenceOptions,
    bounds: quantize.Bounds | None = None,
) -> Prepared:
    """Rearrange parameters for inference. Jit it, so that nothing is kept twice.

    `times` are the integration times, for the tables; `bounds` those of activations, where the
    options round them (`calibration`).

    Raises:
      ValueError: the options round activations, and there are no bounds.
    """
    stacks: list[Stack] = [stack_layers(config, params, stream, options) for stream in (0, 1)]
    if options.unrolled_layers or not config.is_even:
        # One array per layer: a slice of a stack would be copied at every call.
        stacks = [
            [
                _half(config, jax.tree.map(lambda leaf, i=i: leaf[i], stack), kind[stream])
                for i, kind in enumerate(config.layers)
            ]
            for stream, stack in enumerate(stacks)
        ]
    timed = time_weights(config, params)
    elsewhere = {"layers", *(["final_norm_1"] if config.pi05 else [])}
    llm = {k: v for k, v in params["PaliGemma"]["llm"].items() if k not in elsewhere}
    rest = {k: v for k, v in params.items() if k not in timed} | {"PaliGemma": {"llm": llm}}
    tables = None
    if options.time_tables:
        tables = make_tables(config, {**rest, **timed}, jnp.asarray(times))
    else:
        rest |= timed
    prefix, suffix = stacks
    image = image_tower.prepare(
        config.image,
        params["PaliGemma"]["img"],
        jnp.dtype(config.dtype),
        fused=options.fused,
        unrolled=options.unrolled_layers,
        multiple=image_tower.WIDE if options.padded_tower else 1,
    )
    how = options.quantize, options.quantized, bounds
    return Prepared(
        rest,
        image._replace(layers=quantize.stack(image.layers, "vision", *how)),
        quantize.stack(prefix, "backbone", *how),
        quantize.stack(suffix, "expert", *how),
        tables,
    )


def time_weights(config: pi0.Pi0Config, params: PyTree) -> dict[str, PyTree]:
    """π0.5's weights that are multiplied by the time alone, which tables replace.

    In bfloat16 at full size 13 MB a layer, and 10 MB besides.
    """
    if not config.pi05:
        return {}
    llm = params["PaliGemma"]["llm"]
    norms = {name: llm["layers"][f"{name}_1"] for name in ("pre_attention_norm", "pre_ffw_norm")}
    norms["final_norm"] = llm["final_norm_1"]
    return {
        **{name: params[name] for name in ("time_mlp_in", "time_mlp_out")},
        "modulation": {name: norm["Dense_0"] for name, norm in norms.items()},
    }


def make_tables(config: pi0.Pi0Config, params: PyTree, times: Float[Array, " n"]) -> Tables:
    """The tables at `times`, from `Prepared.params` with `time_weights`."""
    width, dtype = config.expert.width, jnp.dtype(config.dtype)
    embedded = layers.time_embedding(times, width)
    if not config.pi05:
        time_half = {
            "kernel": params["action_time_mlp_in"]["kernel"][width:],
            "bias": params["action_time_mlp_in"]["bias"],
        }
        return Tables(layers.dense(time_half, embedded), None, None)
    condition = pi0.time_condition(params, embedded).astype(dtype)

    def modulation(dense: PyTree) -> Array:
        """Of one norm, or of the norms of all layers."""
        flat = condition @ dense["kernel"].astype(dtype)
        flat = flat + jnp.expand_dims(dense["bias"].astype(dtype), -2)
        return flat.reshape(*flat.shape[:-1], 3, width)

    per_layer = [
        modulation(params["modulation"][name]) for name in ("pre_attention_norm", "pre_ffw_norm")
    ]
    final = modulation(params["modulation"]["final_norm"])
    return Tables(None, jnp.moveaxis(jnp.stack(per_layer, axis=2), 1, 0), final)


def _half(config: pi0.Pi0Config, layer: Layer, half: layer_table.Half) -> Layer:
    """The part of a layer that a stream has."""
    if half == "whole":
        return layer
    qkv: tuple[layers.Matrix, ...] = ()
    if half == "keys_values":
        width = config.backbone.num_heads * config.backbone.head_dim
        qkv = layer.qkv[1:]
        if not qkv:  # One matrix.
            whole = layer.qkv[0]
            assert isinstance(whole, jax.Array), "it is quantized later"
            qkv = (whole[:, width:],)
    norm = layer.attention_norm if qkv else None
    return Layer(norm, mlp_norm=None, qkv=qkv, out=None, gate_up=(), down=None)


def stack_layers(
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
