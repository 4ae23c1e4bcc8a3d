"""The static part of a step: what is fixed before the first one, checked as a whole.

The models, the optimizer, the losses and how the step is executed. It is hashable, so that a jitted
step takes it as a static argument. Errors name the flags of a run that contradict each other.
"""

import dataclasses

import optax

from shallow_pi.distill import layer_map as layer_maps
from shallow_pi.distill import losses
from shallow_pi.distill import student as students
from shallow_pi.inference import quantize as quantization
from shallow_pi.models import captures, layers, pi0
from shallow_pi.models import observation as observations


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of a step."""

    student: pi0.Pi0Config
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    losses: losses.Losses
    # The teacher; None trains on the task loss alone.
    teacher: pi0.Pi0Config | None = None
    # Its layers that the student was cut from; None before they are chosen, or without a teacher.
    layer_map: layer_maps.LayerMap | None = None
    # Products in 8 bits that the student is deployed with: it sees its weights rounded.
    quantize: quantization.Scheme = "none"
    # Parts of the student that stay the teacher's.
    freeze: tuple[students.Part, ...] = ()
    augmentation: observations.Augmentation = observations.NO_AUGMENTATION
    # (noise, time) pairs drawn for every observation; they share the prefix.
    draws: int = 1
    # Integration steps that the student is deployed with; the reflow loss looks at their times.
    num_steps: int = 10
    # Microbatches a step is cut into; the result is that of the whole batch.
    accumulation: int = 1
    ema_decay: float | None = None
    # Execution of both models; the teacher's layers are always scanned.
    execution: layers.Execution = layers.DEFAULT_EXECUTION
    # The teacher's layers lie in the host's memory, and are copied one by one.
    offload_teacher: bool = False

    def __post_init__(self) -> None:
        counts = ("draws", "accumulation", "num_steps")
        if low := [f"{name} {getattr(self, name)}" for name in counts if getattr(self, name) < 1]:
            raise ValueError(f"{', '.join(counts)} are at least 1, got {', '.join(low)}.")
        if self.layer_map is not None and self.teacher is None:
            raise ValueError("a layer map names layers of a teacher, and there is none.")
        if self.losses.vision is None:
            resolved = dataclasses.replace(self.losses, vision=float(self.cuts_tower))
            object.__setattr__(self, "losses", resolved)
        scored = self.student.scored_tokens > 0
        if self.losses.scorer is None:
            resolved = dataclasses.replace(self.losses, scorer=float(scored))
            object.__setattr__(self, "losses", resolved)
        if self.losses.scorer and not scored:
            raise ValueError(
                f"--losses.scorer {self.losses.scorer:g} trains a scorer that is not there: give "
                "--student.image-token-choice scored and --student.image-tokens, or leave it out."
            )
        if self.losses.needs_teacher and self.teacher is None:
            given = {name: getattr(self.losses, name) for name in losses.TERMS[1:]}
            flags = [f"--losses.{name} {weight}" for name, weight in given.items() if weight]
            raise ValueError(
                f"weights need a teacher: {', '.join(flags)}; give one, or set them to 0."
            )
        if self.freeze and self.teacher is None:
            raise ValueError(
                f"--student.freeze {' '.join(self.freeze)} keeps parts of a teacher, and there is "
                "none: leave it out."
            )
        if self.teacher is not None:
            students.check_pair(self.teacher, self.student, self.layer_map)
            if self.offload_teacher and not self.teacher.is_even:
                raise ValueError(
                    "--teacher.offload copies layers that are whole in both streams, and the "
                    "teacher has others (--model.backbone-layers, --model.expert-layers): leave "
                    "it out."
                )
        if "vision" in self.freeze and (self.cuts_tower or self.losses.vision):
            raise ValueError(
                "--student.freeze vision keeps the teacher's image tower, which "
                "--student.vision-depth cuts and --losses.vision trains: leave it out, or both."
            )
        self._check_attention()

    @property
    def cuts_tower(self) -> bool:
        """True if the student's image tower has not all of the teacher's layers."""
        return self.teacher is not None and self.student.image.depth != self.teacher.image.depth

    def _check_attention(self) -> None:
        layer, queries = self.losses.attention_layer, self.losses.attention_queries
        there, layers = self._attending, ", ".join(map(str, self._attending))
        kind = {"actions": "an expert", "text": "a whole backbone", "all": "both halves"}[queries]
        if layer != -1 and layer not in there:
            raise ValueError(
                f"--losses.attention-layer must be -1 or one of {layers or 'none'}, the student's "
                f"layers with {kind}; got {layer}."
            )
        if queries != "actions" and self.student.scored_tokens:
            raise ValueError(
                f"--losses.attention-queries {queries}: a scorer (--student.image-token-choice "
                "scored) learns from the attention of the actions; give actions."
            )
        if queries == "actions" or not self.losses.attention:
            return
        if not there:
            raise ValueError(
                f"--losses.attention-queries {queries} compares a layer with {kind}, and the "
                "student has none: compare actions."
            )
        teacher = self.teacher or self.student
        if queries == "all" and self.student.pooled_tokens != teacher.pooled_tokens:
            raise ValueError(
                "--losses.attention-queries all compares token by token, and "
                f"--student.image-tokens {self.student.pooled_tokens} keeps fewer than the teacher "
                "has: give actions or text, or keep its image tokens."
            )

    @property
    def _attending(self) -> list[int]:
        """The student layers that have the halves whose attention is compared."""
        queries = self.losses.attention_queries
        return [i for i, k in enumerate(self.student.layers) if not captures.lacks(k, queries)]

    @property
    def attention_layers(self) -> tuple[int, int]:
        """The pair of (student, teacher) layers whose attention is compared."""
        if self.layer_map is None:
            raise ValueError(
                "attention is compared with a layer of the teacher, and none is chosen yet: a "
                "strategy that measures does so in a run; name layers with --student.layers."
            )
        layer = self.losses.attention_layer
        if layer == -1:  # The middle one, of the prompt the first.
            middle = (len(self._attending) - 1) // 2
            layer = self._attending[0 if self.losses.attention_queries == "text" else middle]
        return layer, self.layer_map.layers[layer]
