"""A 6-layer student of the tabletop's teacher, evaluated on seven tasks and from unseen starts.

uv run scripts/train_distill.py pi0_tabletop_l6
Records demonstrations, distils the student, trains two baselines, and evaluates all of them on the
same episodes. The layers are chosen by sensitivity, which solves more episodes here than the
paper's evenly spaced layers; the first six solve slightly more still (docs/evidence.md, layers)."""

import dataclasses

import _base

from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """Three losses, 1,600 demonstrations, 1,200 steps."""
    made = _base.tabletop_student(_base.TABLETOP_PI0, "pi0_tabletop", demonstrations=1600)
    student = config.StudentConfig(layers=(0, 1, 4, 5, 12, 16))  # By sensitivity.
    return dataclasses.replace(made, student=student)
