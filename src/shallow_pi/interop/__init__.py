"""Where openpi and lerobot meet us: the only folder that imports them, inside functions."""
