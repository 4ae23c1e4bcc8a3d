"""What a policy says of itself: to the clients of its server, and to a reader in one line."""

from typing import Any

from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.models import pi0


def metadata(assets: policy_assets.Assets) -> dict[str, Any]:
    """Facts for clients, in plain values; `action_dim` is the robot's."""
    model, robot = assets.model, assets.robot
    return {
        **robot.metadata,
        "model": "pi05" if model.pi05 else "pi0",
        "depth": model.depth,
        "robot": robot.name,
        "image_size": model.image_size,
        "action_horizon": model.action_horizon,
        "action_dim": robot.action_dim,
        "state_dim": robot.state_dim,
        "cameras": {name: robot.cameras[name] for name in assets.seen.cameras},
        "state_keys": list(robot.state_keys),
        # Empty where any sizes do that add up, and where all values of the keys are taken.
        "state_sizes": list(robot.state_sizes),
        "state_indices": list(robot.state_indices),
        "action_indices": list(robot.action_indices),
        "action_key": robot.action_key,
        "action_keys": list(robot.action_keys),
        "prompt_key": robot.prompt_key,
        "fps": robot.fps,
        "state_names": list(assets.names.get("state", ())),
        "action_names": list(assets.names.get("actions", ())),
    }


def image_tokens(model: pi0.Pi0Config) -> str:
    """The image tokens that the backbone sees, in words."""
    fewer = "chosen " if model.scored_tokens else "pooled "
    how = fewer if model.image_tokens < model.patches else ""
    return f"{model.image_tokens} {how}image tokens a camera"


def description(assets: policy_assets.Assets, quantize: str) -> str:
    """One line: the model, its robot, and all that a folder of openpi's does not say."""
    model, robot = assets.model, assets.robot
    state = ", state in the prompt" if model.discrete_state_input else ""
    fewer = f", {image_tokens(model)}" if model.image_tokens < model.patches else ""
    black = " and ".join(name for name in model.cameras if name not in robot.cameras)
    eyes = (black and f", {black} black") + (robot.taken and f", {robot.taken}")
    bits = "" if quantize == "none" else f", products in 8 bits ({quantize})"
    return (
        f"{model.kind}, {model.depths}, for {robot.name}: {model.action_horizon} actions "
        f"of {robot.action_dim} (model: {model.action_dim}) dimensions, {model.max_token_len} "
        f"prompt tokens{eyes}{fewer}{state}{bits}, statistics {assets.asset_id!r}, "
        f"tokenizer {assets.tokenizer}"
    )
