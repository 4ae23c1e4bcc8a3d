"""A 6-layer student of the tabletop's teacher, evaluated on seven tasks and from other starts.

uv run scripts/train_distill.py pi0_tabletop_l6
Records demonstrations, distils the student and two references, and evaluates all
of them on the same episodes."""

import _base

from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """Three losses, 400 demonstrations, 1,200 steps."""
    return _base.tabletop_student(_base.TABLETOP_PI0, teacher="pi0_tabletop")
