"""The claims about the method, in the order in which they are worth running (see `claim`)."""

from collections.abc import Iterable

from shallow_pi.evidence.claims import (
    cells,
    late_claims,
    recipes,
    rival_claims,
    rows,
    shape_claims,
    step_claims,
    student_claims,
    teacher_claims,
)
from shallow_pi.evidence.claims.claim import (
    Claim,
    Column,
    Line,
    Plot,
    Statement,
    Variant,
    points,
)
from shallow_pi.sims import metaworld_tasks


def _instrument() -> Claim:
    whole = Column("six tasks", rows.SUITE)
    by_task = [Column(task, rows.SUITE, task=task) for task in rows.TASKS]
    ten, one = Column("around, 10 steps", rows.around(10)), Column("around, 1 step", rows.around(1))
    # Tasks of which 83 episodes do not tell enough: touch and clutter for the teacher alone.
    alone = {
        name: Column(f"{name}, 500 episodes", cells.Situation((name,)))
        for name in ("touch", "clutter")
    }
    relation = alone["relation"] = Column("relation, 500 episodes", rows.RELATION)
    top, two, cut = rows.TEACHER_ROW, rows.TWO_ROW, rows.UNTRAINED_ROW
    variants = (Variant("expert", (recipes.EXPERT,)), top, rows.STUDENT_ROW, two, cut)
    columns = (ten, one, whole, *by_task, *alone.values())
    return Claim(
        name="instrument",
        question="Do the tasks tell policies apart?",
        says="Our check before any comparison: the teacher must solve every task, and a policy "
        "with fewer integration steps, fewer layers or no training must score lower.",
        variants=variants,
        columns=columns,
        statements=(
            *(
                Statement(f"the teacher solves at least 90 % of {c.label}", top.at(c), at_least=0.9)
                for c in (alone.get(column.label, column) for column in (*by_task, ten))
            ),
            Statement(
                "one integration step costs the teacher at least 20 points on around",
                top.at(ten),
                top.at(one),
                at_least=0.2,
            ),
            Statement(
                "a 2-layer student is at least 20 points below the teacher on relation",
                top.at(relation),
                two.at(relation),
                at_least=0.2,
            ),
            *(
                Statement(
                    f"an untrained cut solves at most 5 % of {c.label}", cut.at(c), at_most=0.05
                )
                for c in (ten, whole, relation)
            ),
        ),
        plots=(
            points(
                "instrument",
                "Success by task",
                {"teacher": top, "student": rows.STUDENT_ROW, "random_init": two, "cut_only": cut},
                (*by_task, ten, one),
            ),
        ),
        reference=top.label,
        limits="One teacher; its training seed is not varied. Unless a column says 500 episodes, "
        "the six tasks share 500, about 83 each. Two tasks were made easier after a first "
        "measurement, when all policies had been trained. With a pillar that was hard "
        "throughout, the teacher solved 79 % of around (75 to 83; in one step 26). With cups that "
        "could have the named block's colour, it solved 89 % of clutter (86 to 92).",
        only=frozenset(
            row.at(column)
            for row in variants
            for column in columns
            if row is top or column not in (alone["touch"], alone["clutter"])
        ),
    )


def _skipping() -> Claim:
    top, success, dropped = rows.TEACHER_ROW, rows.IN_TIME, (1, 2, 3, 4, 6, 9)
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
        question="Can layers be dropped without training?",
        says="The paper: if layers are dropped in order of sensitivity, the least sensitive "
        "first, success collapses beyond three; similarity between layers does not predict which "
        "can be dropped.",
        variants=(top, *found.values(), rows.STUDENT_ROW),
        columns=(success,),
        statements=(
            Statement(
                "without the three least sensitive layers the teacher loses at most 20 points",
                found["sensitivity", 3].at(success),
                top.at(success),
                at_least=-0.2,
            ),
            Statement(
                "without the six least sensitive layers the teacher loses at least 50 points",
                found["sensitivity", 6].at(success),
                top.at(success),
                at_most=-0.5,
            ),
            Statement(
                "with three layers dropped, sensitivity is at least as good as similarity",
                found["sensitivity", 3].at(success),
                found["similarity", 3].at(success),
                at_least=0,
            ),
        ),
        plots=(
            Plot(
                "skipping",
                "Layers left out, without training",
                "layers left out",
                "success, %",
                (
                    *(
                        Line(
                            f"in the order of {order}",
                            (
                                (0.0, top.at(success)),
                                *((float(n), found[order, n].at(success)) for n in dropped),
                            ),
                            colour,
                        )
                        for order, colour in zip(orders, ("teacher", "task_only"), strict=True)
                    ),
                    Line("12 left out, three losses", ((12.0, rows.STUDENT_ROW.at(success)),)),
                ),
            ),
        ),
        reference=top.label,
        limits="One teacher; the orders are measured on held-out observations of these tasks.",
    )


def _metaworld() -> Claim:
    situation = cells.Situation(metaworld_tasks.MT10, execute_steps=8, sim="metaworld_mt10")
    whole = Column("MT10", situation)
    by_task = tuple(Column(task, situation, task=task) for task in metaworld_tasks.MT10)
    top = recipes.METAWORLD_TEACHER
    rows.RECIPES[top.slug] = top
    teacher = Variant("teacher, 18 layers", (top.slug,))
    own = recipes.METAWORLD_STUDENT
    three = rows.students_like(own, "three losses")
    heavier = rows.students_like(own, "three losses, attention 1", attention=1.0)
    alone = rows.students_like(own, "task loss alone", **rows.ALONE)
    return Claim(
        name="metaworld",
        question="Does a 6-layer student keep its teacher's success on a public benchmark?",
        says=f"Ours, on Meta-World's MT10 (docs/benchmarks.md): an 18-layer teacher trained from "
        f"scratch on {top.demonstrations:,} demonstrations of the package's experts "
        f"({top.steps:,} steps, batch {top.batch_size}), 6-layer students on "
        f"{own.demonstrations} others ({own.steps:,} steps, batch {own.batch_size}).",
        variants=(
            Variant("expert", (recipes.EXPERT,)),
            teacher,
            three,
            heavier,
            alone,
            Variant("cut, not trained", (f"{top.slug}--keep-0.3.7.10.14.17",)),
        ),
        columns=(whole, *by_task),
        statements=(
            Statement("the teacher solves at least 80 %", teacher.at(whole), at_least=0.8),
            *(
                Statement(
                    f"{text} at most 3 points below its teacher",
                    row.at(whole),
                    teacher.at(whole),
                    at_least=-0.03,
                )
                for text, row in (
                    ("the student is", three),
                    ("with an attention weight of 1 the student is", heavier),
                )
            ),
            *(
                Statement(f"{text} the task loss alone", row.at(whole), alone.at(whole), at_least=0)
                for text, row in (
                    ("three losses beat", three),
                    ("with an attention weight of 1 three losses beat", heavier),
                )
            ),
        ),
        plots=(
            points(
                "metaworld",
                "Meta-World MT10",
                {"teacher": teacher, "student": three, "task_only": alone},
                (whole, *by_task),
            ),
        ),
        reference=teacher.label,
        limits="One teacher. 50 episodes a task, at most 500 control steps at 80 Hz; 8 of 16 "
        "planned actions are executed before the next plan, and the simulation waits for each "
        "plan. Success, step limit, objects and goals are the package's; instructions and camera "
        "(64 pixels) are ours, so other published numbers do not compare.",
    )


CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        _instrument(),
        late_claims.on_the_tabletop(),
        late_claims.on_the_turntable(),
        student_claims.parity(),
        student_claims.losses(),
        student_claims.layers(),
        _skipping(),
        step_claims.few_steps(),
        step_claims.modes(),
        shape_claims.shapes(),
        teacher_claims.sizes(),
        teacher_claims.last_layer(),
        rival_claims.rivals(),
        _metaworld(),
    )
}


CELLS = tuple(cell for claim in CLAIMS.values() for cell in claim.cells())


def students(wanted: Iterable[cells.Cell] = CELLS) -> list[str]:
    """Slugs of the policies that cells need and a recipe makes, in order, teachers first."""
    needed = [cell.policy.partition("--")[0] for cell in wanted]
    found = [slug for slug in dict.fromkeys(needed) if slug in rows.RECIPES]
    return list(dict.fromkeys([*map(rows.teacher_of, found), *found]))
