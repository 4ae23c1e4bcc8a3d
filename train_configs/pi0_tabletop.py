"""The tabletop's teacher: an 18-layer π0 trained from scratch on seven tasks.

uv run scripts/train_teacher.py pi0_tabletop
The packaged one was trained by `scripts/reproduce.py` on an accelerator; on two cores this takes a
night. Its results are in docs/evidence.md."""

import dataclasses

import _base

from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """Seven tasks with language instructions; 10,000 demonstrations."""
    steps = 20_000
    return dataclasses.replace(
        _base.turntable_teacher(_base.TABLETOP_PI0),
        data=dataclasses.replace(_base.TABLETOP_DATA, cache="none"),
        schedule=_base.short_schedule(steps, peak=2e-3),
        closed_loop=config.ClosedLoopConfig(
            sim="tabletop", demonstrations=10_000, execute_steps=10
        ),
        num_train_steps=steps,
    )
