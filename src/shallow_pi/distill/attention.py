"""The attention of student and teacher, as the attention loss compares it.

Whose attention is a switch (`losses.Losses.attention_queries`): that of the action tokens (the
paper's loss), of every token of both streams, or of the prompt over the image tokens. Keys are of
the prefix throughout, so that suffix tokens are compared by what they read of the observation.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from shallow_pi.distill import losses
from shallow_pi.models import captures, pi0, pooling, scorer


def divergence(
    config: pi0.Pi0Config,
    switches: losses.Losses,
    student: captures.PrefixAttention,
    teacher: captures.PrefixAttention,
    actions: Bool[Array, "b r ah"],
    choice: scorer.Choice | None = None,
) -> Float[Array, "b r *ah"]:
    """KL(teacher ‖ student) of each action token, or its mean over the tokens compared.

    Args:
      config: the student.
      switches: whose attention, and how heads are compared.
      student: its attention, of at least r draws.
      teacher: its own, over all image tokens.
      actions: the actions that count.
      choice: the image tokens that the student's scorer chose, which goes with "actions".

    Returns:
      For "actions" one value for each, else one for each draw.
    """
    valid, heads = student.valid, switches.attention_heads
    match switches.attention_queries:
        case "actions":
            if choice is not None:
                assert teacher.logits is not None, "asked for"
                chosen = scorer.take_logits(teacher.logits, choice.kept)
                teacher = teacher._replace(logits=chosen)
            return _of_suffix(config, student, teacher, valid, heads, actions.shape[1])
        case "text":
            images = len(config.cameras) * config.image_tokens
            of_images = valid & (jnp.arange(valid.shape[1])[None] < images)
            own = _of_prefix(config, student, teacher, of_images, heads)
            found = losses.masked_mean((own[:, None], valid[:, None, images:]))
            return jnp.broadcast_to(found, actions.shape[:2])
        case "all":
            own = _of_prefix(config, student, teacher, valid, heads)
            others = _of_suffix(config, student, teacher, valid, heads, actions.shape[1])
            state = jnp.ones((*actions.shape[:2], others.shape[2] - actions.shape[2]), bool)
            suffix = jnp.concatenate([state, actions], axis=2)
            return losses.masked_mean((own[:, None], valid[:, None]), (others, suffix))


def _of_prefix(
    config: pi0.Pi0Config,
    student: captures.PrefixAttention,
    teacher: captures.PrefixAttention,
    keys: Bool[Array, "b s"],
    heads: losses.Attention,
) -> Float[Array, "b p"]:
    assert student.prefix_logits is not None, "asked for"
    assert teacher.prefix_logits is not None, "the same"
    over_cells = _over_cells(config, teacher.prefix_logits)
    return losses.attention_loss(student.prefix_logits, over_cells, keys[:, None, None, :], heads)


def _of_suffix(
    config: pi0.Pi0Config,
    student: captures.PrefixAttention,
    teacher: captures.PrefixAttention,
    keys: Bool[Array, "b s"],
    heads: losses.Attention,
    draws: int,
) -> Float[Array, "b r t"]:
    assert student.logits is not None, "asked for"
    assert teacher.logits is not None, "the same"
    own, over_cells = student.logits[:, :draws], _over_cells(config, teacher.logits)
    return losses.attention_loss(own, over_cells, keys[:, None, None, None, :], heads)


def of_scorer(
    choice: scorer.Choice,
    cameras: Bool[Array, "b c"],
    teacher: captures.PrefixAttention,
    actions: Bool[Array, "b r ah"],
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """The scorer loss, and the share of the teacher's attention to images that is kept.

    The teacher's attention is over all patches. Without any to images the share is 1.
    """
    assert teacher.logits is not None, "asked for"
    mass = losses.attention_mass(teacher.logits, teacher.valid, actions)
    patches = mass[:, : choice.scores[0].size].reshape(choice.scores.shape)
    kept = jnp.sum(scorer.take(patches, choice.kept), axis=(1, 2))
    total = jnp.sum(patches, axis=(1, 2))
    share = jnp.where(total > 0, kept / jnp.where(total > 0, total, 1.0), 1.0)
    return losses.scorer_loss(choice.scores, patches, cameras), share


def _over_cells(config: pi0.Pi0Config, logits: Float[Array, "*b s"]) -> Float[Array, "*b p"]:
    """The teacher's logits over the cells whose means the student sees.

    They are so already if the teacher sees the same means, or the student has a scorer.
    """
    if config.scored_tokens or logits.shape[-1] == config.prefix_tokens:
        return logits
    return pooling.pool_logits(logits, len(config.cameras), config.grid, config.image_tokens)
