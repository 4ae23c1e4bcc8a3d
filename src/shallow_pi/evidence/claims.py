"""The claims about the method, in the order in which they are worth running (see `claim`)."""

from collections.abc import Sequence

from shallow_pi.evidence import rival_claims, rows, sources, student_claims
from shallow_pi.evidence.claim import Claim, Column, Line, Picture, Statement, Variant

# Control steps at 20 Hz until an action after 364 and 110 ms (the paper's teacher and student), and
# the student's at the ratio of the latencies measured here (2.2).
TEACHER_LATE, STUDENT_LATE, RATIO_LATE = 8, 3, 4


def _instrument() -> Claim:
    by_task = [Column(task, rows.SUITE, task=task) for task in rows.TASKS]
    ten, one = Column("around, 10 steps", rows.around(10)), Column("around, 1 step", rows.around(1))
    relation = Column("relation, 500", rows.RELATION)
    top, two, cut = rows.TEACHER_ROW.label, rows.TWO_ROW.label, rows.UNTRAINED_ROW.label
    return Claim(
        name="instrument",
        question="Do the tasks tell policies apart?",
        says="Ours, before anything is compared: the suite must punish a lost mode, lost depth and "
        "a missing training, and its teacher must solve every task.",
        variants=(
            Variant("expert", (sources.EXPERT,)),
            rows.TEACHER_ROW,
            rows.STUDENT_ROW,
            rows.TWO_ROW,
            rows.UNTRAINED_ROW,
        ),
        columns=(ten, one, *by_task, relation),
        statements=(
            *(
                Statement(
                    f"the teacher solves at least 90 % of {c.label}", (top, c.label), at_least=0.9
                )
                for c in (*by_task, ten)
            ),
            Statement(
                "one integration step costs the teacher 20 points past the pillar",
                (top, ten.label),
                (top, one.label),
                at_least=0.2,
            ),
            Statement(
                "a 2-layer student loses 20 points on relation",
                (top, relation.label),
                (two, relation.label),
                at_least=0.2,
            ),
            *(
                Statement(
                    f"cut and not trained, at most 5 % of {c.label}", (cut, c.label), at_most=0.05
                )
                for c in (ten, relation)
            ),
        ),
        pictures=(
            Picture(
                "instrument",
                "Success by task",
                "",
                "success, %",
                tuple(
                    Line(
                        row.label,
                        tuple((c.label, (row.label, c.label)) for c in (*by_task, ten, one)),
                        colour,
                        "",
                    )
                    for row, colour in (
                        (rows.TEACHER_ROW, "teacher"),
                        (rows.STUDENT_ROW, "student"),
                        (rows.TWO_ROW, "random_init"),
                        (rows.UNTRAINED_ROW, "cut_only"),
                    )
                ),
            ),
        ),
        reference=top,
        limits="One teacher: its own training seed is not varied. Tasks share 500 episodes of the "
        "suite, about 83 each.",
    )


def _skipping() -> Claim:
    dropped = (1, 2, 3, 4, 6, 9)
    orders = ("sensitivity", "similarity")
    found = {
        (order, count): Variant(
            f"{count} dropped by {order}", (f"{rows.TEACHER}--{order}-drop{count}",)
        )
        for count in dropped
        for order in orders
    }
    return Claim(
        name="skipping",
        question="Can layers simply be left out, without training?",
        says="The paper: in the order of least sensitivity success collapses once more than three "
        "layers are gone; likeness of layers does not tell which may go.",
        variants=(rows.TEACHER_ROW, *found.values(), rows.STUDENT_ROW),
        columns=(rows.IN_TIME,),
        statements=(
            Statement(
                "three layers can go at a cost of 20 points or less",
                (found["sensitivity", 3].label, rows.IN_TIME.label),
                (rows.TEACHER_ROW.label, rows.IN_TIME.label),
                at_least=-0.2,
            ),
            Statement(
                "without six layers at least half of the success is gone",
                (found["sensitivity", 6].label, rows.IN_TIME.label),
                (rows.TEACHER_ROW.label, rows.IN_TIME.label),
                at_most=-0.5,
            ),
            Statement(
                "sensitivity is the better order at three layers",
                (found["sensitivity", 3].label, rows.IN_TIME.label),
                (found["similarity", 3].label, rows.IN_TIME.label),
                at_least=0,
            ),
        ),
        pictures=(
            Picture(
                "skipping",
                "Layers left out, without training",
                "layers left out",
                "success, %",
                (
                    *(
                        Line(
                            f"in the order of {order}",
                            (
                                (0.0, (rows.TEACHER_ROW.label, rows.IN_TIME.label)),
                                *(
                                    (float(n), (found[order, n].label, rows.IN_TIME.label))
                                    for n in dropped
                                ),
                            ),
                            colour,
                        )
                        for order, colour in zip(orders, ("teacher", "task_only"), strict=True)
                    ),
                    Line(
                        "12 left out, three losses",
                        ((12.0, (rows.STUDENT_ROW.label, rows.IN_TIME.label)),),
                        "student",
                    ),
                ),
            ),
        ),
        reference=rows.TEACHER_ROW.label,
        limits="One teacher; the orders are measured on held-out observations of the suite.",
    )


def _late() -> Claim:
    steps, executors = (
        (0, STUDENT_LATE, TEACHER_LATE, RATIO_LATE, 2, 6, 1),
        ("late", "skip", "real-time"),
    )

    def column(n: int, executor: str) -> Column:
        label = f"{50 * n} ms, {executor}" if n else "in time"
        return Column(label, rows.late(n, executor))

    columns = [column(n, e) for n in steps for e in executors[:2]]
    columns += [column(n, "real-time") for n in steps[1:4]]
    columns = list(dict.fromkeys(columns))
    named = {"late": "as they come", "skip": "late actions skipped", "real-time": "real-time"}
    lines = []
    for row, colour in ((rows.TEACHER_ROW, "teacher"), (rows.STUDENT_ROW, "student")):
        for executor, style in zip(executors, ("-", "--", ":"), strict=True):
            measured = sorted(steps if executor != "real-time" else (0, *steps[1:4]))
            points = tuple((50.0 * n, (row.label, column(n, executor).label)) for n in measured)
            lines.append(Line(f"{row.label}, {named[executor]}", points, colour, style))

    def faster(executor: str, student_late: int, text: str) -> Statement:
        a = (rows.STUDENT_ROW.label, column(student_late, executor).label)
        b = (rows.TEACHER_ROW.label, column(TEACHER_LATE, executor).label)
        return Statement(f"{text}, {named[executor]}", a, b, at_least=0)

    return Claim(
        name="late",
        question="Does the faster student win when the world moves?",
        says="The paper: on a turntable at 15°/s the student (110 ms) solves more than its teacher "
        "(364 ms), which is better when nothing moves.",
        variants=(rows.TEACHER_ROW, rows.STUDENT_ROW),
        columns=tuple(columns),
        statements=(
            *(
                faster(e, STUDENT_LATE, "the student 110 ms late beats the teacher 364 ms late")
                for e in executors
            ),
            *(
                faster(e, RATIO_LATE, "so it does at the ratio of latencies measured here (2.2)")
                for e in executors
            ),
        ),
        pictures=(
            Picture(
                "late", "Success when plans are late", "lateness, ms", "success, %", tuple(lines)
            ),
        ),
        reference=rows.TEACHER_ROW.label,
        limits="The disc turns at 15 or 30°/s, demonstrated turning. Lateness is counted in whole "
        "control steps of 50 ms: 364 ms are 8, 110 ms are 3.",
    )


def _few() -> Claim:
    numbers = (10, 5, 2, 1)
    columns = [Column(f"around, {n} steps", rows.around(n)) for n in numbers]
    apart = [
        Column(f"plans to teacher, {n} steps, mm", rows.plans(n), "to_teacher_mm")
        for n in (10, 2, 1)
    ]
    spread = [
        Column(f"spread, {n} steps, mm", rows.plans(n, ("around",)), "spread_mm")
        for n in (10, 2, 1)
    ]
    found = (
        rows.TEACHER_ROW,
        rows.STUDENT_ROW,
        rows.students("task loss alone", **rows.ALONE),
        rows.students("reflow for 2 steps", reflow=1.0, num_steps=2),
        rows.students("reflow for 1 step", reflow=1.0, num_steps=1),
        rows.students(
            "reflow in place of task and velocity", task=0.0, velocity=0.0, reflow=1.0, num_steps=1
        ),
    )
    colours = ("teacher", "student", "task_only", "expert", "random_init", "cut_only")
    return Claim(
        name="few-steps",
        question="How many integration steps does a policy with several modes need?",
        says="Ours: where the mean of the modes is fatal, one step of an ordinary policy fails, "
        "and a loss for few steps (reflow) repairs it.",
        variants=found,
        columns=(*columns, *apart, *spread),
        statements=(
            Statement(
                "one step costs the student 20 points",
                (rows.STUDENT_ROW.label, columns[0].label),
                (rows.STUDENT_ROW.label, columns[3].label),
                at_least=0.2,
            ),
            Statement(
                "reflow raises the success of one step",
                ("reflow for 1 step", columns[3].label),
                (rows.STUDENT_ROW.label, columns[3].label),
                at_least=0,
            ),
            Statement(
                "reflow brings plans in one step nearer to the teacher's in ten",
                ("reflow for 1 step", apart[2].label),
                (rows.STUDENT_ROW.label, apart[2].label),
                at_most=0,
            ),
        ),
        pictures=(
            Picture(
                "few_steps",
                "Past the pillar in few integration steps",
                "integration steps",
                "success, %",
                tuple(
                    Line(
                        row.label,
                        tuple((float(n), (row.label, f"around, {n} steps")) for n in numbers),
                        colour,
                    )
                    for row, colour in zip(found, colours, strict=True)
                ),
            ),
        ),
        reference=rows.STUDENT_ROW.label,
        limits="Two modes of equal weight; a task with one mode needs one step.",
    )


CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        _instrument(),
        _late(),
        student_claims.parity(),
        student_claims.losses(),
        student_claims.layers(),
        _skipping(),
        _few(),
        rival_claims.rivals(),
    )
}
# Claims of the plan that no cell measures yet.
PENDING = {
    "teacher-size": "the smallest useful teacher: 18, 12, 9, 6 layers and half the width, each "
    "distilled to the same 6 layers",
    "last-layer-expert": "the same distillation with an action expert that reads the backbone's "
    "last layer alone (GR00T's way)",
}


def students(names: Sequence[str] = tuple(CLAIMS)) -> list[str]:
    """Slugs of all trained policies that claims need, in order, the teacher first."""
    found = [rows.TEACHER]
    for name in names:
        found += [cell.policy.partition("--")[0] for cell in CLAIMS[name].cells()]
    return [slug for slug in dict.fromkeys(found) if slug != sources.EXPERT]
