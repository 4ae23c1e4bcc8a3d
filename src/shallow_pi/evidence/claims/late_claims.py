"""The claim that a faster student wins when the world moves, on the tabletop and the turntable."""

from collections.abc import Callable, Mapping

from shallow_pi.evaluation import rollout
from shallow_pi.evidence.claims import cells, rows
from shallow_pi.evidence.claims.claim import Claim, Column, Line, Plot, Statement, Variant

# Control steps at 20 Hz until an action after 364 and 110 ms (the paper's teacher and student), and
# the student's at the ratio of the latencies measured here (2.2).
TEACHER_LATE, STUDENT_LATE, RATIO_LATE = 8, 3, 4
EXECUTORS: dict[rollout.Executor, str] = {
    "late": "executed as they come",
    "skip": "late actions skipped",
    "real-time": "real-time chunking",
}
STEPS = (0, 1, 2, STUDENT_LATE, RATIO_LATE, 6, TEACHER_LATE)  # control steps that are measured
GUIDED_STEPS = (STUDENT_LATE, TEACHER_LATE, RATIO_LATE)
# Policies of the turntable. The student: three losses, 300 steps, 200 demonstrations, seed 42.
TURNTABLE = TURNTABLE_TEACHER, TURNTABLE_STUDENT = "turntable-teacher-l18", "turntable-l6-s42"


def on_the_tabletop() -> Claim:
    """Policies that saw the disc turn."""
    return _claim(
        "late",
        "Does the faster student win when the world moves?",
        rows.TEACHER_ROW,
        {"the student": rows.students("student, 6 layers"), "the best student": rows.BEST_ROW},
        lambda steps, executor: cells.Situation(("moving",), late=steps, executor=executor),
        "The disc turns at 15 or 30°/s, also in the demonstrations.",
    )


def on_the_turntable() -> Claim:
    """Policies that never saw the disc turn in training, as in the README's experiment."""
    return _claim(
        "late-turntable",
        "Does the faster student win on a turntable that neither policy saw turn in training?",
        Variant("teacher, 18 layers", (TURNTABLE_TEACHER,)),
        {"the student": Variant("student, 6 layers", (TURNTABLE_STUDENT,))},
        lambda steps, executor: cells.Situation(
            ("touch", "insert"),
            execute_steps=5,
            late=steps,
            executor=executor,
            sim="turntable",
            turning=15.0,
        ),
        "Task and policies differ from the rest of this page: the policies are the packaged "
        "turntable teacher and **one** student of it (three losses, 300 steps, 200 "
        "demonstrations). The disc turns at 15°/s. 5 of 10 planned actions are executed before the "
        "next plan, and a robot that runs out of actions stands still.",
    )


def _claim(
    name: str,
    question: str,
    teacher: Variant,
    students: Mapping[str, Variant],
    situation: Callable[[int, rollout.Executor], cells.Situation],
    limits: str,
) -> Claim:
    def column(steps: int, executor: rollout.Executor) -> Column:
        if not steps:
            return Column("in time", situation(0, "skip"))
        return Column(f"{50 * steps} ms, {EXECUTORS[executor]}", situation(steps, executor))

    def measured(executor: rollout.Executor) -> list[int]:
        return [0, *GUIDED_STEPS] if executor == "real-time" else list(STEPS)

    columns = [column(n, e) for n in STEPS for e in EXECUTORS if n in measured(e)]
    *_, drawn = students.values()
    lines = [
        Line(
            f"{row.label}, {EXECUTORS[executor]}",
            tuple((50.0 * n, row.at(column(n, executor))) for n in sorted(measured(executor))),
            colour,
            style,
        )
        for row, colour in ((teacher, "teacher"), (drawn, "student"))
        for executor, style in zip(EXECUTORS, ("-", "--", ":"), strict=True)
    ]

    def faster(executor: rollout.Executor, text: str, student_late: int, against: str) -> Statement:
        a = students[text].at(column(student_late, executor))
        b = teacher.at(column(TEACHER_LATE, executor))
        return Statement(f"{text} {against}, {EXECUTORS[executor]}", a, b, at_least=0)

    return Claim(
        name=name,
        question=question,
        says="The paper: on a turntable at 15°/s, the teacher's plans are 364 ms late and the "
        "student's 110 ms. On the paper's robot the student solves more (peg, foam, apple, beans: "
        "34 of 40 episodes against 23).",
        variants=(teacher, *students.values()),
        columns=tuple(dict.fromkeys(columns)),
        statements=tuple(
            faster(executor, text, steps, against)
            for text in students
            for steps, against in (
                (STUDENT_LATE, "110 ms late beats the teacher 364 ms late"),
                (RATIO_LATE, "200 ms late beats the teacher 400 ms late (our ratio)"),
            )
            for executor in EXECUTORS
        ),
        plots=(
            Plot(
                name.replace("-", "_"),
                "Success when plans are late",
                "lateness, ms",
                "success, %",
                tuple(lines),
            ),
        ),
        reference=teacher.label,
        limits=f"{limits} Lateness is rounded up to control steps of 50 ms: 364 ms to "
        f"{TEACHER_LATE} steps, 110 ms to {STUDENT_LATE}.",
    )
