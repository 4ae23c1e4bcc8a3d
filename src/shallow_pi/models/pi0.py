"""π0 and π0.5: what the policy is, and the velocity it predicts (openpi: models/pi0.py).

`Pi0Config` makes every size a field; depth is one of them, so teacher and student are the same
model. The public face is functions of (config, params, arrays); parameters are openpi's tree, path
for path. Time runs as in openpi: t = 1 is noise, t = 0 is data (see `distill.flow`).

Letters: b batch, r draws of (noise, time) that share an observation, ah action horizon, ad action
dim, s prefix tokens, t suffix tokens.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from shallow_pi.models import batch as batches
from shallow_pi.models import (
    captures,
    gemma,
    layer_table,
    layers,
    parameters,
    prefixes,
    scorer,
    siglip,
)
from shallow_pi.models import observation as observations

GEMMA_2B = gemma.GemmaConfig(width=2048, mlp_dim=16_384)
GEMMA_300M = gemma.GemmaConfig(width=1024, mlp_dim=4096)
SO400M_14 = siglip.SiglipConfig()
PALIGEMMA_VOCAB_SIZE = 257_152
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@dataclasses.dataclass(frozen=True)
class Pi0Config:
    """Every size of a π0 or π0.5 model. The defaults are openpi's π0."""

    # π0.5: time enters through adaptive norms, and the state, if at all, through the prompt.
    pi05: bool = False
    # Layers of backbone and action expert.
    depth: int = 18
    # The backbone's half of each layer: "whole", only its "keys_values", or "absent"; empty means
    # that all are whole.
    backbone_layers: tuple[layer_table.Half, ...] = ()
    # The expert's half of each layer: "whole" or "absent"; empty means that all are whole.
    expert_layers: tuple[layer_table.Half, ...] = ()
    # The vision-language backbone.
    backbone: gemma.GemmaConfig = GEMMA_2B
    # The action expert.
    expert: gemma.GemmaConfig = GEMMA_300M
    # The image encoder.
    image: siglip.SiglipConfig = SO400M_14
    # Side of the square images, in pixels.
    image_size: int = 224
    # Image tokens per camera that the backbone reads, as means over cells of patches; 0 keeps every
    # patch.
    pooled_tokens: int = 0
    # The same, but patches chosen by a scorer, which has its own parameters; 0 has no scorer.
    scored_tokens: int = 0
    # Rows of the token embedding.
    vocab_size: int = PALIGEMMA_VOCAB_SIZE
    # Cameras in the order of their tokens.
    cameras: tuple[str, ...] = CAMERAS
    # Width of state and actions; smaller robots are zero-padded.
    action_dim: int = 32
    # Actions in a chunk.
    action_horizon: int = 50
    # Prompt length in tokens; openpi's π0.5 uses 200.
    max_token_len: int = 48
    # π0.5 only: write the state into the prompt as 256-bin integers.
    discrete_state_input: bool = False
    # Dtype of activations; parameters keep their own. float16 is for exports only, not training.
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name, size in _sizes(self).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        a, b = self.backbone, self.expert
        if (a.num_heads, a.num_kv_heads, a.head_dim) != (b.num_heads, b.num_kv_heads, b.head_dim):
            raise ValueError(
                "backbone and expert share one attention, so num_heads, num_kv_heads and head_dim "
                f"must be equal; got {a} and {b}."
            )
        if a.num_kv_heads >= a.num_heads or a.num_heads % a.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads and be smaller (openpi's q_einsum/kv_einsum "
                f"layout), got {a.num_kv_heads} for {a.num_heads} heads."
            )
        for name, size in (("expert.width", b.width), ("head_dim", a.head_dim)):
            if size % 2:  # Halves of sines and cosines.
                raise ValueError(f"{name} must be even, got {size}.")
        if self.image.width % self.image.num_heads:
            raise ValueError(
                f"image.num_heads must divide image.width {self.image.width}, got "
                f"{self.image.num_heads}."
            )
        for name in ("backbone_layers", "expert_layers"):
            halves = tuple(getattr(self, name))  # One spelling of a stream that is whole.
            plain = () if len(halves) == self.depth and set(halves) == {"whole"} else halves
            object.__setattr__(self, name, plain)
        layer_table.table(self.depth, self.backbone_layers, self.expert_layers)
        size, patch = self.image_size, self.image.patch_size
        if size % patch:
            raise ValueError(f"image_size {size} must be a multiple of image.patch_size {patch}.")
        if self.pooled_tokens == self.patches:  # One spelling of all.
            object.__setattr__(self, "pooled_tokens", 0)
        prefixes.check(self)
        if not self.cameras or len(set(self.cameras)) < len(self.cameras):
            raise ValueError(
                f"cameras must name at least one camera, and each once; got {list(self.cameras)}."
            )
        if self.discrete_state_input and not self.pi05:
            raise ValueError("discrete_state_input is a π0.5 option; set pi05 or turn it off.")
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(
                f"dtype must be 'bfloat16', 'float16' or 'float32', got {self.dtype!r}."
            )

    @property
    def layers(self) -> tuple[layer_table.Kind, ...]:
        """The halves of every layer."""
        return layer_table.table(self.depth, self.backbone_layers, self.expert_layers)

    @property
    def is_even(self) -> bool:
        """True if every layer is whole in both streams."""
        return not (self.backbone_layers or self.expert_layers)

    @property
    def depths(self) -> str:
        """The layers in words, such as "6 layers (backbone 2, action expert 6)"."""
        if self.is_even:
            return f"{self.depth} layers"
        whole = [column.count("whole") for column in zip(*self.layers, strict=True)]
        return f"{self.depth} layers (backbone {whole[0]}, action expert {whole[1]})"

    @property
    def grid(self) -> int:
        """Patches along a side of an image."""
        return self.image_size // self.image.patch_size

    @property
    def patches(self) -> int:
        """Patches of an image, each of which is a token of the image tower."""
        return self.grid**2

    @property
    def image_tokens(self) -> int:
        """Prefix tokens of one camera."""
        return self.scored_tokens or self.pooled_tokens or self.patches

    @property
    def prefix_tokens(self) -> int:
        """Image and prompt tokens together."""
        return len(self.cameras) * self.image_tokens + self.max_token_len

    @property
    def kind(self) -> str:
        """The name people use."""
        return "π0.5" if self.pi05 else "π0"


def _sizes(config: Pi0Config) -> dict[str, int]:
    """Every size of a config that must be positive, by name."""
    parts: dict[str, Pi0Config | gemma.GemmaConfig | siglip.SiglipConfig] = {
        "": config,
        "backbone.": config.backbone,
        "expert.": config.expert,
        "image.": config.image,
    }
    return {
        f"{start}{field.name}": getattr(part, field.name)
        for start, part in parts.items()
        for field in dataclasses.fields(part)
        if field.type is int and field.name not in ("pooled_tokens", "scored_tokens")
    }


def axis_sizes(config: Pi0Config) -> dict[str, int]:
    """The size of every logical axis of the parameters (`parameters.TABLE`)."""
    return {
        **gemma.axis_sizes((config.backbone, config.expert)),
        **siglip.axis_sizes(config.image, config.patches, config.backbone.width),
        "layers": config.depth,
        "image_layers": config.image.depth,
        "vocab": config.vocab_size,
        "action_dim": config.action_dim,
        "scorer_hidden": scorer.HIDDEN,
        "time_hidden": config.expert.width,
        "action_and_time": 2 * config.expert.width,
    }


def at_depth(config: Pi0Config, depth: int) -> Pi0Config:
    """The same model with another number of layers, all of them whole."""
    return dataclasses.replace(config, depth=depth, backbone_layers=(), expert_layers=())


class PrefixCache(NamedTuple):
    """Everything about an observation that later passes of the suffix read."""

    tower: gemma.KeysValues
    # True for prefix tokens that exist.
    valid: Bool[Array, "b s"]
    state: Float[Array, "b ad"]


class Outputs(NamedTuple):
    """Result of a pass: the velocity and, on request, attention maps and hidden states."""

    velocity: Float[Array, "b r ah ad"]
    attention: captures.PrefixAttention | None
    hidden: gemma.Hidden | None
    cache: PrefixCache | None
    # The image tokens that a scorer chose.
    choice: scorer.Choice | None


class _PaliGemma(nn.Module):
    config: Pi0Config
    execution: layers.Execution

    def setup(self) -> None:
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        streams = (c.backbone, c.expert)
        kinds = None if c.is_even and not self.execution.unroll else c.layers
        self.llm = gemma.Module(streams, c.depth, c.vocab_size, dtype, self.execution, kinds)
        self.img = siglip.Module(c.image, c.backbone.width, dtype, self.execution)


class Pi0(nn.Module):
    """The Linen module behind the functions below; its attribute names make openpi's tree."""

    config: Pi0Config
    execution: layers.Execution = layers.DEFAULT_EXECUTION

    def setup(self) -> None:
        c = self.config
        self.PaliGemma = _PaliGemma(c, self.execution)

        def leaves(name: str) -> parameters.Leaves:
            return parameters.Leaves(name, axis_sizes(c), c.pi05)

        self.action_in_proj = leaves("action_in_proj")
        self.action_out_proj = leaves("action_out_proj")
        if c.scored_tokens:
            self.image_scorer = leaves("image_scorer")
        if c.pi05:
            self.time_mlp_in = leaves("time_mlp_in")
            self.time_mlp_out = leaves("time_mlp_out")
        else:
            self.state_proj = leaves("state_proj")
            self.action_time_mlp_in = leaves("action_time_mlp_in")
            self.action_time_mlp_out = leaves("action_time_mlp_out")

    def embed_images(self, observation: observations.Observation) -> Float[Array, "b n d"]:
        """The tokens of every camera, encoded as one batch."""
        tokens = self.PaliGemma.img(images(self.config, observation))
        return tokens.reshape(len(observation.state), -1, self.config.backbone.width)

    def embed_prefix(
        self,
        observation: observations.Observation,
        image_tokens: Float[Array, "b n d"] | None = None,
    ) -> prefixes.Prefix:
        """Image tokens, encoded unless they are given, and prompt tokens."""
        if image_tokens is None:
            image_tokens = self.embed_images(observation)
        prompt_tokens = self.PaliGemma.llm.embed(observation.tokenized_prompt)
        weights = self.image_scorer() if self.config.scored_tokens else None
        return prefixes.join(self.config, observation, image_tokens, prompt_tokens, weights)

    def embed_suffix(
        self, state: Float[Array, "b ad"], x_t: Float[Array, "b r ah ad"], time: Float[Array, "b r"]
    ) -> tuple[Float[Array, "b r t e"], Float[Array, "b r e"] | None]:
        """Suffix tokens, and for π0.5 the condition of the adaptive norms."""
        c = self.config
        actions = layers.dense(self.action_in_proj(), x_t)
        embedded_time = layers.time_embedding(time, c.expert.width)
        if c.pi05:
            mlp = {"time_mlp_in": self.time_mlp_in(), "time_mlp_out": self.time_mlp_out()}
            return actions, time_condition(mlp, embedded_time)
        repeated = jnp.broadcast_to(embedded_time[:, :, None], actions.shape).astype(actions.dtype)
        both = jnp.concatenate([actions, repeated], axis=-1)
        hidden = nn.swish(layers.dense(self.action_time_mlp_in(), both))
        actions = layers.dense(self.action_time_mlp_out(), hidden)
        b, r = time.shape
        state_token = layers.dense(self.state_proj(), state)[:, None, None]
        state_token = jnp.broadcast_to(state_token, (b, r, 1, c.expert.width))
        return jnp.concatenate([state_token.astype(actions.dtype), actions], axis=2), None

    def __call__(
        self,
        observation: observations.Observation,
        x_t: Float[Array, "b r ah ad"],
        time: Float[Array, "b r"],
        image_tokens: Float[Array, "b n d"] | None = None,
        attention_layer: int | None = None,
        attention_queries: captures.Queries = "actions",
        hidden: bool = False,
        cache: bool = False,
    ) -> Outputs:
        """The velocity in one joint pass; one layer's attention, all streams, or the cache."""
        prefix, valid, positions, choice = self.embed_prefix(observation, image_tokens)
        suffix, condition = self.embed_suffix(observation.state, x_t, time)
        head_dim, horizon = self.config.expert.head_dim, self.config.action_horizon
        kernel = self.execution.prefix_attention
        geometry = gemma.Geometry.create(
            valid,
            *(head_dim, suffix.shape[2], horizon, condition, kernel),
            (positions, prefixes.positions_taken(self.config, valid)),
        )
        asked = None
        if attention_layer is not None:
            sizes = suffix.shape[2], prefix.shape[1]
            prompt = self.config.max_token_len
            asked = captures.Asked.create(
                attention_layer, attention_queries, *sizes, prompt, horizon
            )
        tower = self.PaliGemma.llm(
            prefix, suffix, geometry, asked=asked, hidden=hidden, cache=cache
        )
        capture, stacked = tower.capture, tower.cache
        attention = None if capture is None else capture.attention(valid)
        cached = None if stacked is None else PrefixCache(stacked, valid, observation.state)
        v = layers.dense(self.action_out_proj(), tower.suffix[:, :, -horizon:])
        return Outputs(v, attention, tower.hidden, cached, choice)


def images(config: Pi0Config, observation: observations.Observation) -> Float[Array, "bn h w 3"]:
    """The images of all cameras as one batch."""
    # Cameras inside, observations outside: rows sharded over devices stay where they are.
    stacked = jnp.stack([observation.images[name] for name in config.cameras], axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])


def time_condition(params: PyTree, embedded: Float[Array, "*b e"]) -> Float[Array, "*b e"]:
    """π0.5's condition of the adaptive norms, from embedded times."""
    hidden = nn.swish(layers.dense(params["time_mlp_in"], embedded))
    return nn.swish(layers.dense(params["time_mlp_out"], hidden))


def init(config: Pi0Config, key: Array) -> PyTree:
    """Random float32 parameters in openpi's tree. Jit it with `config` static."""
    blank = batches.zeros(config, 1)
    arrays = blank.observation.as_float(), blank.actions[:, None], jnp.zeros((1, 1))
    return layer_table.zero_cut(config.layers, Pi0(config).init(key, *arrays)["params"])


def abstract_params(config: Pi0Config) -> PyTree:
    """Shapes of the parameters, in float32."""
    return parameters.abstract(axis_sizes(config), config.pi05, config.scored_tokens > 0)


def velocity(
    config: Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    x_t: Float[Array, "b *r ah ad"],
    t: Float[Array, " b *r"],
    *,
    image_tokens: Float[Array, "b n d"] | None = None,
    attention_layer: int | None = None,
    attention_queries: captures.Queries = "actions",
    execution: layers.Execution = layers.DEFAULT_EXECUTION,
) -> tuple[Float[Array, "b *r ah ad"], captures.PrefixAttention | None]:
    """The velocity v(x_t, o, t) in float32, for one draw or for r draws of each observation.

    Parameters may be of any float dtype; times lie in [0, 1], and 1 is noise. `image_tokens` are
    those of `embed_images`, where they are known already. With an `attention_layer`, the logits of
    its `attention_queries` over the prefix are returned as well.

    Returns:
      The velocity, and the attention (None unless asked for; always with the axis of draws).

    Raises:
      ValueError: cameras or shapes that do not fit the config.
    """
    single = x_t.ndim == 3
    if single:
        x_t, t = x_t[:, None], t[:, None]
    found = outputs(
        config,
        params,
        observation,
        x_t,
        t,
        image_tokens=image_tokens,
        attention_layer=attention_layer,
        attention_queries=attention_queries,
        execution=execution,
    )
    return (found.velocity[:, 0] if single else found.velocity), found.attention


def outputs(
    config: Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    x_t: Float[Array, "b r ah ad"],
    t: Float[Array, "b r"],
    *,
    image_tokens: Float[Array, "b n d"] | None = None,
    attention_layer: int | None = None,
    attention_queries: captures.Queries = "actions",
    cache: bool = False,
    execution: layers.Execution = layers.DEFAULT_EXECUTION,
) -> Outputs:
    """`velocity` of r draws, and with `cache` the prefix for `cached.velocity`."""
    _check(config, observation, x_t.shape[-2:])
    captures.check(config.layers, attention_layer, attention_queries)
    arrays = (observation, x_t, t, image_tokens)
    found: Any = Pi0(config, execution).apply(
        {"params": params},
        *arrays,
        attention_layer=attention_layer,
        attention_queries=attention_queries,
        cache=cache,
    )
    return found._replace(velocity=found.velocity.astype(jnp.float32))


def embed_images(
    config: Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    execution: layers.Execution = layers.DEFAULT_EXECUTION,
) -> Float[Array, "b n d"]:
    """The image tokens of `velocity`, for models that share one image tower."""
    _check(config, observation)
    held = {"params": {"PaliGemma": {"img": params["PaliGemma"]["img"]}}}
    tokens: Any = Pi0(config, execution).apply(held, observation, method="embed_images")
    return tokens


def hidden_states(
    config: Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    x_t: Float[Array, "b ah ad"],
    t: Float[Array, " b"],
) -> gemma.Hidden:
    """Both residual streams around every layer, the suffix's with one draw."""
    _check(config, observation, x_t.shape[-2:])
    arrays = (observation, x_t[:, None], t[:, None])
    found: Any = Pi0(config).apply({"params": params}, *arrays, hidden=True)
    return found.hidden


def _check(
    config: Pi0Config, observation: observations.Observation, actions: tuple[int, ...] | None = None
) -> None:
    observations.check(observation, config.cameras, config.image_size, config.action_dim)
    expected = (config.action_horizon, config.action_dim)
    if actions is not None and tuple(actions) != expected:
        raise ValueError(
            f"actions must have shape (…, {expected[0]}, {expected[1]}), got "
            f"(…, {', '.join(map(str, actions))})."
        )
