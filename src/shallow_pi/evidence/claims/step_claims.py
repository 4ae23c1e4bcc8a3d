"""Claims about many modes and few integration steps."""

import dataclasses

from shallow_pi.evidence.claims import recipes, rows
from shallow_pi.evidence.claims.claim import Claim, Column, Statement, Variant, curves

# A teacher of the one task with two modes, and its students.
AROUND = dataclasses.replace(recipes.TEACHER, tasks=("around",), steps=2400, demonstrations=1200)
OF_AROUND: dict[str, object] = {"teacher": AROUND.slug, "tasks": ("around",), "steps": 600}
# In place of the other losses.
REFLOW: dict[str, object] = {
    "task": 0.0,
    "velocity": 0.0,
    "attention": 0.0,
    "reflow": 1.0,
    "num_steps": 1,
}
PAST = "Success on around in few integration steps"


def _spread(num_steps: int) -> Column:
    situation = rows.plans(num_steps, ("around",))
    return Column(f"spread, {rows.in_words(num_steps)}, mm", situation, "spread_mm")


def few_steps() -> Claim:
    """On the suite."""
    numbers = (10, 5, 2, 1)
    success = {n: Column(f"around, {rows.in_words(n)}", rows.around(n)) for n in numbers}
    apart = {
        n: Column(f"plans to teacher, {rows.in_words(n)}, mm", rows.plans(n), "to_teacher_mm")
        for n in (10, 2, 1)
    }
    spread = {n: _spread(n) for n in (10, 2, 1)}
    student = rows.STUDENT_ROW
    found = {
        "teacher": rows.TEACHER_ROW,
        "student": student,
        "task_only": rows.students("task loss alone", **rows.ALONE),
    }
    return Claim(
        name="few-steps",
        question="How many integration steps does a policy with several modes need?",
        says="Ours: where the mean of the modes fails, an ordinary policy fails in one step. The "
        "claim [modes](#modes) tests reflow, the loss for few steps.",
        variants=tuple(found.values()),
        columns=(*success.values(), *apart.values(), *spread.values()),
        statements=(
            Statement(
                "one step costs the student at least 20 points",
                student.at(success[10]),
                student.at(success[1]),
                at_least=0.2,
            ),
        ),
        plots=(curves("few_steps", PAST, found, success),),
        reference=student.label,
        limits="Two modes of equal weight; a task with one mode needs a single step.",
    )


def modes() -> Claim:
    """On the one task with two modes, with a teacher of its own."""
    numbers = (10, 5, 2, 1)
    rows.RECIPES[AROUND.slug] = AROUND
    top = Variant("teacher, 18 layers", (AROUND.slug,))
    three = rows.students("three losses", **OF_AROUND)
    alone = rows.students("task loss alone", **OF_AROUND, **rows.ALONE)
    reflow = rows.students("reflow alone, for 1 step", **OF_AROUND, **REFLOW)
    found = {"teacher": top, "student": three, "task_only": alone, "random_init": reflow}
    success = {n: Column(rows.in_words(n), rows.around(n)) for n in numbers}
    touched = {
        n: Column(f"touched, {rows.in_words(n)}", rows.around(n), "collided") for n in (10, 1)
    }
    apart = {
        n: Column(
            f"plans to teacher, {rows.in_words(n)}, mm", rows.plans(n, ("around",)), "to_teacher_mm"
        )
        for n in (10, 1)
    }
    spread = {n: _spread(n) for n in (10, 1)}

    def differ(text: str, a: Variant, b: Variant, column: Column, **bound: float) -> Statement:
        return Statement(text, a.at(column), b.at(column), **bound)

    def loses(row: Variant, words: str) -> Statement:
        ten, one = row.at(success[10]), row.at(success[1])
        text = f"one integration step costs {words} at least 20 points"
        return Statement(text, ten, one, at_least=0.2)

    return Claim(
        name="modes",
        question="If an expert passes a pillar on either side by a coin flip, do one-step plans "
        "fail, and which students keep both ways?",
        says="Ours: the mean of the two ways hits the pillar's core, so few steps must fail. "
        "Students trained on the task loss alone lose modes of their teacher, and reflow keeps "
        "them in one step.",
        variants=tuple(found.values()),
        columns=(*success.values(), *touched.values(), *apart.values(), *spread.values()),
        statements=(
            Statement(
                "the teacher solves at least 90 % in ten steps", top.at(success[10]), at_least=0.9
            ),
            loses(top, "the teacher"),
            loses(three, "the student"),
            differ("three losses beat the task loss alone", three, alone, success[10], at_least=0),
            differ(
                "three losses bring plans nearer to the teacher's than the task loss alone",
                three,
                alone,
                apart[10],
                at_most=0,
            ),
            differ("reflow raises success in one step", reflow, three, success[1], at_least=0),
            differ(
                "reflow brings one-step plans nearer to the teacher's ten-step plans",
                reflow,
                three,
                apart[1],
                at_most=0,
            ),
        ),
        plots=(curves("modes", PAST, found, dict(sorted(success.items()))),),
        reference=three.label,
        limits="A small teacher of this task alone, trained for 2,400 steps; students are trained "
        "for 600. Plans of one second are executed completely.",
    )
