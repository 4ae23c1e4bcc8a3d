"""The complete experiment on two CPU cores: a trained π0, 18 → 6 layers, evaluated closed loop.

uv run scripts/train_distill.py pi0_turntable_l6
Records demonstrations, distils the student, trains two baselines, evaluates all of them on the same
episodes and writes a report. The teacher comes with the repository."""

import _base

from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """Three losses, 800 demonstrations, 600 steps."""
    return _base.turntable_student(_base.TURNTABLE_PI0, teacher="pi0_turntable")
