"""The claims about published alternatives to a shallow student (`evaluation/rivals`)."""

from shallow_pi.evidence.claims import rows
from shallow_pi.evidence.claims.claim import Claim, Column, Statement, Variant, points_by_row

# Layers left out without training: how many, by which order.
DROPPED = ((3, "oracle"), (3, "similarity"), (6, "oracle"), (9, "oracle"))
MIXED = "EfficientVLA, 15 layers, half of the tokens, every 5th step"
REUSED = "EfficientVLA, layers every 5th step"
SKIPPED = "skipping, 3 of 18 left out by oracle"
TRAINED = (
    "MoLE, 6 of 18 layers routed",
    "CogVLA, quarter of the tokens",
    "early exit, every 3 layers",
)


# Label → rival, in the order of the table; half of the teacher's image tokens are 36.
RIVALS = {
    **{
        f"skipping, {count} of 18 left out by {order}": f"skip:drop={count},order={order}"
        for count, order in DROPPED
    },
    "EfficientVLA, 15 layers": "efficientvla:layers=15",
    "EfficientVLA, half of the tokens": "efficientvla:tokens=36",
    "EfficientVLA, layers every 2nd step": "efficientvla:cache=2",
    MIXED: "efficientvla:layers=15,tokens=36,cache=5",
    TRAINED[0]: "mole:layers=6",
    "MoLE, 9 of 18 layers routed": "mole:layers=9",
    TRAINED[1]: "cogvla",
    "CogVLA without the prompt": "cogvla:kind=plain",
    "CogVLA, mean of 2 × 2": "cogvla:kind=mean",
    "CogVLA and 6 layers": "cogvla:layers=6",
    TRAINED[2]: "earlyexit",
    REUSED: "efficientvla:cache=5",
}


def rivals() -> Claim:
    """Beside the students of the other claims."""
    students = (rows.STUDENT_ROW, rows.SENSITIVE_ROW, rows.BEST_ROW)
    base = rows.TEACHER_ROW.policies[0]
    found = {label: Variant(label, (f"{base}--{way}",)) for label, way in RIVALS.items()}
    every, success = (rows.TEACHER_ROW, *students, *found.values()), rows.IN_TIME
    columns = (success, Column("relation", rows.RELATION), Column("around", rows.around(10)))

    def student_wins(student: Variant, label: str) -> Statement:
        text = f"*{student.label}* is at least as good as *{label}*"
        return Statement(text, student.at(success), found[label].at(success), at_least=0)

    return Claim(
        name="rivals",
        question="Does a shallow student beat skipping layers, routing and fewer tokens?",
        says="The paper: cutting layers from both streams and distilling keeps success where "
        "reducing visual tokens or skipping layers does not, and costs less.",
        variants=every,
        columns=columns,
        statements=tuple(
            student_wins(student, label)
            for student in students
            for label in (SKIPPED, MIXED, REUSED, *TRAINED)
        ),
        plots=(
            points_by_row(
                "rivals",
                "Rivals on the same teacher",
                every,
                dict(zip(("student", "teacher", "task_only"), columns, strict=True)),
            ),
        ),
        reference=rows.STUDENT_ROW.label,
        limits="These are our reimplementations, with one training seed each; "
        "[rivals.md](rivals.md) lists how they differ from the papers. Trained rivals get 1,200 "
        "steps on 400 demonstrations.",
    )
