"""The claim that the method holds on a public benchmark: Meta-World's MT10."""

from shallow_pi.evidence import cells, recipes, rows, sources
from shallow_pi.evidence.claim import Claim, Column, Statement, Variant, points

# As `sims.metaworld.MT10`, whose package is an extra.
TASKS = (
    *("reach", "push", "pick-place", "door-open", "drawer-open", "drawer-close"),
    *("button-press-topdown", "peg-insert-side", "window-open", "window-close"),
)


def mt10() -> Claim:
    """All ten tasks."""
    situation = cells.Situation(TASKS, execute_steps=8, sim="metaworld_mt10")
    whole = Column("MT10", situation)
    by_task = tuple(Column(task, situation, task=task) for task in TASKS)
    top = recipes.METAWORLD_TEACHER
    rows.RECIPES[top.slug] = top
    teacher = Variant("teacher, 18 layers", (top.slug,))
    own = recipes.METAWORLD_STUDENT
    three = rows.students_like(own, "three losses")
    alone = rows.students_like(own, "task loss alone", **rows.ALONE)
    return Claim(
        name="metaworld",
        question="Does it hold on a public benchmark?",
        says=f"Ours, on Meta-World's MT10 (docs/benchmarks.md), from nothing: a teacher of 18 "
        f"layers on {top.demonstrations:,} demonstrations of the package's experts "
        f"({top.steps:,} steps of {recipes.BATCH_SIZE}), students of 6 layers on "
        f"{own.demonstrations} others ({own.steps:,} steps).",
        variants=(
            Variant("expert", (sources.EXPERT,)),
            teacher,
            three,
            alone,
            Variant("cut, not trained", (f"{top.slug}--keep-0.3.7.10.14.17",)),
        ),
        columns=(whole, *by_task),
        statements=(
            Statement("the teacher solves at least 80 %", teacher.at(whole), at_least=0.8),
            Statement(
                "the student is within 3 points of its teacher",
                three.at(whole),
                teacher.at(whole),
                at_least=-0.03,
            ),
            Statement(
                "three losses beat the task loss alone",
                three.at(whole),
                alone.at(whole),
                at_least=0,
            ),
        ),
        pictures=(
            points(
                "metaworld",
                "Meta-World MT10",
                {"teacher": teacher, "student": three, "task_only": alone},
                (whole, *by_task),
            ),
        ),
        reference=teacher.label,
        limits="One teacher. 50 episodes a task, 500 control steps at most at 80 Hz, of which a "
        "policy executes 8 of 16 planned before its next plan, on pictures of 64 pixels; the "
        "package's success, its limit and its draws of objects and goals, with our instructions "
        "and our camera, so that no number of others compares. A policy's plan is waited for.",
    )
