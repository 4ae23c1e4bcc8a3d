"""Floating-point operations and weight bytes of one inference, counted from the config.

A multiply-add counts two operations; matrix products and attention are counted, norms, activations
and the sampler's vector arithmetic are not (under 5 % together at any size of interest). With
`tuning.InferenceOptions` the counts follow what the sampler runs.
"""

import dataclasses
from collections.abc import Collection

from shallow_pi.distill import spec as specs
from shallow_pi.distill import step
from shallow_pi.inference import quantize, tuning
from shallow_pi.models import layer_table, parameters, pi0

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


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
        """The sum over the whole inference."""
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
    tokens, image, sizes = config.patches, config.image, pi0.axis_sizes(config)
    vision = 2 * tokens * parameters.count(sizes, "PaliGemma/img/")
    vision += image.depth * 4 * tokens**2 * image.width
    length, horizon = config.prefix_tokens, config.action_horizon
    cached = length + (not config.pi05)
    unread = options.unrolled_layers or not config.is_even
    prefix = _layers(config, "", length, length, unread) + _scorer(config)
    if not config.pi05 and options.state_once:
        prefix += _layers(config, "_1", 1, cached, unread)
        prefix += 2 * parameters.count(sizes, "state_proj")
    extra = not config.pi05 and not options.state_once
    step = _layers(config, "_1", horizon + extra, cached + horizon)
    step += 2 * horizon * parameters.count(sizes, "action_in_proj", "action_out_proj")
    step += _time(config, options)
    return Count(batch * len(config.cameras) * vision, batch * prefix, batch * step, num_steps)


def training_flops(
    student: pi0.Pi0Config,
    teacher: pi0.Pi0Config | None,
    *,
    batch: int,
    draws: int = 1,
    freeze: Collection[str] = (),
    reflow: bool = False,
) -> int:
    """Useful operations of one training step: the teacher's pass and three of the student's.

    With the reflow loss, the teacher's sampler runs its suffix ten times for every draw, and the
    student has twice the draws.

    The backward pass counts twice the forward one. Recomputation by remat does not count, nor the
    unread prefix of the last layer, and a frozen tower counts once for both models.

    `draws` are pairs of noise and time for each observation; `teacher` is None if no loss needs it.
    """
    useful = dataclasses.replace(tuning.ALL_OFF, unrolled_layers=True)

    def forward(config: pi0.Pi0Config | None, suffixes: int) -> tuple[int, int]:
        """Operations of the image tower, and of the rest, with as many passes of the suffix."""
        if config is None:
            return 0, 0
        count = inference_flops(config, batch=batch, num_steps=suffixes, options=useful)
        return count.vision, count.total - count.vision

    own, layers = forward(student, draws * (1 + reflow))
    others, teachers = forward(teacher, draws * (1 + reflow * step.TEACHER_STEPS))
    return 3 * layers + teachers + (own if "vision" in freeze else 3 * own + others)


def of_step(spec: specs.Spec, batch: int) -> int:
    """`training_flops` of a step over a batch."""
    return training_flops(
        spec.student,
        spec.teacher if spec.losses.needs_teacher else None,
        batch=batch,
        draws=spec.draws,
        freeze=spec.freeze,
        reflow=spec.losses.reflow > 0,
    )


def weight_bytes(
    config: pi0.Pi0Config, *, num_steps: int = 10, options: tuning.InferenceOptions | None = None
) -> Count:
    """Bytes of weights read at batch 1: with the memory bandwidth, a lower bound of the time.

    With `options` that unroll layers, the unread ones of the last layer do not count; matrices in 8
    bits count one byte an element.
    """
    options = options or tuning.ALL_OFF
    sizes = pi0.axis_sizes(config)
    inside = parameters.count(sizes, f"{parameters.ENCODER}/")
    around = parameters.count(sizes, "PaliGemma/img/") - inside
    unread = options.unrolled_layers or not config.is_even
    prefix = _layers(config, "", 1, 0, unread) // 2
    scorer = BYTES[config.dtype] * _scorer_matrices(config)
    step = _layers(config, "_1", 1, 0) // 2

    def size(part: quantize.Part) -> int:
        rounded = options.quantize != "none" and part in options.quantized
        return 1 if rounded else BYTES[config.dtype]

    vision = size("vision") * inside + BYTES[config.dtype] * around
    return Count(vision, size("backbone") * prefix + scorer, size("expert") * step, num_steps)


def _layers(
    config: pi0.Pi0Config, end: str, tokens: int, keys: int, last_unread: bool = False
) -> int:
    """All layers of the backbone (`end` "") or the expert ("_1") over these tokens.

    Where nobody reads the last layer's tokens, it computes queries, keys and values alone, and what
    comes after the expert's last layer nothing.
    """
    sizes = pi0.axis_sizes(pi0.at_depth(config, 1))
    names = [f"{parameters.LAYERS}/attn/{name}_einsum{end}/" for name in ("q", "kv", "attn_vec")]
    into = 2 * tokens * parameters.count(sizes, *names[:2])
    whole = 2 * tokens * parameters.count(sizes, *names, f"{parameters.LAYERS}/mlp{end}/")
    whole += 4 * tokens * keys * config.backbone.num_heads * config.backbone.head_dim
    keys_values = 2 * tokens * parameters.count(sizes, names[1])
    total, last = 0, layer_table.last_read(config.layers)
    for i, kind in enumerate(config.layers):
        half = kind.expert if end else kind.backbone
        if half == "absent" or (last_unread and i > last):
            continue
        if half == "keys_values":
            total += keys_values
        else:
            total += into if last_unread and i == last else whole
    return total


def _scorer_matrices(config: pi0.Pi0Config) -> int:
    return parameters.count(pi0.axis_sizes(config), "image_scorer") if config.scored_tokens else 0


def _scorer(config: pi0.Pi0Config) -> int:
    """Scores of every patch, and the product that takes the kept ones."""
    if not config.scored_tokens:
        return 0
    patches, width = len(config.cameras) * config.patches, config.backbone.width
    asked = parameters.count(pi0.axis_sizes(config), "image_scorer/prompt")
    scores = patches * (_scorer_matrices(config) - asked) + asked
    return 2 * (scores + patches * config.scored_tokens * width)


def _time(config: pi0.Pi0Config, options: tuning.InferenceOptions) -> int:
    """The MLP of actions and time, or of time alone, in one step."""
    sizes = pi0.axis_sizes(config)
    if config.pi05:
        adaptive = (f"{parameters.LAYERS}/pre_", "PaliGemma/llm/final_norm_1")
        return 0 if options.time_tables else 2 * parameters.count(sizes, "time_mlp", *adaptive)
    half = parameters.count(sizes, "action_time_mlp_in") // 2
    actions = half + parameters.count(sizes, "action_time_mlp_out")
    return 2 * config.action_horizon * actions + (0 if options.time_tables else 2 * half)
