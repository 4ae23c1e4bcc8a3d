"""Claims about the teacher: its size, and an expert that reads the backbone's last state alone.

All of them are of the one task past the pillar, where a teacher takes minutes to train.
"""

import dataclasses

from shallow_pi.evidence.claims import recipes, rows
from shallow_pi.evidence.claims.claim import (
    Claim,
    Column,
    Line,
    Plot,
    Side,
    Statement,
    Variant,
    points_by_row,
)
from shallow_pi.evidence.claims.step_claims import AROUND

READS_LAST = dataclasses.replace(AROUND, model="reads_last")
SUCCESS = {n: Column(rows.in_words(n), rows.around(n)) for n in (10, 1)}
TO_TEACHER = Column("plans to own teacher, mm", rows.plans(10, ("around",)), "to_teacher_mm")
TO_EXPERT = Column("plans to expert, mm", rows.plans(10, ("around",)), "to_expert_mm")
COLUMNS = (SUCCESS[10], TO_TEACHER, TO_EXPERT, SUCCESS[1])


def _teacher(label: str, **fields: object) -> Variant:
    recipe = dataclasses.replace(AROUND, **fields)  # type: ignore[arg-type]  # by name
    rows.RECIPES[recipe.slug] = recipe
    return Variant(label, (recipe.slug,))


def _students(label: str, teacher: Variant, **fields: object) -> Variant:
    shared: dict[str, object] = {"tasks": AROUND.tasks, "steps": 600, **fields}
    return rows.students(label, teacher=teacher.policies[0], **shared)


def _in_ten(row: Variant) -> Side:
    return row.at(SUCCESS[10])


def sizes() -> Claim:
    """Teachers of several sizes, and the same student of each."""
    depths = (18, 12, 9, 6)
    teachers = {depth: _teacher(f"teacher, {depth} layers", depth=depth) for depth in depths}
    students = {
        depth: _students(f"student of the {depth}-layer teacher", teachers[depth])
        for depth in depths
    }
    half = _teacher("teacher, 18 layers, half width", model="half_width")
    of_half = _students("student of the half-width teacher", half)
    smaller = (*(students[depth] for depth in depths[1:]), of_half)
    lines = []
    for column, style in ((SUCCESS[10], "-"), (SUCCESS[1], ":")):
        for words, found, colour in (
            ("teacher", teachers, "teacher"),
            ("its 6-layer student", students, "student"),
        ):
            points = tuple((float(d), found[d].at(column)) for d in sorted(depths))
            lines.append(Line(f"{words}, {column.label}", points, colour, style))
    for words, row, colour in (
        ("teacher of half width", half, "expert"),
        ("its 6-layer student", of_half, "random_init"),
    ):
        lines.append(Line(f"{words}, 10 steps", ((18.0, _in_ten(row)),), colour, ""))
    return Claim(
        name="teacher-size",
        question="How small can a teacher be and still give an equally good 6-layer student?",
        says="Ours: students are cut from large pretrained policies, but a smaller teacher would "
        "be cheaper to train, and a 6-layer one would need no distillation.",
        variants=(*teachers.values(), half, *students.values(), of_half),
        columns=COLUMNS,
        statements=(
            *(
                Statement(
                    f"the {row.label} is at most 5 points below that of the 18-layer teacher",
                    _in_ten(row),
                    _in_ten(students[18]),
                    at_least=-0.05,
                )
                for row in smaller
            ),
            Statement(
                "the student of the 18-layer teacher beats a 6-layer policy trained like it",
                _in_ten(students[18]),
                _in_ten(teachers[6]),
                at_least=0,
            ),
        ),
        plots=(
            Plot(
                "teacher_size",
                "Success on around against the teacher's layers",
                "layers of the teacher",
                "success, %",
                tuple(lines),
            ),
        ),
        reference=students[18].label,
        limits="One teacher of each size, trained for 2,400 steps on 1,200 demonstrations; a "
        "larger one may gain more from longer training. The student of the half-width teacher has "
        "half the width as well. The student of the 6-layer teacher keeps all of its layers: it is "
        "the teacher itself, distilled from its own earlier parameters for another 600 steps on "
        "other demonstrations.",
    )


def last_layer() -> Claim:
    """The distillation of a policy of another family."""
    pi0 = _teacher("teacher, π0, 18 layers")
    teacher = _teacher("teacher, reads the last state, 18 + 18 layers", model="reads_last")
    start = dataclasses.replace(
        recipes.STUDENT, teacher=READS_LAST.slug, tasks=READS_LAST.tasks, steps=0
    )
    rows.RECIPES[start.slug] = start
    cut = Variant("cut to 6 + 6, not trained", (start.slug,))
    three = _students("three losses, 6 + 6 layers", teacher)
    alone = _students("task loss alone, 6 + 6 layers", teacher, **rows.ALONE)
    found = (pi0, teacher, cut, three, alone)
    return Claim(
        name="last-layer-expert",
        question="Does the distillation also work if the action expert reads only the backbone's "
        "last state, as in GR00T?",
        says="The paper distils π0 and π0.5, whose experts read every backbone layer. Ours: the "
        "method does not depend on that.",
        variants=found,
        columns=COLUMNS,
        statements=(
            Statement(
                "the teacher is at most 5 points below π0",
                _in_ten(teacher),
                _in_ten(pi0),
                at_least=-0.05,
            ),
            Statement("an untrained cut solves at most 5 %", _in_ten(cut), at_most=0.05),
            Statement(
                "the student is at most 1 point below its teacher",
                _in_ten(three),
                _in_ten(teacher),
                at_least=-0.01,
            ),
            Statement(
                "three losses beat the task loss alone", _in_ten(three), _in_ten(alone), at_least=0
            ),
            Statement(
                "three losses bring plans nearer to the teacher's than the task loss alone",
                three.at(TO_TEACHER),
                alone.at(TO_TEACHER),
                at_most=0,
            ),
        ),
        plots=(
            points_by_row(
                "last_layer_expert",
                "An expert that reads the backbone's last state",
                found,
                {"student": SUCCESS[10], "task_only": SUCCESS[1]},
            ),
        ),
        reference=three.label,
        limits="One teacher, trained for 2,400 steps on 1,200 demonstrations. It has 18 backbone "
        "layers, then 18 expert layers, each of which computes its own keys and values from the "
        "backbone's last state. The attention loss compares the expert's middle layer.",
    )
