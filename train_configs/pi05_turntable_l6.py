"""The turntable's π0.5 (adaptive norms, the state in the prompt), 18 → 6 layers.

uv run scripts/train_distill.py pi05_turntable_l6 --teacher.train
The repository does not include its teacher; --teacher.train trains it first (about an hour)."""

import _base

from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """As pi0_turntable_l6, on the π0.5 architecture."""
    return _base.turntable_student(_base.TURNTABLE_PI05, teacher="pi05_turntable")
