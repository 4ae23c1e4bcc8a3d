"""The host side: optimizer, sharding, checkpoints, metrics, configs and the loop."""
