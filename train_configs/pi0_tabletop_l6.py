"""A 6-layer student of the tabletop's teacher, evaluated on seven tasks and from other starts.

uv run scripts/train_distill.py pi0_tabletop_l6
Records demonstrations, distils the student and two references, and evaluates all
of them on the same episodes."""

import dataclasses

import _base

from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """Three losses, 400 demonstrations, 1,200 steps."""
    steps = 1200
    return dataclasses.replace(
        _base.turntable_student(_base.TABLETOP_PI0, teacher="pi0_tabletop"),
        data=_base.TABLETOP_DATA,
        schedule=_base.short_schedule(steps, peak=2e-3),
        closed_loop=config.ClosedLoopConfig(
            sim="tabletop", demonstrations=400, seed=1, execute_steps=10
        ),
        num_train_steps=steps,
    )
