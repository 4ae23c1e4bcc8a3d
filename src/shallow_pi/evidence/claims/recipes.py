"""The policies of the studies: how each one is made, and the name that says so.

A recipe is everything that tells one trained policy from another. Its `slug` names the policy's
folder and its lines in the results, so it spells out whatever differs from the default student:
`l6-s0`, `l6-velocity0-attention0-s2`, `l4-firstlayers-s1`, `teacher-l9-s0`,
`l6-cut-s0` (not trained).
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

from shallow_pi.distill import layer_map, losses
from shallow_pi.models import captures, gemma, layer_table, pi0

# Draws of noise and time for each observation.
DRAWS = 2
# Scores of a teacher's layers, beside its parameters.
SCORES_FILE = "layer_scores.json"
# The policy that is the simulator's own script.
EXPERT = "expert"


@dataclasses.dataclass(frozen=True, order=True)
class Recipe:
    """One policy of a study. The defaults are the paper's student on the tabletop."""

    # "student" is distilled or fine-tuned from the teacher below, "teacher" is trained from
    # nothing on the task loss.
    role: Literal["student", "teacher"] = "student"
    # Layers of both towers.
    depth: int = 6
    # Slug of the teacher; empty for a teacher.
    teacher: str = "teacher-l18-s0"
    # Teacher layers that the student copies: a strategy.
    strategy: layer_map.Strategy = "uniform"
    # Copy the teacher's layers, or start from random parameters.
    init: Literal["cut", "random"] = "cut"
    # Weights of the losses.
    task: float = 1.0
    velocity: float = 1.0
    attention: float = 0.1
    reflow: float = 0.0
    # Layer whose attention is compared, and the form in which it is.
    attention_layer: Literal["first", "middle", "last"] = "middle"
    heads: losses.Attention = "per_head"
    # Tokens whose attention is compared.
    queries: captures.Queries = "actions"
    # Layers of the image tower, and image tokens of a camera; 0: the teacher's. A cut tower has the
    # vision loss.
    vision_depth: int = 0
    image_tokens: int = 0
    # Pool the image tokens in cells, or choose them by a scorer, which has the scorer loss.
    token_choice: Literal["pool", "scored"] = "pool"
    # Integration steps that the student is deployed with; the reflow loss looks at their times.
    num_steps: int = 10
    # Optimizer steps, and observations in each.
    steps: int = 1200
    batch_size: int = 64
    # Episodes of the expert that the policy is trained on.
    demonstrations: int = 400
    # Tasks of the suite that its demonstrations show, as often as they are named; empty for all.
    tasks: tuple[str, ...] = ()
    # The simulator whose expert demonstrates, by its name in `simulator.SUITES`.
    suite: Literal["tabletop", "metaworld_mt10"] = "tabletop"
    # Learning rate after the warm-up.
    peak_lr: float = 2e-3
    # Of the order of the data, noise, times and random parameters.
    seed: int = 0
    # Of a teacher: its change to the sizes of the tasks' config (`MODELS`); empty for none. A
    # student has its teacher's.
    model: Literal["", "half_width", "reads_last"] = ""

    @property
    def slug(self) -> str:
        """A name for files that tells the recipe from every other."""
        default = DEFAULTS[self.suite, self.role]
        parts = [f"l{self.depth}"] if self.role == "student" else ["teacher", f"l{self.depth}"]
        if self.suite != STUDENT.suite:
            parts.append(self.suite.replace("_", ""))
        if self.steps == 0:
            parts.append("cut" if self.init == "cut" else "untrained")
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in ("role", "depth", "seed") or value == getattr(default, name):
                continue
            if name == "steps" and not value:
                continue
            if name == "tasks":
                parts.append("+".join(value))
                continue
            word = (
                value
                if name in ("init", "heads", "token_choice", "model")
                else f"{name}{_short(value)}"
            )
            word = f"{value}layers" if name == "strategy" else word
            parts.append(str(word).replace("_", ""))
        return "-".join([*parts, f"s{self.seed}"])

    @property
    def losses(self) -> losses.Losses:
        """The weights, and the layer whose attention is compared."""
        layer = {"first": 0, "middle": -1, "last": self.depth - 1}[self.attention_layer]
        return losses.Losses(
            task=self.task,
            velocity=self.velocity,
            attention=self.attention,
            reflow=self.reflow,
            vision=float(self.vision_depth > 0),
            scorer=float(self.token_choice == "scored"),
            attention_queries=self.queries,
            attention_heads=self.heads,
            attention_layer=layer,
        )


def _half_width(model: pi0.Pi0Config) -> pi0.Pi0Config:
    """Half of all widths: of the streams, their heads and their MLPs, and of the image tower."""

    def half(sizes: gemma.GemmaConfig) -> gemma.GemmaConfig:
        return dataclasses.replace(
            sizes, width=sizes.width // 2, mlp_dim=sizes.mlp_dim // 2, head_dim=sizes.head_dim // 2
        )

    image = model.image
    image = dataclasses.replace(image, width=image.width // 2, mlp_dim=image.mlp_dim // 2)
    backbone, expert = half(model.backbone), half(model.expert)
    return dataclasses.replace(model, backbone=backbone, expert=expert, image=image)


def _reads_last(model: pi0.Pi0Config) -> pi0.Pi0Config:
    """As many layers of the backbone, then of the expert, which reads its last state alone."""
    backbone, expert = layer_table.reads_last(model.depth, model.depth)
    return dataclasses.replace(
        model, depth=2 * model.depth, backbone_layers=backbone, expert_layers=expert
    )


# Of teachers: changes to a config's sizes, by the recipe's `model`.
MODELS: dict[str, Callable[[pi0.Pi0Config], pi0.Pi0Config]] = {
    "half_width": _half_width,
    "reads_last": _reads_last,
}


def teacher_model(recipe: Recipe, sizes: pi0.Pi0Config) -> pi0.Pi0Config:
    """The architecture of a teacher; `sizes` are those of its tasks' config, at any depth."""
    model = pi0.at_depth(sizes, recipe.depth)
    return MODELS[recipe.model](model) if recipe.model else model


STUDENT = Recipe()
TEACHER = Recipe(
    role="teacher",
    depth=18,
    teacher="",
    init="random",
    velocity=0.0,
    attention=0.0,
    steps=12_000,
    demonstrations=8_000,
)
METAWORLD_STUDENT = Recipe(
    teacher="teacher-l18-metaworldmt10-s0",
    suite="metaworld_mt10",
    peak_lr=1e-3,
    steps=2000,
    batch_size=32,
    demonstrations=300,
)
METAWORLD_TEACHER = dataclasses.replace(
    TEACHER,
    suite="metaworld_mt10",
    peak_lr=1e-3,
    steps=8_000,
    batch_size=32,
    demonstrations=1_000,
)
# Those in assets/, which need no training.
PACKAGED = (TEACHER, METAWORLD_TEACHER)
# By suite and role: slugs tell what differs from these.
DEFAULTS = {
    (recipe.suite, recipe.role): recipe
    for recipe in (STUDENT, TEACHER, METAWORLD_STUDENT, METAWORLD_TEACHER)
}
# By suite and tasks: the config in train_configs/ with their sizes, simulator and noise.
CONFIGS: dict[tuple[str, tuple[str, ...]], str] = {
    ("tabletop", ()): "pi0_tabletop",
    ("tabletop", ("around",)): "pi0_tabletop_around",
    ("metaworld_mt10", ()): "pi0_metaworld_mt10",
}


def config(recipe: Recipe) -> str:
    """Name of the config whose model a policy or its teacher has, and whose simulator it learns."""
    return CONFIGS[recipe.suite, recipe.tasks]


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)
