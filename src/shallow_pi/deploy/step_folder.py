"""Which folder a policy is read from, and what is known of a policy that is not ours.

A run's folder stands for one of its steps. A step folder of ours says everything in its assets; one
of openpi's has statistics alone, so the sizes are read off the parameters and the robot is given.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

from shallow_pi.checkpoints import fetch, run_folder, safetensors_file, sizes, weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import normalize
from shallow_pi.data.robots import robot as robots
from shallow_pi.data.robots import tokenizer as prompts
from shallow_pi.models import pi0


def find(path: str | os.PathLike[str], step: str | int = "last") -> pathlib.Path:
    """The step folder at `path`, or one of the run whose folder it is.

    Args:
      path: a step folder or a run's; local, `gs://` or `hf://`.
      step: of a run: "last", "best" (by the `best.json` in it) or the number of a step.

    Raises:
      ValueError, FileNotFoundError: there is no such step; says which there are.
    """
    folder = fetch.locate(path).expanduser().absolute()
    if folder.name == "params":  # Its assets lie beside it.
        folder = folder.parent
    wanted = str(step)
    found = {}
    if folder.is_dir() and not (folder / "assets").is_dir():
        steps = [child for child in folder.iterdir() if child.name.isdigit() and child.is_dir()]
        found = {int(child.name): child for child in steps}
    if not found:
        if wanted not in ("last", folder.name):
            raise ValueError(
                f"step {wanted} was asked for, and {folder} is not the folder of a run: give the "
                "run's folder, checkpoints/<config>/<exp>, or a step folder alone"
            )
        return folder
    there = f"there are {', '.join(map(str, sorted(found)))} in {folder}"
    if wanted == "last":
        return found[max(found)]
    number = _best(folder) if wanted == "best" else wanted
    if not number.isdigit():
        raise ValueError(f"a step is 'last', 'best' or a number, got {wanted!r}; {there}")
    if int(number) not in found:
        raise FileNotFoundError(f"no step {number} (asked for: {wanted}); {there}")
    return found[int(number)]


def _best(run: pathlib.Path) -> str:
    path = run / run_folder.BEST_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {run_folder.BEST_FILE} in {run}: this run did not keep its best step; take "
            "the last one or name its number"
        )
    try:
        return str(int(json.loads(path.read_text(encoding="utf-8"))["step"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f'{path} is damaged ({error!r}): expected {{"step": N}}; name the step by its number'
        ) from error


def assets(
    step: pathlib.Path,
    *,
    robot: str | robots.Robot | None = None,
    asset_id: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    **fields: Any,
) -> policy_assets.Assets:
    """The assets of a step folder, ours or openpi's.

    Args:
      step: the folder.
      robot: which robot it is for, by name or in full. Needed for a folder of openpi's; for one of
        ours it may give keys and cameras other names, never other units.
      asset_id: of openpi's, whose statistics, where there are several.
      tokenizer: of openpi's, a SentencePiece model; None is the one in the folder, or PaliGemma's.
      fields: of the `Pi0Config`, where they are to be others than found or openpi's.

    Raises:
      FileNotFoundError: no step folder, or an incomplete one.
      ValueError: a robot that is not given or does not fit, or unknown fields.
    """
    known = {field.name for field in dataclasses.fields(pi0.Pi0Config)}
    if not set(fields) <= known:
        raise ValueError(f"a model has no {sorted(set(fields) - known)}; it has {sorted(known)}")
    robot = robots.find(robot) if isinstance(robot, str) else robot
    has_params = (step / "params").is_dir() or safetensors_file.find(step) is not None
    if (step / "assets" / policy_assets.FILE_NAME).is_file() or not has_params:
        own = policy_assets.load(step)
        if robot is not None:
            _check_units(own.robot, robot)
            own = dataclasses.replace(own, robot=robot)
        return dataclasses.replace(own, model=dataclasses.replace(own.model, **fields))
    if robot is None:
        raise ValueError(
            f"{step} has no assets/{policy_assets.FILE_NAME}: it is not one of ours, and openpi's "
            "do not say which robot they are for. Give robot=, a name or a robots.Robot; there are "
            f"{sorted(robots.ROBOTS)}"
        )
    folder = _statistics(step, asset_id or robot.name, given=asset_id is not None)
    model = _model(step, fields)
    return policy_assets.Assets(
        model,
        robot,
        _tokenizer(step, model, tokenizer),
        normalize.load(folder),
        folder.relative_to(step / "assets").as_posix(),
    )


def _model(step: pathlib.Path, fields: dict[str, Any]) -> pi0.Pi0Config:
    """The sizes of the parameters; what no shape tells is openpi's default for the model."""
    found = sizes.of(weights.stored_params(step))
    if found["pi05"]:
        found |= {"max_token_len": 200, "discrete_state_input": True}
    return pi0.Pi0Config(**(found | fields))


def _statistics(step: pathlib.Path, name: str, given: bool) -> pathlib.Path:
    """The folder of `name`'s statistics, or of the only ones there are."""
    root = step / "assets"
    there = sorted(path.parent for path in root.rglob(normalize.FILE_NAME))
    fitting = [folder for folder in there if name in (folder.name, str(folder.relative_to(root)))]
    if not fitting and len(there) == 1 and not given:
        fitting = there
    if len(fitting) != 1:
        names = [str(folder.relative_to(root)) for folder in there]
        raise FileNotFoundError(
            f"no statistics of {name!r} in {root} ({normalize.FILE_NAME}); there are {names}: "
            "choose with asset_id=, or put them there"
        )
    return fitting[0]


def _tokenizer(
    step: pathlib.Path, model: pi0.Pi0Config, given: str | os.PathLike[str] | None
) -> pathlib.Path:
    own = step / "assets" / policy_assets.TOKENIZER_NAME
    if given is None and own.is_file():
        return own
    if given is None and model.vocab_size != pi0.PALIGEMMA_VOCAB_SIZE:
        raise FileNotFoundError(
            f"no {policy_assets.TOKENIZER_NAME} in {own.parent}, and a vocabulary of "
            f"{model.vocab_size} is not PaliGemma's: give tokenizer="
        )
    return fetch.locate(given or prompts.PALIGEMMA)


def _check_units(own: robots.Robot, given: robots.Robot) -> None:
    different = robots.unit_differences(own, given)
    if different:
        raise ValueError(
            f"the policy was trained for robot {own.name}, and {given.name} has other units: "
            f"{'; '.join(different)}. Keys and cameras may have other names; "
            "dataclasses.replace(policy.assets.robot, ...) changes them alone"
        )
