"""The two policy types: LeRobot's configs with a depth.

No default depth would be right. The policies check it, because an error in a config's
`__post_init__` reaches the user without its message.
"""

import dataclasses

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0 import configuration_pi0
from lerobot.policies.pi05 import configuration_pi05


@PreTrainedConfig.register_subclass("shallow_pi0")
@dataclasses.dataclass
class ShallowPi0Config(configuration_pi0.PI0Config):
    """π0 with `depth` layers in backbone and action expert."""

    # Layers; an exported folder says how many.
    depth: int = 0


@PreTrainedConfig.register_subclass("shallow_pi05")
@dataclasses.dataclass
class ShallowPi05Config(configuration_pi05.PI05Config):
    """π0.5 with `depth` layers in backbone and action expert."""

    # Layers; an exported folder says how many.
    depth: int = 0
