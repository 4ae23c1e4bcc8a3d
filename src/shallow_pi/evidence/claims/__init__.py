"""The claims as data: what is compared in which situations, and the cells that measure it."""
