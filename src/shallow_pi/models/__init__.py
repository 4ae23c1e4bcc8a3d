"""The policy: pure functions of (config, params, arrays), with openpi's parameter tree."""
