"""The turntable's teacher: an 18-layer π0 trained from scratch with the task loss only.

uv run scripts/train_teacher.py pi0_turntable
Results and training time are in assets/pi0_turntable/recipe.json."""

import _base

from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """Two tasks, six colours, four objects; 3,000 demonstrations."""
    return _base.turntable_teacher(_base.TURNTABLE_PI0)
