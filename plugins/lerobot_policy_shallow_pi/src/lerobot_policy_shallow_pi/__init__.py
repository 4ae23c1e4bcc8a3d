"""LeRobot's π0 and π0.5 at any depth: importing this registers the two policy types.

The pipelines of an exported folder use steps that LeRobot registers with its π0 and π0.5, and two
steps of this package for robots with other units.
"""

import lerobot.policies.pi0.processor_pi0
import lerobot.policies.pi05.processor_pi05  # noqa: F401 (imported to be registered, as above)

from lerobot_policy_shallow_pi import configuration_shallow_pi, units_shallow_pi

ShallowPi0Config = configuration_shallow_pi.ShallowPi0Config
ShallowPi05Config = configuration_shallow_pi.ShallowPi05Config
ToModelStep = units_shallow_pi.ToModelStep
ToRobotStep = units_shallow_pi.ToRobotStep
