"""Many devices and many hosts: sharding, processes, and their agreement."""
