"""openpi's training configs as experiments of ours, by name.

Model and data are those of the openpi config: samples come from openpi's loader if it can run, else
from recordings through a `Robot` with the same transforms. Losses, schedule and batch size are
those of the method.
"""

import dataclasses
import os

from shallow_pi import progress
from shallow_pi.data import data_config
from shallow_pi.data.robots import normalize
from shallow_pi.data.robots import robot as robots
from shallow_pi.interop import openpi, openpi_data
from shallow_pi.models import gemma, pi0
from shallow_pi.training import config

# Names of the trained policies that openpi publishes, among those it has recordings for.
PUBLISHED = ("pi05_libero", "pi05_droid", "pi0_droid", "pi0_aloha_sim", "pi0_aloha_pen_uncap")


def experiment(name: str) -> config.DistillConfig:
    """openpi's training config of that name as a distillation to six layers.

    If openpi publishes no policy of that name, the teacher's path is the folder of your openpi
    runs, to be completed by experiment and step.

    Raises:
      ValueError: an unknown name, an unsupported model, or transforms that match no robot of ours
        while openpi's loader cannot run here; names the part.
    """
    source = openpi.own_config(name)
    try:
        model = _model(source.model)
    except ValueError as error:
        raise ValueError(f"openpi's config {name}: {error}") from error
    path = f"{source.checkpoint_base_dir}/{name}"
    if name in PUBLISHED:
        path = f"gs://openpi-assets/checkpoints/{name}"
    return config.DistillConfig(
        name=f"{name}_l6",
        model=model,
        data=_data(name, source),
        teacher=config.TeacherConfig(path=path),
        student=config.StudentConfig(depth=min(6, model.depth)),
    )


def _model(source: openpi.OpenpiObject) -> pi0.Pi0Config:
    from openpi.models import gemma as openpi_gemma
    from openpi.models import pi0_config

    if not isinstance(source, pi0_config.Pi0Config):
        raise ValueError(
            f"{type(source).__name__} is a {source.model_type.value} model; only π0 and π0.5, as "
            "openpi's Pi0Config describes them, can be distilled"
        )
    streams = [
        openpi_gemma.get_config(variant)
        for variant in (source.paligemma_variant, source.action_expert_variant)
    ]
    fields = [field.name for field in dataclasses.fields(gemma.GemmaConfig)]
    backbone, expert = (
        gemma.GemmaConfig(**{field: getattr(stream, field) for field in fields})
        for stream in streams
    )
    return pi0.Pi0Config(
        pi05=source.pi05,
        depth=streams[0].depth,
        backbone=backbone,
        expert=expert,
        action_dim=source.action_dim,
        action_horizon=source.action_horizon,
        max_token_len=source.max_token_len,
        discrete_state_input=source.pi05 and source.discrete_state_input,
        dtype=source.dtype,
    )


def _data(name: str, source: openpi.OpenpiObject) -> data_config.DataConfig:
    from openpi.training import config as configs

    if isinstance(source.data, configs.FakeDataConfig):
        return data_config.DataConfig(source="synthetic")
    assets = source.data.assets
    asset_id = assets.asset_id or source.data.repo_id
    if not isinstance(asset_id, str):
        raise ValueError(
            f"openpi's config {name} does not name its statistics: expected a text as its asset_id "
            f"or else its repo_id, got {asset_id!r}; give its data AssetsConfig(asset_id=...)"
        )
    normalize.check_asset_id(asset_id, f"asset_id of openpi's config {name}, or else its repo_id,")
    common = data_config.DataConfig(
        asset_id=asset_id,
        norm_stats=f"{os.fspath(assets.assets_dir).rstrip('/')}/{asset_id}"
        if assets.assets_dir
        else "",
    )
    obstacle = openpi_data.obstacle(source)
    try:
        robot = _robot(name, source.data, source.model).name
    except ValueError as error:
        if obstacle:
            raise ValueError(
                f"{error}\n(openpi's loader cannot read its data here: {obstacle})"
            ) from error
        robot = f"{openpi_data.PREFIX}{name}"
    if obstacle:
        progress.say(
            f"Data: openpi's loader cannot read those of {name} here ({obstacle}); LeRobot "
            f"recordings are read from --data.path, as robot {robot} (--data.robot)"
        )
        return dataclasses.replace(common, robot=robot)
    return dataclasses.replace(common, source=openpi_data.SOURCE, path=name, robot=robot)


def _robot(name: str, source: openpi.OpenpiObject, model: openpi.OpenpiObject) -> robots.Robot:
    """Our robot with the same transforms as the config."""
    from openpi.policies import droid_policy
    from openpi.training import config as configs
    from openpi.training import droid_rlds_dataset

    kind = type(source)  # A class derived from one of openpi's has transforms of its own.
    if kind is configs.LeRobotLiberoDataConfig:
        return robots.LIBERO_DELTA if source.extra_delta_transform else robots.LIBERO
    if kind is configs.LeRobotAlohaDataConfig and (cameras := _aloha_cameras(source)):
        return _aloha(name, source, cameras)
    if kind is configs.LeRobotDROIDDataConfig:
        return robots.DROID
    if kind is configs.RLDSDroidDataConfig:
        positions = droid_rlds_dataset.DroidActionSpace.JOINT_POSITION
        return robots.DROID_POSITION if source.action_space == positions else robots.DROID
    if kind is configs.SimpleDataConfig:
        try:
            group = source.data_transforms(model)
        except TypeError as error:  # openpi's paligemma_diffusion_droid is out of date.
            raise ValueError(f"{name}: openpi's own transforms fail, {error}") from error
        droid = [droid_policy.DroidInputs(model.model_type)], [droid_policy.DroidOutputs()]
        if (list(group.inputs), list(group.outputs)) == droid:
            return robots.DROID
    raise ValueError(
        f"{name} cannot be taken over: no robot of ours has the transforms of "
        f"{kind.__name__}\n"
        "describe the robot in a file (docs/robots.md) and write a config of your own "
        "(docs/configs.md)"
    )


def _aloha_cameras(source: openpi.OpenpiObject) -> dict[str, str] | None:
    """Each camera's key in the recordings; None if state or actions have not ALOHA's keys."""
    from openpi import transforms as openpi_transforms

    if not isinstance(source.repo_id, str):  # For inference only, without recordings.
        return dict(robots.ALOHA.cameras)
    of = {"base_0_rgb": "cam_high", "left_wrist_0_rgb": "cam_left_wrist"}
    of |= {"right_wrist_0_rgb": "cam_right_wrist"}
    match source.repack_transforms.inputs:
        case [openpi_transforms.RepackTransform(structure={"images": dict() as keys, **others})]:
            vectors = {"state": robots.ALOHA.state_key, "actions": robots.ALOHA.action_key}
            if vectors.items() <= others.items():
                return {camera: keys[key] for camera, key in of.items() if key in keys}
    return None


def _aloha(name: str, source: openpi.OpenpiObject, cameras: dict[str, str]) -> robots.Robot:
    """The listed ALOHA with these cameras, units, deltas and prompt."""
    wanted = dataclasses.replace(
        robots.ALOHA,
        cameras=cameras,
        delta=robots.ALOHA.delta if source.use_delta_joint_actions else (),
        state_conversion=robots.ALOHA_STATE if source.adapt_to_pi else None,
        action_conversion=robots.ALOHA_ACTIONS if source.adapt_to_pi else None,
        prompt=source.default_prompt or "",
    )
    for robot in (robots.ALOHA, robots.ALOHA_SIM):
        if dataclasses.replace(robot, name=wanted.name) == wanted:
            return robot
    own = {field.name: getattr(wanted, field.name) for field in dataclasses.fields(wanted)}
    changes = [f"{k}={v!r}" for k, v in own.items() if v != getattr(robots.ALOHA, k)]
    raise ValueError(
        f"{name} cannot be taken over by name: no ALOHA of ours has its prompt, cameras and "
        "deltas; write a config of your own (docs/configs.md) for a file with this ROBOT "
        f"(docs/robots.md):\nROBOT = dataclasses.replace(robots.ALOHA, {', '.join(changes)})"
    )
