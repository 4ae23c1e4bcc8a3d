"""Effects of a factorial study from outcomes that are written out, and costs of its policies."""

import dataclasses

import pytest

from shallow_pi.evidence import calibrating, factorial, miniature, outcomes, sources
from shallow_pi.evidence.claims import cells
from shallow_pi.evidence.claims.claim import Claim, Column, Factor, Variant

COLUMNS = {n: Column(f"{n} steps", cells.Situation(("touch",), num_steps=n)) for n in (2, 1)}


def _claim():
    """Layers 6 and 4 × steps 2 and 1; two training seeds of each depth."""
    variants = tuple(Variant(f"{d} layers", (f"l{d}-s0", f"l{d}-s1")) for d in (6, 4))
    return Claim(
        name="made-up",
        question="",
        says="",
        variants=variants,
        columns=tuple(COLUMNS.values()),
        statements=(),
        plots=(),
        reference="6 layers",
        limits="",
        factors=(Factor("layers", ("6", "4")), Factor("steps", ("2", "1"))),
        design=tuple(
            ((str(d), str(n)), (f"{d} layers", column.label))
            for d in (6, 4)
            for n, column in COLUMNS.items()
        ),
    )


def _table(successes):
    """Of outcomes by (depth, seed, steps): success in each of four episodes."""
    rows, tasks = {}, {}
    for (depth, seed, steps), values in successes.items():
        cell = cells.Cell(f"l{depth}-s{seed}", COLUMNS[steps].situation)
        rows[cell] = {i: {"success": float(value)} for i, value in enumerate(values)}
        tasks[cell] = dict.fromkeys(rows[cell], "touch")
    return outcomes.Table(_claim(), cells.Results(rows, tasks, {}, {}), 4)


WHOLE = {
    (6, 0, 2): [1, 1, 1, 1],
    (6, 1, 2): [1, 1, 1, 0],
    (6, 0, 1): [1, 1, 0, 0],
    (6, 1, 1): [1, 1, 1, 0],
    (4, 0, 2): [1, 1, 0, 0],
    (4, 1, 2): [1, 1, 0, 0],
    (4, 0, 1): [0, 0, 0, 0],
    (4, 1, 1): [1, 0, 0, 0],
}


def test_effects_are_means_over_pairs_and_interactions_what_is_beyond_them():
    found = {effect.cuts: effect for effect in factorial.effects(_table(WHOLE))}
    layers, steps = (0, "4"), (1, "1")
    assert set(found) == {(layers,), (steps,), (layers, steps)}
    # Means: 6 layers 7/8 and 5/8 in two and in one step, 4 layers 4/8 and 1/8.
    assert found[layers,].found.mean == pytest.approx((4 + 1 - 7 - 5) / 16)
    assert found[steps,].found.mean == pytest.approx((5 + 1 - 7 - 4) / 16)
    assert found[layers, steps].found.mean == pytest.approx((1 - 4) / 8 - (5 - 7) / 8)
    assert {(e.count, e.total) for e in found.values()} == {(2, 2), (1, 1)}
    both = found[layers,].found
    assert (both.seeds, both.episodes) == (2, 4)
    assert both.low < both.mean < both.high


def test_the_cells_with_most_seeds_count():
    fewer = {key: values for key, values in WHOLE.items() if key != (4, 1, 1)}
    found = {effect.cuts: effect for effect in factorial.effects(_table(fewer))}
    alone = found[(0, "4"),]
    assert (alone.found.seeds, alone.count, alone.total) == (2, 1, 2)
    assert alone.found.mean == pytest.approx((4 - 7) / 8)
    # All four are needed: of the one seed that all have.
    assert found[(0, "4"), (1, "1")].found.seeds == 1
    assert factorial.effects(_table({(6, 0, 2): [1, 1, 1, 1]})) == []


def test_cells_of_other_training_seeds_are_no_pair():
    apart = {key: WHOLE[key] for key in ((6, 0, 2), (4, 1, 2), (6, 1, 1), (4, 1, 1))}
    found = {effect.cuts: effect for effect in factorial.effects(_table(apart))}
    assert found[(0, "4"),].count == 1, "in one step, and not the first seed with the second"
    assert found[(0, "4"),].found.mean == pytest.approx((1 - 3) / 4)


def test_the_frontier_is_what_nothing_cheaper_exceeds():
    points = {("a", ""): (3, 0.5), ("b", ""): (1, 0.2), ("c", ""): (2, 0.1), ("d", ""): (3, 0.9)}
    assert factorial.frontier(points) == [("b", ""), ("d", "")]


@pytest.mark.slow
def test_costs_follow_shape_steps_and_bits(tmp_path):
    claim = _claim()
    eight = Variant("6 layers, 8 bits", ("l6-s0--w8",))
    claim = dataclasses.replace(claim, variants=(*claim.variants, eight))
    runs, results = tmp_path / "runs", tmp_path / "results"
    factorial.ensure([claim], runs, results)
    assert factorial.read(claim, results) == {}  # No policies are there.
    miniature.make_policies(["l6-s0"], runs)
    factorial.ensure([claim], runs, results)
    found = factorial.read(claim, results)
    two, one = found["6 layers", "2 steps"], found["6 layers", "1 steps"]
    assert one.operations < two.operations < 2 * one.operations
    assert one.bytes == two.bytes
    calibrating.ensure(["l6-s0--int8"], runs)
    assert sources.load("l6-s0--int8", runs, 1).quantize == "int8"
    assert one.bytes / 2 < found[eight.label, "2 steps"].bytes < one.bytes
    table = dataclasses.replace(_table(WHOLE), claim=claim)
    text = "\n".join(factorial.lines(table, results))
    counts = f"{two.operations / 1e6:.1f} / {one.operations / 1e6:.1f}"
    assert f"| 6 layers, 8 bits | {counts} |" in text
    pytest.importorskip("matplotlib")
    assert factorial.plot(tmp_path / "pareto.png", table, results)
    assert (tmp_path / "pareto.png").stat().st_size > 5000
