"""Meta-World's MT10, 18 → 6 layers, compared with its teacher on the same episodes.

uv run scripts/train_distill.py pi0_metaworld_mt10_l6
Needs the extra metaworld. --teacher.train first trains the teacher anew, by pi0_metaworld_mt10, in
place of the packaged one."""

import dataclasses

import _base

from shallow_pi.models import observation
from shallow_pi.training import config, optimizer


def get_config() -> config.DistillConfig:
    """Three losses, other demonstrations than the teacher's."""
    steps = 2000
    return config.DistillConfig(
        model=_base.METAWORLD_PI0,
        data=_base.METAWORLD_DATA,
        teacher=config.TeacherConfig(
            path=str(_base.ASSETS / "pi0_metaworld_mt10"), config="pi0_metaworld_mt10"
        ),
        student=config.StudentConfig(depth=6),
        augmentation=observation.NO_AUGMENTATION,
        schedule=optimizer.CosineSchedule.over(steps, 1e-3),
        closed_loop=dataclasses.replace(_base.METAWORLD_TASK, demonstrations=300, seed=1),
        batch_size=32,
        draws=2,
        num_train_steps=steps,
        save_interval=500,
        keep_period=0,
    )
