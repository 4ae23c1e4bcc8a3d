"""The claim about published alternatives to a shallow student (`evaluation/rivals`)."""

from shallow_pi.evidence import rows
from shallow_pi.evidence.claim import Claim, Column, Line, Picture, Statement, Variant

# Label → rival, in the order of the table. At equal depth, at equal tokens, and at the paper's mix.
RIVALS = {
    "skipping, 3 of 18 dropped": "skip:drop=3",
    "skipping, 9 of 18 dropped": "skip:drop=9",
    "EfficientVLA, 15 layers": "efficientvla:layers=15",
    "EfficientVLA, half of the tokens": "efficientvla:tokens=36",
    "EfficientVLA, layers every 2nd step": "efficientvla:cache=2",
    "EfficientVLA, 15 layers, tokens, every 5th": "efficientvla:layers=15,tokens=36,cache=5",
    "CogVLA, quarter of the tokens": "cogvla",
    "CogVLA without the prompt": "cogvla:kind=plain",
    "CogVLA, mean of 2 × 2": "cogvla:kind=mean",
    "CogVLA and 6 layers": "cogvla:layers=6",
    "MoLE, 6 of 18 layers routed": "mole:layers=6",
    "MoLE, 9 of 18 layers routed": "mole:layers=9",
    "early exit, every 3 layers": "earlyexit",
    "EfficientVLA, layers every 5th step": "efficientvla:cache=5",
}


def rivals() -> Claim:
    """Success of each rival beside the teacher and the student."""
    found = {label: Variant(label, (f"{rows.TEACHER}--{name}",)) for label, name in RIVALS.items()}
    whole = rows.IN_TIME
    relation, around = Column("relation", rows.RELATION), Column("around", rows.around(10))

    def student_wins(label: str) -> Statement:
        a, b = (rows.STUDENT_ROW.label, whole.label), (label, whole.label)
        return Statement(
            f"the 6-layer student solves at least as much as {label}", a, b, at_least=0
        )

    return Claim(
        name="rivals",
        question="Is a shallow student better than skipping, routing and fewer tokens?",
        says="The paper: layers cut from both streams and distilled keep success where reducing "
        "visual tokens or skipping layers does not, and cost less.",
        variants=(rows.TEACHER_ROW, rows.STUDENT_ROW, *found.values()),
        columns=(whole, relation, around),
        statements=tuple(
            student_wins(label)
            for label in (
                "EfficientVLA, 15 layers, tokens, every 5th",
                "MoLE, 6 of 18 layers routed",
                "CogVLA, quarter of the tokens",
                "early exit, every 3 layers",
            )
        ),
        pictures=(
            Picture(
                "rivals",
                "Rivals on the same teacher",
                "",
                "success, %",
                tuple(
                    Line(
                        column.label,
                        tuple(
                            (v.label, (v.label, column.label))
                            for v in (rows.TEACHER_ROW, rows.STUDENT_ROW, *found.values())
                        ),
                        colour,
                        "",
                    )
                    for column, colour in ((whole, "student"), (relation, "teacher"))
                ),
            ),
        ),
        reference=rows.STUDENT_ROW.label,
        limits="Our reimplementations of the ideas, one training seed each; what differs from the "
        "authors' is in each file of evaluation/rivals. Trained rivals get a student's steps.",
    )
