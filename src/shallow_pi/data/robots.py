"""A robot is its camera names, its key names and its sizes; two functions make pipelines of it.

`inputs` turns a robot observation (LeRobot's flat keys, from a simulator, a robot or a dataset)
into one model sample; `outputs` turns normalized model actions back into the robot's.
To add a robot, write one `Robot(...)` below and list it in `ROBOTS`.
"""

import dataclasses
import difflib
from collections.abc import Mapping

from shallow_pi.data import normalize, tokenizer, transforms


@dataclasses.dataclass(frozen=True)
class Robot:
    """Names and sizes of one embodiment."""

    name: str
    # Model camera → key of the picture in the robot's observations and datasets.
    cameras: Mapping[str, str]
    state_dim: int
    action_dim: int
    # Control frequency (Hz), which is also the frame rate of its datasets.
    fps: int | float
    state_key: str = "observation.state"
    action_key: str = "action"
    prompt_key: str = "task"
    # Leading action dimensions the model sees as the difference from the state (True) or as they
    # are (False); the robot's own actions stay absolute.
    delta: tuple[bool, ...] = ()


# The embedded task: gantry position in metres, absolute position targets in metres.
TURNTABLE = Robot(
    name="turntable",
    cameras={
        "base_0_rgb": "observation.images.base",
        "left_wrist_0_rgb": "observation.images.wrist",
    },
    state_dim=3,
    action_dim=3,
    fps=20,
    delta=(True, True, True),
)

# Bimanual ALOHA as its LeRobot datasets name things. Joint values are passed on as recorded:
# the pi0_base teacher expects its own joint signs, gripper range and delta actions on top.
ALOHA = Robot(
    name="aloha",
    cameras={
        "base_0_rgb": "observation.images.cam_high",
        "left_wrist_0_rgb": "observation.images.cam_left_wrist",
        "right_wrist_0_rgb": "observation.images.cam_right_wrist",
    },
    state_dim=14,
    action_dim=14,
    fps=50,
)

ROBOTS = {robot.name: robot for robot in (TURNTABLE, ALOHA)}


def find(name: str) -> Robot:
    """The robot of that name."""
    if name not in ROBOTS:
        close = difflib.get_close_matches(name, ROBOTS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"unknown robot {name!r}; there are {sorted(ROBOTS)}{hint}")
    return ROBOTS[name]


def inputs(
    robot: Robot,
    *,
    cameras: tuple[str, ...],
    image_size: int,
    action_dim: int,
    tokenizer: tokenizer.Tokenizer,
    stats: Mapping[str, normalize.NormStats],
    kind: normalize.Kind,
    discrete_state: bool = False,
) -> transforms.Transform:
    """Robot observation to model sample (a SPEC batch without its batch axis).

    Args:
      robot: where the observation comes from.
      cameras: the model's cameras in order; one the robot lacks becomes black with mask False.
      image_size: side of the model's pictures.
      action_dim: the model's action dimension, to which state and actions are padded.
      tokenizer: of the prompt.
      stats: statistics of `state` and `actions` in the robot's dimensions.
      kind: z-score (π0) or quantile (π0.5).
      discrete_state: whether the state is written into the prompt (π0.5).
    """
    if not set(cameras) & set(robot.cameras):
        raise ValueError(
            f"robot {robot.name} has cameras for {sorted(robot.cameras)}, the model wants "
            f"{list(cameras)}: none in common"
        )
    for what, dim in (("state", robot.state_dim), ("action", robot.action_dim)):
        if dim > action_dim:
            raise ValueError(
                f"robot {robot.name} has {what} dimension {dim}, more than the model's "
                f"action_dim {action_dim}; use a model with a larger action_dim"
            )
    for key in ("state", "actions"):
        if key not in stats:
            raise ValueError(f"normalization statistics lack {key!r}; there are {sorted(stats)}")
    wanted = {camera: key for camera, key in robot.cameras.items() if camera in cameras}
    return transforms.compose(
        transforms.Cameras(cameras, wanted, image_size),
        _Rename(robot),
        transforms.Resize(image_size),
        transforms.DeltaActions(robot.delta),
        transforms.Normalize(stats, kind),
        transforms.TokenizePrompt(tokenizer, discrete_state),
        transforms.PadDimensions(action_dim),
    )


@dataclasses.dataclass(frozen=True)
class _Rename:
    """Robot keys to model keys, sizes checked; everything else is left behind."""

    robot: Robot

    def __call__(self, sample: transforms.Sample) -> transforms.Sample:
        robot = self.robot
        keys = {"image": "image", "image_mask": "image_mask"}
        keys |= {"state": robot.state_key, "prompt": robot.prompt_key}
        keys |= {"actions": robot.action_key, "action_is_pad": "action_is_pad"}
        optional = ("actions", "action_is_pad")
        sample = transforms.Repack(keys, optional)(sample)
        for key, dim in (("state", robot.state_dim), ("actions", robot.action_dim)):
            if key in sample and sample[key].shape[-1] != dim:
                raise ValueError(
                    f"{keys[key]!r} has {sample[key].shape[-1]} dimensions, robot {robot.name} "
                    f"has {dim}; is this another robot's data?"
                )
        if "action_is_pad" in sample:
            sample["action_mask"] = ~sample.pop("action_is_pad")
        return sample


def outputs(
    robot: Robot, *, stats: Mapping[str, normalize.NormStats], kind: normalize.Kind
) -> transforms.Transform:
    """`{"actions": normalized (*n, ah, ad), "state"}` to `{"actions": the robot's (*n, ah, rd)}`.

    Other keys pass through; `state` is the robot's own, not normalized, from which delta actions
    were predicted.
    """
    return transforms.compose(
        transforms.CutDimensions(robot.action_dim),
        transforms.Unnormalize({"actions": stats["actions"]}, kind),
        transforms.AbsoluteActions(robot.delta),
    )
