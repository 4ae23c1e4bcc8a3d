"""Synthetic batches, a tiny random 4-layer π0, 4 → 2 layers: under a minute on a CPU.

uv run scripts/train_distill.py debug"""

import _base

from shallow_pi.data import data_config
from shallow_pi.distill import losses
from shallow_pi.training import config, optimizer


def get_config() -> config.DistillConfig:
    """All loss terms, on synthetic samples."""
    return config.DistillConfig(
        model=_base.DEBUG_PI0,
        data=data_config.DataConfig(source="synthetic"),
        teacher=config.TeacherConfig(path="random"),
        student=config.StudentConfig(depth=2),
        losses=losses.Losses(),
        schedule=optimizer.CosineSchedule.over(40, 1e-3),
        batch_size=16,
        num_train_steps=40,
        log_interval=10,
        save_interval=20,
    )
