"""The tabletop's teacher: an 18-layer π0 trained from scratch on seven tasks.

uv run scripts/train_teacher.py pi0_tabletop
`scripts/reproduce.py` trained the packaged one in 235 s on an H200 that it shared with other work;
on two CPU cores it takes a night. Its results are in docs/evidence.md."""

import _base

from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """Seven tasks with language instructions; 8,000 demonstrations."""
    return _base.tabletop_teacher(_base.TABLETOP_PI0)
