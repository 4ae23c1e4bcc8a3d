"""Policies and situations that several claims share."""

import dataclasses

from shallow_pi.evidence.claims import cells, recipes
from shallow_pi.evidence.claims.claim import Column, Variant
from shallow_pi.sims import tabletop

SEEDS = (0, 1, 2)
TASKS = tuple(task for task in tabletop.LAYOUTS if task != "around")

# Recipes of all trained policies that claims name, by slug.
RECIPES = {recipes.TEACHER.slug: recipes.TEACHER}


def students(label: str, **fields: object) -> Variant:
    """Students of the default recipe but for these fields, one for each seed."""
    return students_like(recipes.STUDENT, label, **fields)


def students_like(base: recipes.Recipe, label: str, /, **fields: object) -> Variant:
    """Students of the recipe `base` but for these fields, one for each seed."""
    found = [dataclasses.replace(base, seed=seed, **fields) for seed in SEEDS]  # type: ignore[arg-type]  # by name
    RECIPES.update({recipe.slug: recipe for recipe in found})
    return Variant(label, tuple(recipe.slug for recipe in found))


TEACHER = recipes.TEACHER.slug


def teacher_of(slug: str) -> str:
    """The policy that one was distilled from, with whose plans its own are compared."""
    recipe = RECIPES.get(slug.partition("--")[0])
    return recipe.teacher if recipe is not None and recipe.teacher else slug.partition("--")[0]


def in_words(num_steps: int) -> str:
    """Integration steps in a label."""
    return f"{num_steps} step{'s' if num_steps > 1 else ''}"


SUITE = cells.Situation(TASKS)
ELSEWHERE = cells.Situation(TASKS, start="elsewhere")
RELATION = cells.Situation(("relation",))


def around(num_steps: int) -> cells.Situation:
    """Past the pillar, a second's plan executed whole."""
    return cells.Situation(("around",), num_steps=num_steps, execute_steps=tabletop.EXECUTE_STEPS)


def plans(num_steps: int, tasks: tuple[str, ...] = tuple(tabletop.LAYOUTS)) -> cells.Situation:
    """Held-out observations; how plans would be executed does not matter."""
    return cells.Situation(tasks, num_steps=num_steps)


# Weights of task, velocity and attention loss.
THREE: dict[str, object] = {"task": 1.0, "velocity": 1.0, "attention": 0.1}
ALONE: dict[str, object] = {"task": 1.0, "velocity": 0.0, "attention": 0.0}
VELOCITY: dict[str, object] = {"task": 1.0, "velocity": 1.0, "attention": 0.0}
# Twice the steps without a teacher take as many operations as the steps with one: its 18 layers
# forward cost about what 6 cost forward and backward.
SCRATCH: dict[str, object] = {**ALONE, "init": "random", "steps": 2 * recipes.STUDENT.steps}

TEACHER_ROW = Variant("teacher, 18 layers", (TEACHER,))
STUDENT_ROW = students("three losses")
UNTRAINED_ROW = Variant("cut, not trained", (f"{TEACHER}--keep-0.3.7.10.14.17",))
TWO_ROW = students("2 layers", depth=2)
# Each raises success.
MORE, LONGER = 4 * recipes.STUDENT.demonstrations, 2 * recipes.STUDENT.steps
_SENSITIVE: dict[str, object] = {"strategy": "sensitivity", "demonstrations": MORE}
SENSITIVE_ROW = students(f"layers by sensitivity, {MORE:,} demonstrations", **_SENSITIVE)
LONG_ROW = students(f"{SENSITIVE_ROW.label}, {LONGER:,} steps", **_SENSITIVE, steps=LONGER)
# Everything that raises success: measured layers, the attention weight, demonstrations and steps.
BEST_ROW = students(
    "best student",
    strategy="similarity",
    attention=1.0,
    demonstrations=MORE,
    steps=LONGER,
)
IN_TIME = Column("success", SUITE)
TO_TEACHER = Column("plans to teacher, mm", plans(10), "to_teacher_mm")
TO_EXPERT = Column("plans to expert, mm", plans(10), "to_expert_mm")
SPREAD = Column("sideways spread, mm", plans(10, ("around",)), "spread_mm")
