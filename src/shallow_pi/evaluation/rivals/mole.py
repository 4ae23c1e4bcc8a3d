"""MoLE-VLA (2503.20384): a router that picks the layers of each input, self-distilled.

Our reimplementation of the idea, after the authors' code (RoyZry98/MoLe-VLA-Pytorch) where it and
the paper differ: the gates are the hard top-k of a softmax with a straight-through gradient, as in
the code, without the paper's Gumbel noise. Routed once, ahead of the layers:

    logits = (spatial(mean image token) + temporal(prompt)) · sigmoid(w · first prompt token + b)
    h_{k+1} = G_k·layer_k(h_k) + (1 − G_k)·h_k

The router is a shared projection, an MLP over the mean image token, and one encoder layer over the
prompt. The loss is task + velocity + ½ L_cog + 0.1 L_balance. [our choice]: one gate for each layer
of both streams, since expert layer k reads the keys of backbone layer k (theirs gates the language
model alone); the velocity loss, which every rival here has; the cognition token is the mean of the
action tokens behind the last layer; the teacher is the trained one, all layers on, not a running
mean of the student.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from shallow_pi.deploy import policy as deployed
from shallow_pi.distill import gates
from shallow_pi.evaluation.rivals import gated, rival, training
from shallow_pi.inference import forward
from shallow_pi.models import layers, pi0
from shallow_pi.models import observation as observations

# Width of the router, or the backbone's where that is less; its heads.
WIDTH, HEADS = 1024, 8
COGNITION, BALANCE = 0.5, 0.1


@dataclasses.dataclass(frozen=True)
class MoLE:
    """Options."""

    # Layers that are on for each input.
    layers: int = 6
    # Training steps; a student's on the tabletop.
    steps: int = 1200

    def __post_init__(self) -> None:
        if min(self.layers, self.steps) < 1:
            raise ValueError(f"mole: layers and steps are at least 1, got {self}")

    def make(self, material: rival.Material, folder: pathlib.Path) -> deployed.Policy:
        """Train teacher and router together; the policy holds all layers."""
        model = material.model
        if self.layers > model.depth:
            raise ValueError(f"mole: {self.layers} layers of {model.depth} cannot be on")
        start = training.Trained(material.params, self.untrained(model, material.params)[2])
        named = f"mole-{self.layers}"
        teacher = material.params

        def loss(held: training.Trained, seen: training.Seen) -> Float[Array, ""]:
            return self.loss(model, held, teacher, seen)

        kept = training.fit(material, model, start, loss, folder, steps=self.steps, label=named)
        return rival.policy(
            material, model, training.cast(model, kept.model), self.sample, kept.own
        )

    def loss(
        self, model: pi0.Pi0Config, held: training.Trained, teacher: PyTree, seen: training.Seen
    ) -> Float[Array, ""]:
        """Task, velocity, cognition and balance."""
        drawn, images = seen.drawn, seen.image_tokens.shape[1]
        given = (drawn.observation.state, drawn.x_t, drawn.t)
        prefix = gates.embed(model, held.model, drawn.observation, seen.image_tokens)
        soft = jax.nn.softmax(logits(held.own, prefix, images), axis=-1)
        hard = top(soft, self.layers)
        # The value of the hard choice, the gradient of the soft one.
        opened = (hard + soft - jax.lax.stop_gradient(soft)).T
        own = gates.run(model, held.model, prefix, *given, opened).suffix[-1]
        v = gates.read(model, held.model, own, drawn.t)
        whole = gates.embed(model, teacher, drawn.observation, seen.image_tokens)
        theirs = jax.lax.stop_gradient(gates.run(model, teacher, whole, *given).suffix[-1])
        horizon = model.action_horizon
        known = cognition(theirs[:, :, -horizon:], own[:, :, -horizon:])
        balance = jnp.mean(hard * soft)
        return training.task_and_velocity(v, seen) + COGNITION * known + BALANCE * balance

    def sample(
        self,
        config: pi0.Pi0Config,
        held: rival.Weights,
        observation: observations.Observation,
        noise: Float[Array, "b ah ad"],
    ) -> Float[Array, "b ah ad"]:
        """Route, then run the layers that are on."""
        found = forward.embed_prefix(config, held.prepared, observation)
        prefix = gates.Prefix(found.tokens, found.valid)
        soft = jax.nn.softmax(logits(held.extra, prefix, rival.images(config)), axis=-1)
        opened = top(soft, self.layers).T > 0
        return gated.sample(config, held.prepared, *prefix, observation.state, noise, opened)

    def untrained(
        self, config: pi0.Pi0Config, params: PyTree
    ) -> tuple[pi0.Pi0Config, rival.Sample, PyTree]:
        """The teacher, and a router that has learned nothing."""
        del params
        return config, self.sample, init(config, jax.random.key(0))

    def operations(self, config: pi0.Pi0Config, num_steps: int) -> int:
        """Of as many layers as are on, and of the router over the prompt and once."""
        count, one = rival.count(config, self.layers, num_steps), rival.layer(config)
        width = min(WIDTH, config.backbone.width)
        per_word = config.backbone.width * width + 8 * width**2 + 2 * config.max_token_len * width
        router = 2 * (config.max_token_len + 1) * per_word
        # A gate that may close decides on a whole layer: the last is complete too.
        return count.vision + self.layers * one.prefix + num_steps * count.step + router

    def parameters_held(self, config: pi0.Pi0Config) -> int:
        """All layers, and the router."""
        router = jax.eval_shape(lambda: init(config, jax.random.key(0)))
        return rival.held(config) + rival.size(router)


def init(config: pi0.Pi0Config, key: Array) -> PyTree:
    """The router's parameters."""
    width = min(WIDTH, config.backbone.width)
    keys = iter(jax.random.split(key, 10))

    def dense(inward: int, outward: int, scale: float = 1.0) -> PyTree:
        spread = scale * inward**-0.5
        kernel = spread * jax.random.normal(next(keys), (inward, outward))
        return {"kernel": kernel, "bias": jnp.zeros(outward)}

    return {
        "project": dense(config.backbone.width, width),
        "spatial_in": dense(width, width // 2),
        "spatial_out": dense(width // 2, config.depth),
        "qkv": dense(width, 3 * width),
        "attended": dense(width, width),
        "mlp_in": dense(width, 2 * width),
        "mlp_out": dense(2 * width, width),
        "norms": jnp.ones((2, width)),
        "temporal": dense(width, config.depth),
        "temperature": dense(width, 1),
    }


def logits(router: PyTree, prefix: gates.Prefix, images: int) -> Float[Array, "b l"]:
    """One for each layer, of a prefix whose image tokens come first."""
    tokens = layers.dense(router["project"], prefix.tokens.astype(jnp.float32))
    valid = prefix.valid.astype(jnp.float32)[..., None]
    seen = _mean(tokens[:, :images], valid[:, :images])
    spatial = jax.nn.gelu(layers.dense(router["spatial_in"], seen))
    spatial = layers.dense(router["spatial_out"], spatial)
    words = tokens[:, images:]
    first = words[:, 0]
    words = _encode(router, words, prefix.valid[:, images:])
    temporal = layers.dense(router["temporal"], _mean(words, valid[:, images:]))
    return (spatial + temporal) * jax.nn.sigmoid(layers.dense(router["temperature"], first))


def top(soft: Float[Array, "b l"], count: int) -> Float[Array, "b l"]:
    """1 for the largest of each row, 0 for the others."""
    _, index = jax.lax.top_k(soft, count)
    return jnp.sum(jax.nn.one_hot(index, soft.shape[-1]), axis=1)


def cognition(theirs: Float[Array, "b r t e"], own: Float[Array, "b r t e"]) -> Float[Array, ""]:
    """CogKD: features compared where the cognition tokens of both models look.

    M = attn(e_teacher, f_student) ⊙ attn(e_student, f_student), and the loss is
    ½ MSE(M⊙f_t, M⊙f_s) + ½ KL(student ‖ teacher) of the softmaxed features.
    """
    theirs, own = theirs.astype(jnp.float32), own.astype(jnp.float32)

    def looks(token: Float[Array, "b r e"]) -> Float[Array, "b r t"]:
        scores = jnp.einsum("bre,brte->brt", token, own)
        return jax.nn.softmax(scores * own.shape[-1] ** -0.5, axis=-1)

    mask = (looks(jnp.mean(theirs, axis=2)) * looks(jnp.mean(own, axis=2)))[..., None]
    squared = jnp.mean(jnp.square(mask * (theirs - own)))
    q, p = jax.nn.log_softmax(own, axis=-1), jax.nn.log_softmax(theirs, axis=-1)
    reverse = jnp.mean(jnp.sum(jnp.exp(q) * (q - p), axis=-1))
    return 0.5 * squared + 0.5 * reverse


def _encode(
    router: PyTree, x: Float[Array, "b t d"], valid: Bool[Array, "b t"]
) -> Float[Array, "b t d"]:
    """One encoder layer, norms behind the residuals as in the code."""
    b, t, width = x.shape
    heads = next(h for h in (HEADS, 4, 2, 1) if width % h == 0)
    parts = jnp.split(layers.dense(router["qkv"], x), 3, axis=-1)
    q, k, v = (part.reshape(b, t, heads, 1, -1) for part in parts)
    q = q * q.shape[-1] ** -0.5
    mixed = layers.attend(q, k[:, :, :, 0], v[:, :, :, 0], valid[:, None]).reshape(x.shape)
    x, _ = layers.rms_norm(x + layers.dense(router["attended"], mixed), router["norms"][0])
    hidden = jax.nn.relu(layers.dense(router["mlp_in"], x))
    return layers.rms_norm(x + layers.dense(router["mlp_out"], hidden), router["norms"][1])[0]


def _mean(x: Float[Array, "b t d"], valid: Float[Array, "b t 1"]) -> Float[Array, "b d"]:
    return jnp.sum(x * valid, axis=1) / jnp.maximum(jnp.sum(valid, axis=1), 1.0)
