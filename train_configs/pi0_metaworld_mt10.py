"""A π0 of 18 layers for Meta-World's MT10, trained from nothing on demonstrations of its experts.

uv run scripts/train_teacher.py pi0_metaworld_mt10
Needs the extra metaworld. Meant for one GPU: about 15,000 steps take 10 minutes of an H100."""

import _base

from shallow_pi.distill import losses
from shallow_pi.models import observation
from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """1,000 demonstrations of ten tasks, task loss only."""
    steps = 12_000
    return config.DistillConfig(
        model=_base.METAWORLD_PI0,
        data=_base.METAWORLD_DATA,
        losses=losses.Losses(task=1.0, velocity=0.0, attention=0.0),
        augmentation=observation.NO_AUGMENTATION,
        schedule=_base.short_schedule(steps, peak=1e-3),
        closed_loop=_base.METAWORLD_TASK,
        batch_size=128,
        draws=2,
        num_train_steps=steps,
        save_interval=2000,
        keep_period=0,
    )
