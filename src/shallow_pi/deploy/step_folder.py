"""Find the step folder of a policy, and the assets of policies that are not ours.

A run's folder stands for one of its steps. A step folder of ours says everything in its assets; one
of openpi's or LeRobot's has statistics and little else, so the sizes are read off the parameters,
the robot is given, and every guess is named in a warning.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from shallow_pi import progress
from shallow_pi.checkpoints import fetch, run_folder, safetensors_file, sizes, weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import checkpoint_statistics, lerobot_policy, normalize
from shallow_pi.data.robots import robot as robots
from shallow_pi.data.robots import tokenizer as prompts
from shallow_pi.models import pi0

# Fields of openpi's configs whose policies openpi publishes; its defaults are named too.
_PUBLISHED: dict[str, dict[str, object]] = {
    "pi05_droid": {"action_horizon": 15, "max_token_len": 200, "discrete_state_input": True},
    "pi05_libero": {"action_horizon": 10, "max_token_len": 200, "discrete_state_input": False},
    "pi0_aloha_pen_uncap": {"action_horizon": 50, "max_token_len": 48},
    "pi0_aloha_sim": {"action_horizon": 50, "max_token_len": 48},
    "pi0_aloha_towel": {"action_horizon": 50, "max_token_len": 48},
    "pi0_aloha_tupperware": {"action_horizon": 50, "max_token_len": 48},
    "pi0_droid": {"action_horizon": 10, "max_token_len": 48},
}


def find(path: str | os.PathLike[str], step: str | int = "last") -> pathlib.Path:
    """The step folder at `path`, or one of the run whose folder it is.

    Args:
      path: a step folder or a run's; local, `gs://` or `hf://`.
      step: of a run: "last", "best" (by the `best.json` in it) or the number of a step.

    Raises:
      ValueError, FileNotFoundError: there is no such step; says which there are.
    """
    folder = weights.step_folder(fetch.locate(path).expanduser().absolute())
    wanted = str(step)
    found = {}
    if folder.is_dir() and not (folder / run_folder.ASSETS).is_dir():
        steps = [child for child in folder.iterdir() if child.name.isdigit() and child.is_dir()]
        found = {int(child.name): child for child in steps}
    if not found:
        if not folder.exists():
            raise FileNotFoundError(
                f"there is no checkpoint at {folder}: give a step folder or the folder of a run, "
                f"checkpoints/<config>/<exp>, and check the spelling{fetch.advice(folder)}"
            )
        if (folder / run_folder.CONFIG_FILE).is_file() and (
            folder / run_folder.METRICS_FILE
        ).exists():
            raise FileNotFoundError(f"the run in {folder} has no complete checkpoint yet")
        if wanted not in ("last", folder.name):
            raise ValueError(
                f"step {wanted} was requested, but {folder} is not the folder of a run: give the "
                "run's folder, checkpoints/<config>/<exp>, or a step folder without a step"
            )
        if not (folder / run_folder.ASSETS).is_dir() and safetensors_file.find(folder) is None:
            weights.params_folder(folder)  # Raises where neither is; says what is there.
        return folder
    there = f"there are {', '.join(map(str, sorted(found)))} in {folder}"
    if wanted == "last":
        return weights.step_folder(found[max(found)])
    number = _best(folder) if wanted == "best" else wanted
    if not number.isdigit():
        raise ValueError(f"a step is 'last', 'best' or a number, got {wanted!r}; {there}")
    if int(number) not in found:
        which = " (the best)" if wanted == "best" else ""
        raise FileNotFoundError(f"no step {number}{which}; {there}")
    return weights.step_folder(found[int(number)])


def _best(run: pathlib.Path) -> str:
    path = run / run_folder.BEST_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {run_folder.BEST_FILE} in {run}: this run did not keep its best step; use "
            "the last one, or give its number"
        )
    try:
        return str(int(json.loads(path.read_text(encoding="utf-8"))["step"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{path} is damaged ({error!r}): expected {{"step": N}}; name the step by its number'
        ) from error


def params(step: pathlib.Path, model: pi0.Pi0Config) -> PyTree:
    """The parameters of a policy's step folder, in the model's compute dtype."""
    dtype = jnp.dtype(model.dtype)
    return weights.load_params(step, pi0.abstract_params(model), dtype=dtype, what="policy")


def assets(
    step: pathlib.Path,
    *,
    robot: str | robots.Robot | None = None,
    asset_id: str | None = None,
    norm_stats: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    **fields: Any,
) -> policy_assets.Assets:
    """The assets of a step folder; guesses are named in warnings.

    Args:
      step: the folder; ours, openpi's or LeRobot's.
      robot: which robot it is for, by name or in full. Needed for a folder that is not ours; for
        one of ours it may give keys and cameras other names, never other units.
      asset_id: whose statistics, where there are several.
      norm_stats: folder of other statistics than those in the step folder.
      tokenizer: a SentencePiece model; None is the one in the folder, or PaliGemma's.
      fields: of the `Pi0Config`, where they are to be others than found or openpi's.

    Raises:
      FileNotFoundError: no step folder, or an incomplete one.
      ValueError: a robot that is not given or does not fit, or unknown fields.
    """
    known = {field.name for field in dataclasses.fields(pi0.Pi0Config)}
    if not set(fields) <= known:
        raise ValueError(f"a model has no {sorted(set(fields) - known)}; it has {sorted(known)}")
    if asset_id is not None:
        normalize.check_asset_id(asset_id, "--policy.asset-id (asset_id= in Python)")
    robot = robots.find(robot) if isinstance(robot, str) else robot
    if (step / run_folder.ASSETS / policy_assets.FILE_NAME).is_file():
        own = policy_assets.load(step)
        if robot is not None:
            _check_renamed(own, robot)
            own = dataclasses.replace(own, robot=robot)
        if norm_stats is not None or asset_id not in (None, own.asset_id):
            found = _statistics(step, asset_id or own.asset_id, own.model, norm_stats, exact=True)
            own = dataclasses.replace(own, stats=found.stats, asset_id=found.asset_id)
        if tokenizer is not None:
            own = dataclasses.replace(own, tokenizer=fetch.locate(tokenizer))
        return dataclasses.replace(own, model=dataclasses.replace(own.model, **fields))
    # Each raises where no robot would help.
    policy_assets.check_is_policy(step)
    if safetensors_file.find(step) is None:
        weights.params_folder(step)
    if robot is None:
        raise ValueError(
            f"{step} has no assets/{policy_assets.FILE_NAME}, so its robot is unknown: give "
            "--policy.robot (robot= in Python), a name or a file with a ROBOT\n"
            f"names: {', '.join(sorted(robots.ROBOTS))}"
        )
    model = _model(step, fields)
    lerobot_policy.check_robot(step, robot)
    lerobot_policy.warn_of_padding(step)
    exact = asset_id is not None
    found = _statistics(step, asset_id or robot.name, model, norm_stats, exact=exact)
    file = _tokenizer(step, model, tokenizer)
    assets = policy_assets.Assets(model, robot, file, found.stats, found.asset_id)
    num_steps = lerobot_policy.num_steps(step)
    return assets if num_steps is None else dataclasses.replace(assets, num_steps=num_steps)


def _model(step: pathlib.Path, fields: dict[str, object]) -> pi0.Pi0Config:
    """The sizes of the parameters; fields that no file tells are openpi's defaults, and named."""
    found = sizes.of(weights.stored_params(step))
    # openpi's defaults for what its configs set by name.
    guesses = {"action_horizon": 50, "max_token_len": 48}
    if found["pi05"]:
        guesses |= {"max_token_len": 200, "discrete_state_input": True}
    told = {**_published(step), **lerobot_policy.told(step)}
    guessed = {key: value for key, value in guesses.items() if key not in {*told, *fields}}
    if guessed:
        flags = " ".join(f"--policy.{key.replace('_', '-')}" for key in guessed)
        values = ", ".join(f"{key} {value}" for key, value in guessed.items())
        progress.warn(
            f"{step} does not store all settings of its model: assuming openpi's {values} (to set "
            f"others: {flags}; in Python, the arguments of these names)"
        )
    return pi0.Pi0Config(**(found | guesses | told | fields))


def _published(step: pathlib.Path) -> dict[str, object]:
    """Fields of a policy that openpi publishes, as its config of that name has them.

    Known by its place in the cache, which is that in openpi's bucket.
    """
    if step.parent.parts[-2:] != ("openpi-assets", "checkpoints"):
        return {}
    return _PUBLISHED.get(step.name, {})


def _statistics(
    step: pathlib.Path,
    name: str,
    model: pi0.Pi0Config,
    given: str | os.PathLike[str] | None,
    exact: bool,
) -> checkpoint_statistics.Found:
    if given is not None:
        return checkpoint_statistics.at(fetch.locate(given), name)
    kind, options = normalize.kind_of(model.pi05), "--policy.asset-id, --policy.norm-stats"
    found = checkpoint_statistics.find(step, name, kind, options=options, exact=exact)
    if found is None:
        raise FileNotFoundError(
            f"no statistics in {step}: expected openpi's assets/<name>/{normalize.FILE_NAME} or "
            f"LeRobot's {lerobot_policy.PREPROCESSOR} and tensors; give --policy.norm-stats FOLDER"
        )
    return found


def _tokenizer(
    step: pathlib.Path, model: pi0.Pi0Config, given: str | os.PathLike[str] | None
) -> pathlib.Path:
    own = step / run_folder.ASSETS / policy_assets.TOKENIZER_NAME
    if given is None and own.is_file():
        return own
    if given is None and model.vocab_size != pi0.PALIGEMMA_VOCAB_SIZE:
        raise FileNotFoundError(
            f"no {policy_assets.TOKENIZER_NAME} in {own.parent}, and a vocabulary of "
            f"{model.vocab_size} is not PaliGemma's: give --policy.tokenizer (tokenizer= in Python)"
        )
    if given is None:
        lerobot_policy.warn_of_tokenizer(step)
    return fetch.locate(given or prompts.PALIGEMMA)


def _check_renamed(own: policy_assets.Assets, given: robots.Robot) -> None:
    """Raise unless a robot given for a trained policy differs from its own in names only."""
    trained = own.robot
    different = robots.unit_differences(trained, given)
    if different:
        raise ValueError(
            f"the policy was trained for robot {trained.name}, and {given.name} has other units: "
            f"{'; '.join(different)}\n"
            "only keys and cameras may have other names: in a robot file (docs/robots.md), or by "
            "dataclasses.replace(policy.assets.robot, ...)"
        )
    if trained.elsewhere:
        if given != dataclasses.replace(trained, elsewhere=""):  # As an export is read back.
            progress.warn(
                f"the units and differences of robot {given.name} must be those of openpi's config "
                f"{trained.elsewhere}, and its normalization openpi's default: neither is checked "
                "here"
            )
        return
    seen = set(own.model.cameras)
    if lacking := sorted(seen & (set(trained.cameras) - set(given.cameras))):
        progress.warn(
            f"the policy was trained with {lacking}, for which robot {given.name} has no "
            "camera: those images will be black"
        )
    if given.fps != trained.fps:
        progress.warn(
            f"the policy was trained at {trained.fps:g} actions a second, robot {given.name} runs "
            f"at {given.fps:g}: it will move slower or faster than in training"
        )
