"""Claims about the student: as good as its teacher, by which losses, with which layers."""

from shallow_pi.evidence import recipes, rows
from shallow_pi.evidence.claim import Claim, Column, Line, Picture, Statement


def parity() -> Claim:
    own = recipes.STUDENT
    data = tuple(own.demonstrations // n for n in (8, 4, 2, 1))
    steps = (own.steps // 8, own.steps // 4, own.steps // 2, own.steps, 2 * own.steps)
    few = f"{data[0]} demonstrations"
    ways: tuple[tuple[str, str, dict[str, object]], ...] = (
        ("three losses", "student", {}),
        ("task + velocity", "expert", rows.VELOCITY),
        ("task loss alone", "task_only", rows.ALONE),
        ("random init, task loss", "random_init", {**rows.ALONE, "init": "random"}),
    )
    found, curves = [rows.TEACHER_ROW], []
    for axis, values, default in (
        ("demonstrations", data, own.demonstrations),
        ("steps", steps, own.steps),
    ):
        lines = []
        for label, colour, fields in ways:
            points = []
            for value in values:
                name = label if value == default else f"{label}, {value} {axis}"
                found.append(rows.students(name, **{**fields, axis: value}))
                points.append((float(value), (name, rows.IN_TIME.label)))
            lines.append(Line(label, tuple(points), colour))
        top = tuple(
            (float(value), (rows.TEACHER_ROW.label, rows.IN_TIME.label)) for value in values
        )
        lines.append(Line(rows.TEACHER_ROW.label, top, "teacher", "--"))
        unit = "demonstrations" if axis == "demonstrations" else "distillation steps"
        curves.append(
            Picture(f"parity_{axis}", f"Success against {unit}", unit, "success, %", tuple(lines))
        )
    scratch = rows.students("from scratch, equal compute", **rows.SCRATCH)
    taught = rows.students("random init, three losses", init="random")
    found = [*dict.fromkeys([*found, scratch, taught])]
    ten, elsewhere = Column("around", rows.around(10)), Column("elsewhere", rows.ELSEWHERE)
    columns = (rows.IN_TIME, ten, elsewhere, rows.TO_TEACHER)
    # The other columns for the default amounts alone.
    default_rows = [
        rows.TEACHER_ROW.label,
        scratch.label,
        taught.label,
        *(label for label, _, _ in ways),
    ]
    only = {(row.label, c.label) for row in found for c in (rows.IN_TIME, rows.TO_TEACHER)}
    only |= {(label, c.label) for label in default_rows for c in columns}
    return Claim(
        name="parity",
        question="Is the 6-layer student within one point of its teacher, and what does it take?",
        says="The paper: 95 % against 96 % on LIBERO. SmolVLA at the same cost: 87 %.",
        variants=tuple(found),
        columns=columns,
        statements=(
            Statement(
                "the student is at most 1 point below the teacher",
                (rows.STUDENT_ROW.label, rows.IN_TIME.label),
                (rows.TEACHER_ROW.label, rows.IN_TIME.label),
                at_least=-0.01,
            ),
            Statement(
                "and at most 1 point below it past the pillar",
                (rows.STUDENT_ROW.label, ten.label),
                (rows.TEACHER_ROW.label, ten.label),
                at_least=-0.01,
            ),
            Statement(
                "three losses beat the task loss alone",
                (rows.STUDENT_ROW.label, rows.IN_TIME.label),
                ("task loss alone", rows.IN_TIME.label),
                at_least=0,
            ),
            Statement(
                f"three losses beat the task loss alone with {few}",
                (f"three losses, {few}", rows.IN_TIME.label),
                (f"task loss alone, {few}", rows.IN_TIME.label),
                at_least=0,
            ),
            Statement(
                "a cut student beats a small one from scratch at equal compute",
                (rows.STUDENT_ROW.label, rows.IN_TIME.label),
                (scratch.label, rows.IN_TIME.label),
                at_least=0,
            ),
        ),
        pictures=tuple(curves),
        reference=rows.TEACHER_ROW.label,
        limits="A teacher of 1 M parameters on seven tabletop tasks; the size at which LIBERO was "
        "measured is 3 B.",
        only=frozenset(only),
    )


def losses() -> Claim:
    ten = Column("around", rows.around(10))
    found = (
        rows.TEACHER_ROW,
        rows.STUDENT_ROW,
        rows.students("without attention", **rows.VELOCITY),
        rows.students("without velocity", **{**rows.THREE, "velocity": 0.0}),
        rows.students("without task", **{**rows.THREE, "task": 0.0}),
        rows.students("task loss alone", **rows.ALONE),
        rows.students("velocity alone", **{**rows.VELOCITY, "task": 0.0}),
        rows.students("attention 0.01", attention=0.01),
        rows.students("attention 1", attention=1.0),
        rows.students("attention of the first layer", attention_layer="first"),
        rows.students("attention of the last layer", attention_layer="last"),
        rows.students("attention, mean of heads", heads="head_mean"),
        rows.students("attention over all tokens", queries="all"),
        rows.students("first-layer attention of text to images", queries="text"),
    )
    names = [row.label for row in found]
    return Claim(
        name="losses",
        question="Does each of the three losses earn its place?",
        says="The paper: leaving any one out costs success; attention matched over all tokens "
        "destroys training.",
        variants=found,
        columns=(rows.TO_TEACHER, rows.SPREAD, rows.IN_TIME, ten, rows.TO_EXPERT),
        statements=tuple(
            Statement(text, (a, column), (b, column), at_least=at_least, at_most=at_most)
            for text, a, b, column, at_least, at_most in (
                (
                    "the attention loss raises success",
                    rows.STUDENT_ROW.label,
                    names[2],
                    rows.IN_TIME.label,
                    0,
                    None,
                ),
                (
                    "the velocity loss raises success",
                    rows.STUDENT_ROW.label,
                    names[3],
                    rows.IN_TIME.label,
                    0,
                    None,
                ),
                (
                    "the task loss raises success",
                    rows.STUDENT_ROW.label,
                    names[4],
                    rows.IN_TIME.label,
                    0,
                    None,
                ),
                (
                    "the attention loss brings plans nearer to the teacher's",
                    rows.STUDENT_ROW.label,
                    names[2],
                    rows.TO_TEACHER.label,
                    None,
                    0,
                ),
                (
                    "the velocity loss brings plans nearer to the teacher's",
                    rows.STUDENT_ROW.label,
                    names[3],
                    rows.TO_TEACHER.label,
                    None,
                    0,
                ),
                (
                    "three losses bring plans nearer to the teacher's than the task loss alone",
                    rows.STUDENT_ROW.label,
                    names[5],
                    rows.TO_TEACHER.label,
                    None,
                    0,
                ),
            )
        ),
        pictures=(
            Picture(
                "losses",
                "Plans and losses",
                "",
                "energy distance to the teacher's plans, mm",
                (
                    Line(
                        "6 layers",
                        tuple((row.label, (row.label, rows.TO_TEACHER.label)) for row in found[1:]),
                        "student",
                        "",
                    ),
                ),
            ),
        ),
        reference=rows.STUDENT_ROW.label,
        limits="Every student has the same steps; a loss may matter at other lengths (see parity).",
    )


def layers() -> Claim:
    relation = Column("relation", rows.RELATION)
    depths = {d: rows.students(f"{d} layers", depth=d) for d in (12, 9, 4, 3, 2)}
    depths[6] = rows.STUDENT_ROW
    chosen = [
        rows.students(f"layers: {name}", strategy=name)
        for name in ("first", "last", "random", "similarity", "sensitivity")
    ]
    found = (
        rows.TEACHER_ROW,
        *(depths[d] for d in (12, 9, 6, 4, 3, 2)),
        *chosen,
        rows.UNTRAINED_ROW,
    )
    curve = [(float(d), depths[d].label) for d in (2, 3, 4, 6, 9, 12)]
    curve.append((18.0, rows.TEACHER_ROW.label))
    return Claim(
        name="layers",
        question="How many layers does the student need, and does it matter which?",
        says="The paper: six layers, cut uniformly from 18, suffice.",
        variants=found,
        columns=(rows.IN_TIME, relation, rows.TO_TEACHER),
        statements=(
            Statement(
                "six layers are at most 1 point below 18",
                (rows.STUDENT_ROW.label, rows.IN_TIME.label),
                (rows.TEACHER_ROW.label, rows.IN_TIME.label),
                at_least=-0.01,
            ),
            Statement(
                "a 2-layer student loses 20 points on relation",
                (rows.TEACHER_ROW.label, relation.label),
                ("2 layers", relation.label),
                at_least=0.2,
            ),
            *(
                Statement(
                    f"a uniform cut beats the {row.label.removeprefix('layers: ')} one",
                    (rows.STUDENT_ROW.label, rows.IN_TIME.label),
                    (row.label, rows.IN_TIME.label),
                    at_least=0,
                )
                for row in chosen
            ),
        ),
        pictures=(
            Picture(
                "layers",
                "Success against layers",
                "layers",
                "success, %",
                (
                    Line(
                        "all tasks in time",
                        tuple((d, (label, rows.IN_TIME.label)) for d, label in curve),
                    ),
                    Line(
                        "relation",
                        tuple((d, (label, relation.label)) for d, label in curve),
                        "task_only",
                    ),
                ),
            ),
            Picture(
                "maps",
                "Which six layers",
                "",
                "success, %",
                (
                    Line(
                        "6 layers",
                        tuple(
                            (row.label.removeprefix("layers: "), (row.label, rows.IN_TIME.label))
                            for row in (rows.STUDENT_ROW, *chosen)
                        ),
                        "student",
                        "",
                    ),
                ),
            ),
        ),
        reference=rows.STUDENT_ROW.label,
        limits="`random` draws other layers for each seed, so its interval holds the choice too.",
    )
