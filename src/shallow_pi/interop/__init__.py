"""The bridge to openpi and lerobot: the only folder that imports them, inside functions."""
