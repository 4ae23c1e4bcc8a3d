"""From checkpoint to robot: a policy takes a robot's observation and gives its actions."""
