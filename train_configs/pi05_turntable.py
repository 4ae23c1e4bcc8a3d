"""The turntable's teacher as a π0.5: adaptive norms for time, the state in the prompt.

uv run scripts/train_teacher.py pi05_turntable"""

import _base

from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """As pi0_turntable, on the π0.5 architecture."""
    return _base.turntable_teacher(_base.TURNTABLE_PI05)
