"""What a policy is: pure functions of (config, params, arrays), with openpi's parameter tree."""
