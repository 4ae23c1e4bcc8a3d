"""A teacher for one tabletop task: around a pillar, on the side that a coin flip chooses.

uv run scripts/train_teacher.py pi0_tabletop_around
Training takes twenty minutes on two cores. The policies of the claim `modes` (docs/evidence.md)
come from it."""

import dataclasses

import _base

from shallow_pi.training import config, optimizer


def get_config() -> config.DistillConfig:
    """The turntable's sizes with a plan of a second; 1,200 demonstrations."""
    steps = 2400
    return dataclasses.replace(
        _base.turntable_teacher(_base.AROUND_PI0),
        data=_base.TABLETOP_DATA,
        schedule=optimizer.CosineSchedule.over(steps, 2e-3),
        closed_loop=config.ClosedLoopConfig(
            sim="tabletop", tasks=("around",), demonstrations=1200, execute_steps=20
        ),
        num_train_steps=steps,
    )
