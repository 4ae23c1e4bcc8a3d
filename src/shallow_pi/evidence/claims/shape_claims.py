"""The claim about cuts in every direction: layers, tower, image tokens, steps and bits together."""

import itertools

from shallow_pi.evidence.claims import rows, step_claims
from shallow_pi.evidence.claims.claim import Claim, Column, Factor, Statement, Variant

# Levels of the students' parts, the uncut one first; 0 is the teacher's.
DEPTHS, TOWERS, TOKENS, STEPS = (6, 4), (0, 1), (0, 4), (10, 2, 1)
# Words of a row, and the end of its slug: weights alone, or activations too.
BITS = {
    "16": ("", ""),
    "8 for weights": (", 8 bits for weights", "--w8"),
    "8": (", 8 bits", "--int8"),
}
_WORDS = {"tower": ("", ", half tower"), "tokens": ("", ", quarter of tokens")}


def shapes() -> Claim:
    """On the one task with two modes: one training of a shape serves all steps and bits."""
    columns = {steps: Column(rows.in_words(steps), rows.around(steps)) for steps in STEPS}
    teacher = step_claims.AROUND.slug
    rows.RECIPES[teacher] = step_claims.AROUND
    found: list[Variant] = []
    design: list[tuple[tuple[str, ...], tuple[str, str]]] = []

    def add(row: Variant, levels: tuple[str, ...] = ()) -> None:
        """A row, and the same in 8 bits."""
        for bits, (words, end) in BITS.items():
            one = Variant(f"{row.label}{words}", tuple(f"{slug}{end}" for slug in row.policies))
            found.append(one)
            if levels:
                design.extend(
                    ((*levels, str(steps), bits), (one.label, column.label))
                    for steps, column in columns.items()
                )

    top = Variant("teacher, 18 layers", (teacher,))
    add(top)
    # The students of the claim `modes`, whose losses are parts of the others'.
    found.append(rows.students("6 layers, no reflow", **step_claims.OF_AROUND))
    found.append(
        rows.students("6 layers, reflow alone", **step_claims.OF_AROUND, **step_claims.REFLOW)
    )
    for depth, tower, tokens in itertools.product(DEPTHS, TOWERS, TOKENS):
        words = _WORDS["tower"][tower > 0] + _WORDS["tokens"][tokens > 0]
        row = rows.students(
            f"{depth} layers{words}",
            **step_claims.OF_AROUND,
            depth=depth,
            vision_depth=tower,
            image_tokens=tokens,
            reflow=1.0,
            num_steps=1,
        )
        add(row, (str(depth), "half" if tower else "all", "quarter" if tokens else "all"))
    six, ten = "6 layers", columns[10].label
    every = f"4 layers{_WORDS['tower'][1]}{_WORDS['tokens'][1]}, 8 bits"

    def costs(text: str, bound: float, row: str, column: str = ten, than: str = six) -> Statement:
        return Statement(text, (row, column), (than, ten), at_least=-bound)

    return Claim(
        name="shapes",
        question="Which cuts of a student combine well: layers, image tower, image tokens, "
        "integration steps, bits?",
        says="Ours: papers cut one thing at a time, but costs that are small by themselves may add "
        "up, or do worse than add up.",
        variants=tuple(found),
        columns=tuple(columns.values()),
        statements=(
            costs("six layers cost at most 10 points", 0.1, six, than=top.label),
            costs("four layers cost at most 5 points more", 0.05, "4 layers"),
            costs("half of the tower costs at most 5 points", 0.05, f"{six}, half tower"),
            costs(
                "a quarter of the tokens costs at most 5 points", 0.05, f"{six}, quarter of tokens"
            ),
            costs("8 bits for weights cost at most 2 points", 0.02, f"{six}, 8 bits for weights"),
            costs(
                "8 bits for weights and activations cost at most 2 points", 0.02, f"{six}, 8 bits"
            ),
            costs("one step costs at most 10 points", 0.1, six, columns[1].label),
            costs("all cuts together cost at most 20 points", 0.2, every, columns[1].label),
        ),
        # Success against operations is drawn by `factorial`.
        plots=(),
        reference=six,
        limits="A small teacher of one task, with an image tower of two layers and 16 tokens per "
        "camera. Students are trained for 600 steps with the three losses, reflow for one step "
        "and, if the tower is cut, the vision loss. 8 bits are int8; everything else is computed "
        "in float32 here, and counted as 16 bits.",
        factors=(
            Factor("layers", tuple(map(str, DEPTHS))),
            Factor("tower", ("all", "half")),
            Factor("image tokens", ("all", "quarter")),
            Factor("steps", tuple(map(str, STEPS))),
            Factor("bits", tuple(BITS)),
        ),
        design=tuple(design),
    )
