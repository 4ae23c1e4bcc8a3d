"""EfficientVLA (2506.10100): fewer layers, fewer visual tokens, cached features; no training.

Our reimplementation of the paper's text; the authors' code is not published. Three parts:

- the layers whose input and output are most alike (mean cosine over samples and tokens) go, in
  one pass, from both streams at the same indices (the paper's head reads the last state alone);
- from the second layer on, K image tokens stay: the `KEY` most relevant, of the others a half by
  relevance and a half by diversity. Relevance r_i = Σ over prompt tokens j of the head-mean
  attention A[j, i] of the first layer; diversity is 1 − max over the KEY of cos(v_i, v_k), of the
  features behind it. (The paper scales r to [0, 1], which changes no order.) Positions stay;
- what attention and MLP of all expert layers add is computed at every N-th integration step and
  added again at the others. The sum over layers is kept, which is the same.

Not built: the 25 % sparsity of the kept layers' MLPs (PruneNet). [our choice]: first-layer keys
and values of dropped tokens go too, since the paper's head sees the kept tokens alone.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from shallow_pi.deploy import policy as deployed
from shallow_pi.distill import layer_map, student
from shallow_pi.evaluation.rivals import rival
from shallow_pi.inference import attention, forward, prepare
from shallow_pi.models import layers, pi0
from shallow_pi.models import observation as observations

# Most relevant tokens, from which diversity is measured.
KEY = 4
# Share of the other tokens that is chosen by relevance.
BY_RELEVANCE = 0.5


@dataclasses.dataclass(frozen=True)
class EfficientVLA:
    """Options; the defaults change nothing."""

    # Layers to keep; 0 keeps all.
    layers: int = 0
    # Image tokens to keep, of all cameras together; 0 keeps all.
    tokens: int = 0
    # Integration steps between two computations of the layers.
    cache: int = 1

    def __post_init__(self) -> None:
        if min(self.layers, self.tokens, self.cache - 1) < 0 or 0 < self.tokens < KEY:
            raise ValueError(
                f"efficientvla: layers and tokens are 0 (all) or more, tokens at least {KEY}, and "
                f"cache at least 1, got {self}"
            )

    def make(self, material: rival.Material, folder: pathlib.Path) -> deployed.Policy:
        """Measure the layers on the first batch, and drop the most alike."""
        model, params = material.model, material.params
        if self.layers > model.depth:
            raise ValueError(f"efficientvla: {self.layers} layers of {model.depth} cannot stay")
        if self.layers and self.layers < model.depth:
            scores = rival.kept(
                folder / "similarity.json", lambda: rival.scores(material, "similarity")
            )
            kept = layer_map.similarity(self.layers, np.array(scores))
            params = student.cut(model, params, kept)
            model = pi0.at_depth(model, self.layers)
        return rival.policy(material, model, params, self.sample, ())

    def sample(
        self,
        config: pi0.Pi0Config,
        held: rival.Weights,
        observation: observations.Observation,
        noise: Float[Array, "b ah ad"],
    ) -> Float[Array, "b ah ad"]:
        """Sample over the kept tokens, with features of up to `cache` − 1 steps before."""
        prepared = held.prepared
        model = self.fewer(config)
        cache, valid = prefill(model, prepared, observation)
        cache, valid = forward.append_state(model, prepared, observation.state, cache, valid)

        def block(x_t: Array, cache: attention.Cache, tables: prepare.Tables, steps: int) -> Array:
            """Integration steps of which only the first computes the layers."""
            added: Array | None = None
            for i in range(steps):
                now = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], tables)
                tokens = forward.embed_suffix(model, prepared, x_t, now)
                if added is None:
                    behind, _ = forward.run_suffix(model, prepared, tokens, cache, valid, now)
                    added = behind - tokens
                else:
                    behind = tokens + added
                v = forward.read_velocity(model, prepared, behind, now)
                x_t = x_t + dt * v
            return x_t

        tables, num_steps = prepared.tables, rival.steps_of(prepared)
        dt, whole = jnp.float32(-1.0 / num_steps), num_steps // self.cache
        blocks = jax.tree.map(
            lambda leaf: leaf[: whole * self.cache].reshape(whole, self.cache, *leaf.shape[1:]),
            tables,
        )
        x_t, _ = jax.lax.scan(
            lambda x_t, at: (block(x_t, cache, at, self.cache), None),
            noise.astype(jnp.float32),
            blocks,
        )
        rest = num_steps - whole * self.cache
        return block(x_t, cache, jax.tree.map(lambda leaf: leaf[-rest:], tables), rest)

    def untrained(
        self, config: pi0.Pi0Config, params: PyTree
    ) -> tuple[pi0.Pi0Config, rival.Sample, PyTree]:
        """The model at the kept depth."""
        del params
        return pi0.at_depth(config, self.layers or config.depth), self.sample, ()

    def fewer(self, config: pi0.Pi0Config) -> rival.FewerTokens:
        """The model over the tokens that stay."""
        images = rival.images(config)
        return rival.with_tokens(config, min(self.tokens or images, images))

    def operations(self, config: pi0.Pi0Config, num_steps: int) -> int:
        """Of the tower, the first layer over all tokens, the others, and the computed steps."""
        depth, model = self.layers or config.depth, self.fewer(config)
        whole, own = rival.count(config, depth, num_steps), rival.count(model, depth, num_steps)
        first = rival.layer(config).prefix - rival.layer(model).prefix if depth > 1 else 0
        computed = -(-num_steps // self.cache)
        reused = own.step - depth * rival.layer(model).step
        steps = computed * own.step + (num_steps - computed) * reused
        return whole.vision + own.prefix + first + steps

    def parameters_held(self, config: pi0.Pi0Config) -> int:
        """Parameters of the kept layers."""
        return rival.held(pi0.at_depth(config, self.layers or config.depth))


def prefill(
    config: rival.FewerTokens, prepared: prepare.Prepared, observation: observations.Observation
) -> tuple[attention.Cache, Bool[Array, "b s"]]:
    """`forward.prefill` over the tokens that stay behind the first layer."""
    images, kept = rival.images(config), config.kept
    prefix = forward.embed_prefix(config, prepared, observation)
    tokens, valid = prefix.tokens, prefix.valid
    seen = jnp.sum(valid[:, :images], axis=1)
    # Counted from where the kept tokens end, as the suffix counts on from their number.
    positions = jnp.cumsum(valid, axis=1) - 1 - jnp.maximum(seen - kept, 0)[:, None]
    rope = layers.rope_table(positions, config.backbone.head_dim)
    first = pi0.at_depth(config, 1)
    assert isinstance(prepared.prefix, list), "rivals prepare lists of layers"

    x, (whole,) = forward.run_layers(
        first,
        prepared.prefix[:1],
        tokens,
        [forward.blank(config, tokens, tokens.shape[1])],
        0,
        rope,
        valid[:, None],
        None,
        "xla",
    )
    asked = relevance(config, prepared.prefix[0], tokens, whole[0], valid, rope, images)
    chosen = choose(asked, x[:, :images], valid[:, :images], kept)
    words = jnp.broadcast_to(jnp.arange(images, tokens.shape[1]), (len(x), config.max_token_len))
    rows = jnp.concatenate([chosen, words], axis=1)

    def take(leaf: Array) -> Array:
        index = rows.reshape(*rows.shape, *[1] * (leaf.ndim - 2))
        return jnp.take_along_axis(leaf, index, axis=1)

    length = prepare.cache_length(config)
    empty = forward.blank(config, tokens, length)
    start = attention.write(empty, (take(whole[0]), take(whole[1])), 0)
    valid = take(valid)
    valid = jnp.pad(valid, ((0, 0), (0, length - valid.shape[1])))
    _, others = forward.run_layers(
        config,
        prepared.prefix[1:],
        take(x),
        [empty] * (len(prepared.prefix) - 1),
        0,
        (take(rope[0]), take(rope[1])),
        valid[:, None],
        None,
        "xla",
    )
    return [start, *others], valid


def relevance(
    config: pi0.Pi0Config,
    layer: prepare.Layer,
    tokens: Float[Array, "b s d"],
    keys: Float[Array, "b s k h"],
    valid: Bool[Array, "b s"],
    rope: tuple[Array, Array],
    images: int,
) -> Float[Array, "b i"]:
    """Head-mean attention that each image token gets from all prompt tokens together.

    `layer` is the first one, and image tokens come first.
    """
    c, words = config.backbone, tokens[:, images:]
    normed, _ = layers.rms_norm(words, layer.attention_norm)
    n, k, h = c.num_heads, c.num_kv_heads, c.head_dim
    queries, own, _ = layers.products(normed, layer.qkv, (n * h, k * h, k * h))
    rows = (rope[0][:, images:], rope[1][:, images:])
    shape = (*words.shape[:2], -1, h)
    scaled, _ = layers.split_heads(queries.reshape(shape), own.reshape(shape), rows)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", scaled, keys, preferred_element_type=jnp.float32)
    maps = jnp.mean(layers.softmax(logits, valid[:, None, None, None]), axis=(1, 2))
    asks = valid[:, images:, None].astype(jnp.float32)
    return jnp.sum(maps[:, :, :images] * asks, axis=1)


def choose(
    asked: Float[Array, "b i"],
    features: Float[Array, "b i d"],
    valid: Bool[Array, "b i"],
    kept: int,
) -> Int[Array, "b k"]:
    """The image tokens that stay, in their order: by relevance, then by diversity.

    `features` are those behind the first layer; tokens that do not exist are chosen last.
    """
    images = asked.shape[1]
    if kept >= images:
        return jnp.broadcast_to(jnp.arange(images), asked.shape)
    by_relevance = KEY + int(BY_RELEVANCE * (kept - KEY))
    _, first = jax.lax.top_k(jnp.where(valid, asked, -1.0), by_relevance)
    wide = features.astype(jnp.float32)
    units = wide / jnp.maximum(jnp.linalg.norm(wide, axis=-1, keepdims=True), 1e-6)
    key = jnp.take_along_axis(units, first[:, :KEY, None], axis=1)
    # A token that is absent repels nobody.
    real = jnp.take_along_axis(valid, first[:, :KEY], axis=1)[:, None]
    alike = jnp.max(jnp.where(real, jnp.einsum("bid,bkd->bik", units, key), -1.0), axis=-1)
    taken = jnp.any(first[:, :, None] == jnp.arange(images), axis=1)
    diversity = jnp.where(taken, -2.0, jnp.where(valid, 1.0 - alike, -1.0))
    _, rest = jax.lax.top_k(diversity, kept - by_relevance)
    return jnp.sort(jnp.concatenate([first, rest], axis=1), axis=1)
