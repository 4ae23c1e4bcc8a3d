"""Our students as openpi configs, so that openpi restores, runs and serves them.

openpi fixes a model's sizes by name (`gemma_2b`, `So400m/14`) and has no field for depth. A frozen
subclass of its `Pi0Config` carries ours and swaps the two functions that look a name up, during one
`create`. Everything else of openpi (restoring, transforms, policy, server) then runs
unchanged on a student. openpi is imported inside functions; without it a `ModuleNotFoundError`
explains how to install it.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from shallow_pi import progress, suggestions
from shallow_pi.checkpoints import fetch, run_folder, weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import conversions, tokenizer, transforms
from shallow_pi.data.robots import robot as robots
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0

# Variant names that the swapped functions accept; any other name is an error.
BACKBONE, EXPERT = "gemma_2b", "gemma_300m"
# An object of openpi's classes, which mypy does not see.
OpenpiObject = Any


def model_config(model: pi0.Pi0Config) -> OpenpiObject:
    """openpi's model config with exactly these sizes.

    Raises:
      ValueError: the model differs from sizes that openpi hard-codes; names each.
    """
    require()
    from openpi.models import gemma as openpi_gemma
    from openpi.models import model as openpi_model

    fixed = {
        "cameras": (model.cameras, openpi_model.IMAGE_KEYS),
        "image_size": (model.image_size, openpi_model.IMAGE_RESOLUTION[0]),
        "vocab_size": (model.vocab_size, openpi_gemma.PALIGEMMA_VOCAB_SIZE),
        "image.patch_size": (model.image.patch_size, 14),
        "pooled_tokens": (model.pooled_tokens, 0),
        "scored_tokens": (model.scored_tokens, 0),
    }
    wrong = [f"{k} {ours} (openpi: {its})" for k, (ours, its) in fixed.items() if ours != its]
    if wrong:
        raise ValueError(
            f"openpi cannot run this model, because it hard-codes {', '.join(wrong)}: serve it "
            "with shallow_pi.deploy.policy instead"
        )
    return _config_class()(
        sizes=model,
        dtype=model.dtype,
        paligemma_variant=BACKBONE,
        action_expert_variant=EXPERT,
        action_dim=model.action_dim,
        action_horizon=model.action_horizon,
        max_token_len=model.max_token_len,
        pi05=model.pi05,
        discrete_state_input=model.discrete_state_input,
    )


@functools.cache
def _config_class() -> type:
    from openpi.models import pi0_config

    @dataclasses.dataclass(frozen=True)
    class StudentConfig(pi0_config.Pi0Config):  # type: ignore[misc]  # openpi is untyped here.
        """openpi's config of a model with our depth and other sizes."""

        sizes: pi0.Pi0Config = dataclasses.field(default_factory=pi0.Pi0Config)

        def create(self, rng: Array) -> OpenpiObject:
            with _sizes(self.sizes):
                return super().create(rng)

    return StudentConfig


@contextlib.contextmanager
def _sizes(model: pi0.Pi0Config) -> Iterator[None]:
    """Let openpi's size names resolve to this model's values."""
    from openpi.models import gemma as openpi_gemma
    from openpi.models import siglip as openpi_siglip

    streams = {BACKBONE: model.backbone, EXPERT: model.expert}
    patch = model.image.patch_size
    image = dataclasses.asdict(model.image) | {"patch_size": (patch, patch)}
    before = openpi_gemma.get_config, openpi_siglip.decode_variant

    def stream(variant: str) -> OpenpiObject:
        return openpi_gemma.Config(depth=model.depth, **dataclasses.asdict(streams[variant]))

    openpi_gemma.get_config, openpi_siglip.decode_variant = stream, lambda _: image
    try:
        yield
    finally:
        openpi_gemma.get_config, openpi_siglip.decode_variant = before


def sampler(
    model: pi0.Pi0Config,
    params: PyTree,
    observation: observations.Observation,
    noise: Array,
    num_steps: int,
) -> Callable[[], Array]:
    """openpi's `sample_actions` on these parameters, jitted as in its server; call it to sample.

    Args:
      model: sizes; openpi cameras that it lacks are passed black and masked.
      params: in the model's compute dtype.
      observation: a batch of them, images as uint8.
      noise: (b, action horizon, action dim).
      num_steps: integration steps.
    """
    require()
    from openpi.models import model as openpi_model
    from openpi.shared import nnx_utils

    cameras = openpi_model.IMAGE_KEYS
    policy = model_config(dataclasses.replace(model, cameras=cameras)).load(params)
    first = model.cameras[0]
    images, masks = observation.images, observation.image_masks
    black, absent = np.zeros_like(images[first]), np.zeros_like(masks[first])
    full = {
        "image": {name: images.get(name, black) for name in cameras},
        "image_mask": {name: masks.get(name, absent) for name in cameras},
        "state": observation.state,
        "tokenized_prompt": observation.tokenized_prompt,
        "tokenized_prompt_mask": observation.tokenized_prompt_mask,
    }
    theirs = openpi_model.Observation.from_dict(jax.tree.map(jnp.asarray, full))
    sample = nnx_utils.module_jit(policy.sample_actions)
    key = jax.random.key(0)
    return lambda: sample(key, theirs, num_steps=num_steps, noise=noise)


def train_config(
    name: str, model: pi0.Pi0Config, robot: robots.Robot, asset_id: str
) -> OpenpiObject:
    """openpi's TrainConfig of a student: its sizes and its robot's transforms.

    ALOHA, LIBERO and DROID use the keys of openpi's clients, a robot from an openpi config those of
    that config, and every other robot the flat keys of its recordings.
    """
    sizes = model_config(model)
    from openpi import transforms as openpi_transforms
    from openpi.policies import droid_policy
    from openpi.training import config as configs

    assets = configs.AssetsConfig(asset_id=asset_id)
    if robot.elsewhere:
        source = own_config(robot.elsewhere)
        data = dataclasses.replace(source.data, assets=assets)
        return dataclasses.replace(source, name=name, model=sizes, data=data)
    if robot in (robots.ALOHA, robots.ALOHA_SIM):
        data = configs.LeRobotAlohaDataConfig(
            assets=assets,
            use_delta_joint_actions=bool(robot.delta),
            default_prompt=robot.prompt or None,
        )
        return configs.TrainConfig(name=name, model=sizes, data=data)
    if robot in (robots.LIBERO, robots.LIBERO_DELTA):
        data = configs.LeRobotLiberoDataConfig(
            assets=assets, extra_delta_transform=bool(robot.delta)
        )
        return configs.TrainConfig(name=name, model=sizes, data=data)
    absolute = openpi_transforms.AbsoluteActions(robot.delta)
    if robot in (robots.DROID, robots.DROID_POSITION):
        group = openpi_transforms.Group(
            inputs=[droid_policy.DroidInputs(model_type=sizes.model_type)],
            outputs=[absolute, droid_policy.DroidOutputs()],
        )
    else:
        group = openpi_transforms.Group(
            inputs=[RobotInputs(robot, model.cameras, model.image_size)],
            outputs=[absolute, RobotOutputs(robot)],
        )
    data = configs.SimpleDataConfig(assets=assets, data_transforms=lambda _: group)
    return configs.TrainConfig(name=name, model=sizes, data=data)


@dataclasses.dataclass(frozen=True)
class RobotInputs:
    """A transform for openpi: a robot's observation in the flat keys of its recordings → openpi's.

    The prompt may be under openpi's key, if openpi's server has a default prompt.
    """

    robot: robots.Robot
    cameras: tuple[str, ...]
    image_size: int

    def __call__(self, data: transforms.Sample) -> transforms.Sample:
        robot = self.robot
        sample = transforms.Cameras(self.cameras, robot.cameras, self.image_size)(data)
        prompt = robot.prompt_key if robot.prompt_key in sample else "prompt"
        if not robot.prompt and sample.get(prompt) is None:
            raise ValueError(
                f"the observation lacks the instruction, {robot.prompt_key!r} or 'prompt' (or give "
                "openpi's server --default_prompt)"
            )
        if missing := [key for key in robot.state_keys if key not in sample]:
            raise ValueError(f"the observation lacks {missing}, got {sorted(sample)}")
        state = robot.state(sample)
        if state.shape != (robot.state_dim,):
            raise ValueError(
                f"{robot.state_vector.named} has shape {state.shape}, robot {robot.name} has "
                f"{robot.state_dim} dimensions; is this another robot's observation?"
            )
        return {
            "image": sample["image"],
            "image_mask": sample["image_mask"],
            "state": conversions.to_model(robot.state_conversion, state),
            "prompt": np.asarray(robot.prompt or sample[prompt]),
        }


@dataclasses.dataclass(frozen=True)
class RobotOutputs:
    """A transform for openpi: its absolute actions → those of the robot's dimensions and units."""

    robot: robots.Robot

    def __call__(self, data: transforms.Sample) -> transforms.Sample:
        robot = self.robot
        actions = np.asarray(data["actions"])[..., : robot.action_dim]
        return {**data, "actions": conversions.to_robot(robot.action_conversion, actions)}


def register(name: str, train: OpenpiObject) -> None:
    """Let openpi's `get_config(name)` give this config, in this process.

    Raises:
      ValueError: the name is that of an openpi config.
    """
    from openpi.training import config as configs

    # openpi has no hook for external configs; this is the table behind `get_config`.
    known = configs._CONFIGS_DICT
    if name in known and not isinstance(known[name].model, _config_class()):
        raise ValueError(
            f"{name!r} is a config of openpi's own: give the student another name, such as "
            f"{name}_l{train.model.sizes.depth}"
        )
    known[name] = train


def register_checkpoint(name: str, step: str | os.PathLike[str]) -> None:
    """Register the student of a step folder, checked before openpi reads it.

    Raises:
      FileNotFoundError: parameters, statistics or shallow_pi.json are missing; says which.
      ValueError: parameters that do not match the model in shallow_pi.json, or a model that
        openpi cannot run.
    """
    require()
    folder = fetch.locate(step)
    try:
        assets = policy_assets.load(folder)
    except FileNotFoundError as error:
        from openpi.training import config as configs

        close = suggestions.closest(name, configs._CONFIGS_DICT)
        raise FileNotFoundError(
            f"{error} (for a checkpoint of openpi's own, name its config{close})"
        ) from error
    stored = weights.stored_params(folder)
    weights.check_tree(pi0.abstract_params(assets.model), stored, f"student ({folder})")
    train = train_config(name, assets.model, assets.robot, assets.asset_id)
    tokenizer.Tokenizer(assets.tokenizer, assets.model.max_token_len).warn_of_paligemmas()
    assets.warn_of_still()
    if assets.quantize != "none":
        progress.warn(
            f"the student was trained for products in 8 bits ({assets.quantize}), and openpi "
            "multiplies its unrounded weights: its actions may be worse (shallow-pi serve rounds "
            "them)"
        )
    register(name, train)
    _sample_in(train, assets.num_steps)


def _sample_in(train: OpenpiObject, num_steps: int) -> None:
    """Give openpi's policies of a config this many integration steps, in this process.

    openpi's server has no flag for them: `create_trained_policy` takes them as `sample_kwargs`.
    """
    from openpi.policies import policy_config

    create = policy_config.create_trained_policy

    def with_steps(config: OpenpiObject, *args: object, **kwargs: object) -> OpenpiObject:
        if config is train and kwargs.get("sample_kwargs") is None:
            kwargs["sample_kwargs"] = {"num_steps": num_steps}
        return create(config, *args, **kwargs)

    policy_config.create_trained_policy = with_steps


def runs(name: str, step: str | os.PathLike[str]) -> bool:
    """True if openpi has a config of that name, and the step folder no student of another depth."""
    require()
    from openpi.models import gemma as openpi_gemma
    from openpi.training import config as configs

    if name not in configs._CONFIGS_DICT:
        return False
    folder = fetch.kept(step)
    if folder is None or not (folder / run_folder.ASSETS / policy_assets.FILE_NAME).is_file():
        return True
    variant = getattr(configs.get_config(name).model, "paligemma_variant", BACKBONE)
    return openpi_gemma.get_config(variant).depth == policy_assets.load(folder).model.depth


def own_config(name: str) -> OpenpiObject:
    """openpi's training config of that name.

    Raises:
      ValueError: there is none; names the closest, or lists them.
    """
    require()
    from openpi.training import config as configs

    known = configs._CONFIGS_DICT
    if name not in known:
        listed = f"; there are {', '.join(known)}"
        raise ValueError(
            f"no config {name!r} in openpi's {configs.__file__}"
            f"{suggestions.closest(name, known, listed)}"
        )
    return known[name]


def serve_script(checkout: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """openpi's scripts/serve_policy.py: in `checkout`, in $OPENPI_DIR, or next to the package.

    Raises:
      FileNotFoundError: it is in none of them; openpi's wheels contain no scripts.
    """
    # An editable install lies in <checkout>/src/openpi.
    beside = pathlib.Path(require()).parents[2]
    folder = pathlib.Path(checkout or os.environ.get("OPENPI_DIR") or beside).expanduser()
    script = folder / "scripts" / "serve_policy.py"
    if not script.is_file():
        raise FileNotFoundError(
            f"no scripts/serve_policy.py in {folder}, which openpi's packages lack: clone openpi's "
            "repository and name its folder with --openpi-dir or OPENPI_DIR"
        )
    return script


def require() -> str:
    """The path of openpi's package; if it is missing, an error explains how to install it."""
    found = importlib.util.find_spec("openpi")
    if found is None or found.origin is None:
        raise ModuleNotFoundError(
            "openpi is not installed here; it needs JAX 0.5.3 and NumPy below 2, so it has an "
            "environment of its own\n"
            "in a clone of openpi: `uv sync`, then `uv pip install --editable <folder of "
            "shallow_pi>`, and run this with its .venv/bin/python"
        )
    return found.origin
