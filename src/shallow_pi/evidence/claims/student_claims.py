"""Claims about the student: as good as its teacher, by which losses, with which layers."""

from shallow_pi.evidence.claims import recipes, rows
from shallow_pi.evidence.claims.claim import Claim, Column, Line, Plot, Statement, Variant


def parity() -> Claim:
    own, success = recipes.STUDENT, rows.IN_TIME
    data = (*(own.demonstrations // n for n in (8, 4, 2, 1)), rows.MORE)
    steps = tuple(own.steps * eighths // 8 for eighths in (1, 2, 4, 8, 16, 32, 64))
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
                name = label if value == default else f"{label}, {value:,} {axis}"
                found.append(rows.students(name, **{**fields, axis: value}))
                points.append((float(value), found[-1].at(success)))
            lines.append(Line(label, tuple(points), colour))
        top = tuple((float(value), rows.TEACHER_ROW.at(success)) for value in values)
        lines.append(Line(rows.TEACHER_ROW.label, top, "teacher", "--"))
        unit = "demonstrations" if axis == "demonstrations" else "distillation steps"
        curves.append(
            Plot(f"parity_{axis}", f"Success against {unit}", unit, "success, %", tuple(lines))
        )
    scratch = rows.students("from scratch, equal compute", **rows.SCRATCH)
    taught = rows.students("random init, three losses", init="random")
    many, sensitive = f"{rows.MORE:,} demonstrations", rows.SENSITIVE_ROW
    longest, best = rows.LONG_ROW, rows.BEST_ROW
    found = [*dict.fromkeys([*found, scratch, taught, sensitive, longest, best])]
    ten, elsewhere = Column("around", rows.around(10)), Column("elsewhere", rows.ELSEWHERE)
    columns = (success, ten, elsewhere, rows.TO_TEACHER)
    # The other columns for the default amounts alone.
    default_rows = [
        rows.TEACHER_ROW.label,
        scratch.label,
        taught.label,
        sensitive.label,
        longest.label,
        best.label,
        *(label for label, _, _ in ways),
        *(f"{label}, {many}" for label, _, _ in ways),
    ]
    only = {row.at(column) for row in found for column in (success, rows.TO_TEACHER)}
    only |= {(label, c.label) for label in default_rows for c in columns}
    return Claim(
        name="parity",
        question="Is the 6-layer student within one point of its teacher, and what does it take?",
        says="The paper: 95 % against 96 % on LIBERO; SmolVLA, at the same cost, reaches 87 %.",
        variants=tuple(found),
        columns=columns,
        statements=(
            Statement(
                "the student is at most 1 point below the teacher",
                rows.STUDENT_ROW.at(success),
                rows.TEACHER_ROW.at(success),
                at_least=-0.01,
            ),
            Statement(
                "the student is at most 1 point below the teacher on around",
                rows.STUDENT_ROW.at(ten),
                rows.TEACHER_ROW.at(ten),
                at_least=-0.01,
            ),
            Statement(
                f"with layers by sensitivity and {many} the student is at most 5 points below",
                sensitive.at(success),
                rows.TEACHER_ROW.at(success),
                at_least=-0.05,
            ),
            Statement(
                f"the same student after {rows.LONGER:,} steps is at most 1 point below",
                longest.at(success),
                rows.TEACHER_ROW.at(success),
                at_least=-0.01,
            ),
            Statement(
                "the best student is at most 3 points below",
                best.at(success),
                rows.TEACHER_ROW.at(success),
                at_least=-0.03,
            ),
            Statement(
                "four times the demonstrations raise success",
                (f"three losses, {many}", success.label),
                rows.STUDENT_ROW.at(success),
                at_least=0,
            ),
            Statement(
                "three losses beat the task loss alone",
                rows.STUDENT_ROW.at(success),
                ("task loss alone", success.label),
                at_least=0,
            ),
            Statement(
                f"three losses beat the task loss alone with {few}",
                (f"three losses, {few}", success.label),
                (f"task loss alone, {few}", success.label),
                at_least=0,
            ),
            Statement(
                "a cut student beats one trained from scratch with equal compute",
                rows.STUDENT_ROW.at(success),
                scratch.at(success),
                at_least=0,
            ),
        ),
        plots=tuple(curves),
        reference=rows.TEACHER_ROW.label,
        limits=f"The teacher has 1 M parameters, the paper's 3 B. It was trained on "
        f"{recipes.TEACHER.demonstrations:,} demonstrations, more than its students; the paper's "
        "students see all of their teacher's.",
        only=frozenset(only),
    )


def losses() -> Claim:
    ten = Column("around", rows.around(10))
    success, to_teacher, three = rows.IN_TIME, rows.TO_TEACHER, rows.STUDENT_ROW
    less = {
        "attention": rows.students("without attention", **rows.VELOCITY),
        "velocity": rows.students("without velocity", **{**rows.THREE, "velocity": 0.0}),
        "task": rows.students("without task", **{**rows.THREE, "task": 0.0}),
    }
    alone = rows.students("task loss alone", **rows.ALONE)
    all_tokens = rows.students("attention over all tokens", queries="all")
    heavier = rows.students("attention 1", attention=1.0)
    found = (
        rows.TEACHER_ROW,
        three,
        *less.values(),
        alone,
        rows.students("velocity alone", **{**rows.VELOCITY, "task": 0.0}),
        rows.students("attention 0.01", attention=0.01),
        heavier,
        rows.students("attention 10", attention=10.0),
        rows.students("attention of the first layer", attention_layer="first"),
        rows.students("attention of the last layer", attention_layer="last"),
        rows.students("attention, mean of heads", heads="head_mean"),
        all_tokens,
        rows.students("first-layer attention of text to images", queries="text"),
    )

    def nearer(text: str, than: Variant, more: str = "") -> Statement:
        words = f"{text} plans nearer to the teacher's{more}"
        return Statement(words, three.at(to_teacher), than.at(to_teacher), at_most=0)

    return Claim(
        name="losses",
        question="Does each of the three losses earn its place?",
        says="The paper: leaving out any of them costs success, and matching the attention of all "
        "tokens destroys training.",
        variants=found,
        columns=(to_teacher, rows.SPREAD, success, ten, rows.TO_EXPERT),
        statements=(
            *(
                Statement(
                    f"the {loss} loss raises success",
                    three.at(success),
                    row.at(success),
                    at_least=0,
                )
                for loss, row in less.items()
            ),
            *(nearer(f"the {loss} loss brings", less[loss]) for loss in ("attention", "velocity")),
            nearer("three losses bring", alone, " than the task loss alone"),
            Statement(
                "an attention weight of 1 beats one of 0.1",
                heavier.at(success),
                three.at(success),
                at_least=0,
            ),
            Statement(
                "three losses with an attention weight of 1 beat the task loss alone",
                heavier.at(success),
                alone.at(success),
                at_least=0,
            ),
            Statement(
                "matching the attention of all tokens costs at least 20 points",
                three.at(success),
                all_tokens.at(success),
                at_least=0.2,
            ),
        ),
        plots=(
            Plot(
                "losses",
                "Plans and losses",
                "",
                "energy distance to the teacher's plans, mm",
                (
                    Line(
                        "6 layers",
                        tuple((row.label, row.at(to_teacher)) for row in found[1:]),
                        "student",
                        "",
                    ),
                ),
            ),
        ),
        reference=rows.STUDENT_ROW.label,
        limits="All students are trained for the same number of steps; a loss may matter more with "
        "fewer or more (see [parity](#parity)).",
    )


def layers() -> Claim:
    relation, success = Column("relation", rows.RELATION), rows.IN_TIME
    depths = {d: rows.students(f"{d} layers", depth=d) for d in (12, 9, 4, 3, 2)}
    depths[6] = rows.STUDENT_ROW
    chosen = {
        name: rows.students(f"layers: {name}", strategy=name)
        for name in ("first", "last", "random", "similarity", "sensitivity")
    }
    found = (
        rows.TEACHER_ROW,
        *(depths[d] for d in (12, 9, 6, 4, 3, 2)),
        *chosen.values(),
        rows.BEST_ROW,
        rows.UNTRAINED_ROW,
    )
    curve = {**dict(sorted(depths.items())), 18: rows.TEACHER_ROW}
    return Claim(
        name="layers",
        question="How many layers does the student need, and does it matter which ones?",
        says="The paper: six evenly spaced layers of 18 suffice.",
        variants=found,
        columns=(success, relation, rows.TO_TEACHER),
        statements=(
            Statement(
                "six layers are at most 1 point below 18",
                rows.STUDENT_ROW.at(success),
                rows.TEACHER_ROW.at(success),
                at_least=-0.01,
            ),
            Statement(
                "a 2-layer student is at least 20 points below the teacher on relation",
                rows.TEACHER_ROW.at(relation),
                depths[2].at(relation),
                at_least=0.2,
            ),
            *(
                Statement(
                    f"uniform layers beat *{row.label}*",
                    rows.STUDENT_ROW.at(success),
                    row.at(success),
                    at_least=0,
                )
                for row in chosen.values()
            ),
        ),
        plots=(
            Plot(
                "layers",
                "Success against layers",
                "layers",
                "success, %",
                (
                    *(
                        Line(
                            label,
                            tuple((float(d), row.at(column)) for d, row in curve.items()),
                            colour,
                        )
                        for label, column, colour in (
                            ("all tasks in time", success, "student"),
                            ("relation", relation, "task_only"),
                        )
                    ),
                    *(
                        Line(label, ((6.0, row.at(success)),), colour, "")
                        for label, row, colour in (
                            ("six chosen by similarity", chosen["similarity"], "random_init"),
                            ("best student", rows.BEST_ROW, "teacher"),
                        )
                    ),
                ),
            ),
            Plot(
                "maps",
                "Which six layers",
                "",
                "success, %",
                (
                    Line(
                        "6 layers",
                        (
                            ("uniform", rows.STUDENT_ROW.at(success)),
                            *((name, row.at(success)) for name, row in chosen.items()),
                        ),
                        "student",
                        "",
                    ),
                ),
            ),
        ),
        reference=rows.STUDENT_ROW.label,
        limits="The teacher has 1 M parameters and was trained from scratch, so the layers that do "
        "its work say little about a fine-tuned π0. `first`, `similarity` and `sensitivity` share "
        "layers 0, 1, 4 and 5, of which the uniform cut has only 0. `random` draws different "
        "layers for each seed, so its interval includes that choice.",
    )
