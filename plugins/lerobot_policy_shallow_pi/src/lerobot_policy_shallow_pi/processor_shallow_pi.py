"""Pipelines for a new policy: LeRobot's for π0 and π0.5.

An exported folder includes its pipelines; these are for training from scratch.
"""

from typing import Any

from lerobot.policies.pi0 import processor_pi0
from lerobot.policies.pi05 import processor_pi05

from lerobot_policy_shallow_pi import configuration_shallow_pi as configuration


def make_shallow_pi0_pre_post_processors(
    config: configuration.ShallowPi0Config, dataset_stats: Any = None
) -> tuple[Any, Any]:
    """Input and output pipeline of a π0."""
    return processor_pi0.make_pi0_pre_post_processors(config, dataset_stats)


def make_shallow_pi05_pre_post_processors(
    config: configuration.ShallowPi05Config, dataset_stats: Any = None
) -> tuple[Any, Any]:
    """Input and output pipeline of a π0.5."""
    return processor_pi05.make_pi05_pre_post_processors(config, dataset_stats)
