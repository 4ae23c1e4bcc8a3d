"""openpi's π0.5 for LIBERO, 18 → 6 layers, with cuts of little cost: 4.2 ms predicted on an H200.

uv run scripts/train_distill.py pi05_libero_l6_fast --exp-name first
As pi05_libero_l6, with half of the image tower (and a loss on its tokens) and a quarter of the
image tokens. Predicted times are 4.2 ms on an H200 and 50 on an AGX Orin, down from 6.1 and 85. It
keeps ten integration steps; docs/student_shapes.md shows what each cut costs, and other budgets.
Not run at full size yet."""

import _base

from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """openpi's values, and the fast student."""
    return _base.fast(_base.pi05_libero(depth=6), num_steps=10)
