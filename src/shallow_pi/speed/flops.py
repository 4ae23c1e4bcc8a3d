"""Floating-point operations and weight bytes of one inference, counted from the config.

A multiply-add counts two operations; matrix products and attention are counted, norms, activations
and the sampler's vector arithmetic are not (under 5 % together at any size of interest). With
`tuning.InferenceOptions` the counts follow what the sampler really runs.
"""

import dataclasses
from collections.abc import Collection

from shallow_pi.inference import tuning
from shallow_pi.models import gemma, pi0

BYTES = {"bfloat16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Count:
    """Operations or bytes of one inference, by part."""

    # The image encoder, every camera.
    vision: int
    # The backbone over the prefix, once, and π0's state token where it joins the cache.
    prefix: int
    # One integration step of the action expert.
    step: int
    # Integration steps.
    num_steps: int

    @property
    def total(self) -> int:
        """Of the whole inference."""
        return self.vision + self.prefix + self.num_steps * self.step

    @property
    def by_part(self) -> dict[str, int]:
        """By the parts that the benchmark times; the prefix includes the image tower."""
        return {
            "image tower": self.vision,
            "prefix": self.vision + self.prefix,
            "one step": self.step,
            "whole": self.total,
        }


def inference_flops(
    config: pi0.Pi0Config, *, batch: int = 1, num_steps: int = 10, options: tuning.InferenceOptions
) -> Count:
    """Operations of `sampler.sample_actions` for a batch with these cameras and prompt length."""
    d, e, length = config.backbone.width, config.expert.width, config.prefix_tokens
    whole = _layer(config.backbone, length, length)
    prefix = config.depth * whole
    if options.unrolled_layers:  # The last layer's queries are made with its keys and values.
        prefix += _projections(config.backbone, length)[0] - whole
    horizon, cached = config.action_horizon, length + (not config.pi05)
    if not config.pi05 and options.state_once:
        token = _layer(config.expert, 1, cached)
        prefix += config.depth * token + 2 * config.action_dim * e
        if options.unrolled_layers:
            prefix += _projections(config.expert, 1)[0] - token
    extra = not config.pi05 and not options.state_once
    step = config.depth * _layer(config.expert, horizon + extra, cached + horizon)
    step += 4 * config.action_horizon * config.action_dim * e  # In and out of the expert's width.
    step += _time(config, options)
    return Count(batch * _vision(config, d), batch * prefix, batch * step, num_steps)


def training_flops(
    student: pi0.Pi0Config,
    teacher: pi0.Pi0Config | None,
    *,
    batch: int,
    draws: int = 1,
    freeze: Collection[str] = (),
) -> int:
    """Useful operations of one training step: the teacher's pass and three of the student's.

    The backward pass counts twice the forward one. What remat computes again does not count, nor
    what the last layer adds to a prefix that nobody reads, nor a frozen tower more than once.

    Args:
      student: what is trained.
      teacher: None where no loss needs it.
      batch: observations.
      draws: (noise, time) pairs of each.
      freeze: parts that are not trained, "vision" among them or not.
    """
    useful = dataclasses.replace(tuning.ALL_OFF, unrolled_layers=True)

    def forward(config: pi0.Pi0Config | None) -> tuple[int, int]:
        """Of the image tower, and of the rest."""
        if config is None:
            return 0, 0
        count = inference_flops(config, batch=batch, num_steps=draws, options=useful)
        return count.vision, count.total - count.vision

    (own, layers), (others, teachers) = forward(student), forward(teacher)
    return 3 * layers + teachers + (own if "vision" in freeze else 3 * own + others)


def weight_bytes(
    config: pi0.Pi0Config, *, num_steps: int = 10, options: tuning.InferenceOptions | None = None
) -> Count:
    """Bytes of weights read at batch 1: what bandwidth alone makes an inference take.

    With `options` that write layers out, those of the last layer that nobody reads do not count.
    """
    size = BYTES[config.dtype]
    image, d = config.image, config.backbone.width
    layer = 4 * image.width**2 + 2 * image.width * image.mlp_dim
    vision = image.depth * layer + 3 * image.patch_size**2 * image.width + image.width * d
    prefix = config.depth * _layer_weights(config.backbone)
    if options is not None and options.unrolled_layers:
        prefix += _projections(config.backbone, 1)[0] // 2 - _layer_weights(config.backbone)
    step = config.depth * _layer_weights(config.expert)
    return Count(size * vision, size * prefix, size * step, num_steps)


def _vision(config: pi0.Pi0Config, out_width: int) -> int:
    c, tokens = config.image, config.image_tokens
    layer = 2 * tokens * (4 * c.width**2 + 2 * c.width * c.mlp_dim) + 4 * tokens**2 * c.width
    patches = 2 * tokens * 3 * c.patch_size**2 * c.width
    return len(config.cameras) * (patches + c.depth * layer + 2 * tokens * c.width * out_width)


def _projections(c: gemma.GemmaConfig, tokens: int) -> tuple[int, int]:
    """Into queries, keys and values; and out of the heads."""
    heads = c.num_heads * c.head_dim
    into = 2 * tokens * c.width * (heads + 2 * c.num_kv_heads * c.head_dim)
    return into, 2 * tokens * heads * c.width


def _layer(c: gemma.GemmaConfig, tokens: int, keys: int) -> int:
    attention = 4 * tokens * keys * c.num_heads * c.head_dim
    return sum(_projections(c, tokens)) + attention + 6 * tokens * c.width * c.mlp_dim


def _layer_weights(c: gemma.GemmaConfig) -> int:
    return sum(_projections(c, 1)) // 2 + 3 * c.width * c.mlp_dim


def _time(config: pi0.Pi0Config, options: tuning.InferenceOptions) -> int:
    """What the flow time costs a step."""
    e = config.expert.width
    if not config.pi05:
        halves = 2 * config.action_horizon * 2 * e * e  # The actions' half in, and out.
        return halves if options.time_tables else halves + 2 * e * e
    return 0 if options.time_tables else 4 * e * e + (2 * config.depth + 1) * 6 * e * e
