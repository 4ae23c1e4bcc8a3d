"""The tabletop's teacher with an expert that reads only the backbone's last state, as in GR00T.

uv run scripts/train_teacher.py pi0_tabletop_last
For the claim that distillation also works for policies other than π0; not yet fully trained."""

import _base

from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """As pi0_tabletop, with 18 layers of the backbone before 18 of the expert."""
    return _base.tabletop_teacher(_base.TABLETOP_LAST)
