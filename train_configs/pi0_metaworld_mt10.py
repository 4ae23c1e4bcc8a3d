"""A π0 of 18 layers for Meta-World's MT10, trained from nothing on demonstrations of its experts.

uv run scripts/train_teacher.py pi0_metaworld_mt10
Needs the extra metaworld. The packaged one was trained by `scripts/reproduce.py metaworld` in 87
minutes on one CPU core that it shared; docs/benchmarks.md has its results."""

import _base

from shallow_pi.distill import losses
from shallow_pi.models import observation
from shallow_pi.training import config, optimizer


def get_config() -> config.DistillConfig:
    """1,000 demonstrations of ten tasks, task loss only."""
    steps = 8_000
    return config.DistillConfig(
        model=_base.METAWORLD_PI0,
        data=_base.METAWORLD_DATA,
        losses=losses.Losses(task=1.0, velocity=0.0, attention=0.0),
        augmentation=observation.NO_AUGMENTATION,
        schedule=optimizer.CosineSchedule.over(steps, 1e-3),
        closed_loop=_base.METAWORLD_TASK,
        batch_size=32,
        draws=2,
        num_train_steps=steps,
        save_interval=2000,
        keep_period=0,
    )
