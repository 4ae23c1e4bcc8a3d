"""A student of pi0_tabletop_last: 6 layers of the backbone, and 6 of the expert behind them.

uv run scripts/train_distill.py pi0_tabletop_last_l6 --teacher.train
The repository does not include its teacher; --teacher.train trains it first (a night)."""

import dataclasses

import _base

from shallow_pi.distill import layer_map
from shallow_pi.training import config


def get_config() -> config.DistillConfig:
    """Both parts cut uniformly; three losses, the attention loss at the middle expert layer."""
    backbone = layer_map.uniform(6, 18).layers
    expert = tuple(18 + layer for layer in backbone)
    student = config.StudentConfig(
        layers=backbone + expert, backbone_layers=backbone, expert_layers=expert
    )
    made = _base.tabletop_student(_base.TABLETOP_LAST, teacher="pi0_tabletop_last")
    return dataclasses.replace(made, student=student)
