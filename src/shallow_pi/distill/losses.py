"""The losses of Shallow-π and three more, unreduced, and the one masked sum that reduces them.

    L = w_task·‖v_θ − u‖² + w_velocity·‖v_θ − v_φ‖² + w_attention·KL(P_φ ‖ P_θ)
      + w_reflow·‖v_θ(z_s, s) − (ε − â)‖² + w_vision·‖i_θ − i_φ‖² + w_scorer·KL(p_φ ‖ softmax s_θ),
    z_s = s·ε + (1 − s)·â

φ is the teacher, θ the student; both see the same observation, noise and time. P is the attention
of the action tokens over the valid prefix keys at one layer of each model, renormalised over those
keys; for ablations that of all tokens, or of the prompt over the image tokens. â is the end point
of the teacher's sampler from the noise ε: along the straight line between them (reflow, arXiv
2209.03003, off by default), one or two integration steps reach what the teacher reaches in ten.
i are the image tokens, compared if the student's tower is cut. p is the teacher's attention to the
patches of a camera, averaged over heads, action tokens and draws; s are the scores by which the
student keeps some of the patches (`models.scorer`). Everything is float32. The paper does not state
the layer pair, the weights and `per_head`: they are our choices, by measurement (docs/evidence.md).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from shallow_pi.distill import flow
from shallow_pi.models import captures

Attention = Literal["per_head", "head_mean"]
# The fields of `Losses` that are weights, and all but the first look at the teacher.
TERMS = ("task", "velocity", "attention", "reflow", "vision", "scorer")
# The weight of every term.
Weights = Mapping[str, float | Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class Losses:
    """Weights and switches of the losses. A weight of 0 leaves that term out."""

    # Weight of the task loss: student velocity against the data's.
    task: float = 1.0
    # Weight of the velocity loss: student velocity against the teacher's.
    velocity: float = 1.0
    # Weight of the attention loss: student attention against the teacher's.
    attention: float = 1.0
    # Weight of the reflow loss, for few integration steps (--student.num-steps): student velocity
    # on the straight line from noise to the actions that the teacher samples from it.
    reflow: float = 0.0
    # Weight of the vision loss: image tokens of the student's tower against the teacher's. By
    # default 1 if --student.vision-depth cuts the tower, else 0.
    vision: float | None = None
    # Weight of the scorer loss: scores of image tokens against the teacher's attention. By
    # default 1 if a scorer chooses them (--student.image-token-choice scored), else 0.
    scorer: float | None = None
    # Share of the reflow loss's times that are those of the student's sampler (1 for one step; 1
    # and 1/2 for two). The others are uniform.
    reflow_deployed: float = 0.5
    # Compare attention maps head by head, or averaged over heads.
    attention_heads: Attention = "per_head"
    # Tokens whose attention is compared: "actions" over the prefix, "all" tokens over the
    # prefix (the paper reports that it destroys training), or the prompt's "text" over the image
    # tokens (Align-KD, arXiv 2412.01282). Meant for ablations.
    attention_queries: captures.Queries = "actions"
    # Student layer whose attention is compared; -1 is the action expert's middle layer, or
    # for "text" the backbone's first layer.
    attention_layer: int = -1
    # Leave actions past the end of an episode out of the losses. openpi counts them (its chunks
    # repeat the last action there).
    mask_padded_actions: bool = False

    def __post_init__(self) -> None:
        for name in TERMS:
            value = getattr(self, name)
            if value is None and name in ("vision", "scorer"):
                continue
            if not (isinstance(value, (int, float)) and 0 <= value < float("inf")):
                raise ValueError(f"--losses.{name} must be a finite weight of at least 0: {value}.")
        if not any(getattr(self, name) for name in TERMS):
            raise ValueError("losses: all weights are 0, there is nothing to train on.")
        if not 0 <= self.reflow_deployed <= 1:
            raise ValueError(
                f"--losses.reflow-deployed is a share from 0 to 1, got {self.reflow_deployed}."
            )
        if self.attention_layer < -1:
            raise ValueError(
                f"--losses.attention-layer is a student layer or -1, got {self.attention_layer}."
            )

    @property
    def weights(self) -> Weights:
        """The weight of every term, by name."""
        return {name: getattr(self, name) or 0.0 for name in TERMS}

    def counted(self, action_mask: Bool[Array, "b ah"]) -> Bool[Array, "b ah"]:
        """The actions that count: those before their episode's end, or all of an observation's.

        An observation without any action fills up a batch, and does not count.
        """
        if self.mask_padded_actions:
            return action_mask
        return jnp.broadcast_to(jnp.any(action_mask, axis=-1, keepdims=True), action_mask.shape)

    def only(self, **weights: float | None) -> "Losses":
        """The same with these weights of terms, and none of the other terms."""
        every: dict[str, Any] = {**dict.fromkeys(TERMS, 0.0), **weights}
        return dataclasses.replace(self, **every)

    @property
    def needs_teacher(self) -> bool:
        """True if any term compares with the teacher."""
        return any(self.weights[name] for name in TERMS[1:])


def task_loss(
    v_student: Float[Array, "*b ah ad"], u: Float[Array, "*b ah ad"]
) -> Float[Array, "*b ah"]:
    """Squared error of the student's velocity against the data's, mean over action dimensions."""
    flow.same_shape("v_student", v_student, "u", u)
    return jnp.mean(jnp.square(v_student.astype(jnp.float32) - u.astype(jnp.float32)), axis=-1)


def velocity_loss(
    v_student: Float[Array, "*b ah ad"], v_teacher: Float[Array, "*b ah ad"]
) -> Float[Array, "*b ah"]:
    """The same against a velocity of the teacher's, through which no gradient flows.

    The velocity loss compares with v_φ, the reflow loss with ε − â.
    """
    flow.same_shape("v_student", v_student, "v_teacher", v_teacher)
    return task_loss(v_student, jax.lax.stop_gradient(v_teacher))


def attention_loss(
    student_logits: Float[Array, "*b n ah s"],
    teacher_logits: Float[Array, "*b n ah s"],
    valid: Bool[Array, "#*b #n #ah s"],
    heads: Attention = "per_head",
) -> Float[Array, "*b ah"]:
    """KL(teacher ‖ student) of the attention over the valid keys, mean over heads.

    Logits are unmasked, of the action queries over the prefix keys. Rows without a single valid key
    give 0. Heads are compared one by one, or as the mean of their maps.
    """
    flow.same_shape("student_logits", student_logits, "teacher_logits", teacher_logits)
    log_student = masked_log_softmax(student_logits, valid)
    log_teacher = jax.lax.stop_gradient(masked_log_softmax(teacher_logits, valid))
    if heads == "head_mean":
        log_student = _mean_over_heads(log_student)
        log_teacher = _mean_over_heads(log_teacher)
    p_teacher = jnp.where(valid, jnp.exp(log_teacher), 0.0)
    return jnp.mean(jnp.sum(p_teacher * (log_teacher - log_student), axis=-1), axis=-2)


def vision_loss(
    tokens: Float[Array, "b n d"], reference: Float[Array, "b n d"], valid: Bool[Array, "b n"]
) -> Float[Array, " b"]:
    """Squared error of image tokens, mean over width and the tokens of cameras that exist.

    No gradient flows through the teacher's. An observation without a camera gives 0.
    """
    flow.same_shape("tokens", tokens, "reference", reference)
    reference = jax.lax.stop_gradient(reference.astype(jnp.float32))
    squares = jnp.mean(jnp.square(tokens.astype(jnp.float32) - reference), axis=-1)
    return masked_mean((squares, valid))


def scorer_loss(
    scores: Float[Array, "b c n"], attention: Float[Array, "b c n"], valid: Bool[Array, "b c"]
) -> Float[Array, " b"]:
    """KL(teacher's attention ‖ softmax of the scores) in each camera, mean over those that exist.

    Each camera's attention is renormalised, because each keeps its own best tokens. One without
    attention gives 0.
    """
    flow.same_shape("scores", scores, "attention", attention)
    attention = jax.lax.stop_gradient(attention.astype(jnp.float32))
    total = jnp.sum(attention, axis=-1, keepdims=True)
    p = attention / jnp.where(total > 0, total, 1.0)
    log_p = jnp.log(jnp.where(p > 0, p, 1.0))
    kl = jnp.sum(p * (log_p - jax.nn.log_softmax(scores.astype(jnp.float32), axis=-1)), axis=-1)
    return masked_mean((kl, valid))


def attention_mass(
    logits: Float[Array, "b r n ah s"], valid: Bool[Array, "b s"], actions: Bool[Array, "b r ah"]
) -> Float[Array, "b s"]:
    """The attention that the actions that count pay to each prefix key, mean over heads and draws.

    0 at keys that do not exist, and where no action counts.
    """
    seen = valid[:, None, None, None, :]
    p = jnp.where(seen, jnp.exp(masked_log_softmax(logits, seen)), 0.0)
    weights = actions.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weights, axis=(1, 2)), 1.0)
    return jnp.einsum("brnas,bra->bs", p, weights) / (p.shape[2] * count[:, None])


def masked_log_softmax(
    logits: Float[Array, "*b s"], valid: Bool[Array, "#*b s"]
) -> Float[Array, "*b s"]:
    """Log-probabilities over the valid keys in float32; 0 at the others, so that 0·log stays 0."""
    logits = jnp.where(valid, logits.astype(jnp.float32), 0.0)
    largest = jnp.max(jnp.where(valid, logits, -jnp.inf), axis=-1, keepdims=True)
    largest = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest), largest, 0.0))
    total = jnp.sum(jnp.where(valid, jnp.exp(logits - largest), 0.0), axis=-1, keepdims=True)
    log_total = jnp.log(jnp.where(total > 0, total, 1.0))
    return jnp.where(valid, logits - largest - log_total, 0.0)


def cosine(a: Float[Array, "*b ah ad"], b: Float[Array, "*b ah ad"]) -> Float[Array, "*b ah"]:
    """Cosine between two velocities of one action; 0 where one of them vanishes."""
    flow.same_shape("a", a, "b", b)
    product = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return jnp.sum(a * b, axis=-1) / jnp.where(product > 0, product, 1.0)


def masked_mean(*parts: tuple[Array, Array]) -> Float[Array, "*b"]:
    """Mean of values where their masks hold, over the last axis of all parts; of none 0."""
    total = sum(jnp.sum(jnp.where(mask, values, 0.0), axis=-1) for values, mask in parts)
    count = sum(jnp.sum(mask, axis=-1) for _, mask in parts)
    return total / jnp.maximum(count, 1).astype(jnp.float32)


def masked_sum(values: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, ""]:
    """Sum of the values where the mask holds."""
    flow.same_shape("values", values, "mask", mask)
    return jnp.sum(jnp.where(mask, values, 0.0))


def _mean_over_heads(log_probabilities: Float[Array, "*b n ah s"]) -> Float[Array, "*b 1 ah s"]:
    n = log_probabilities.shape[-3]
    total = jax.scipy.special.logsumexp(log_probabilities, axis=-3, keepdims=True)
    return total - jnp.log(jnp.float32(n))
