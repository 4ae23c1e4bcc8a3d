"""Everything a policy needs beside its parameters, and its files in every checkpoint.

A step folder holds `assets/shallow_pi.json` (the model's sizes, and the robot's),
`assets/tokenizer.model` and openpi's `assets/<asset_id>/norm_stats.json`. With them `<step>` alone
is a deployable policy, and `inputs` and `outputs` are the same transforms in training and on the
robot.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from shallow_pi import progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.data.robots import (
    checkpoint_statistics,
    lerobot_policy,
    normalize,
    pipelines,
    tokenizer,
    transforms,
)
from shallow_pi.data.robots import robot as robots
from shallow_pi.inference import quantize as quantization
from shallow_pi.models import gemma, pi0, siglip

FILE_NAME = "shallow_pi.json"
TOKENIZER_NAME = "tokenizer.model"


@dataclasses.dataclass(frozen=True, eq=False)
class Assets:
    """A model's sizes, its robot, tokenizer and statistics."""

    model: pi0.Pi0Config
    robot: robots.Robot
    # SentencePiece model file.
    tokenizer: pathlib.Path
    # Statistics of `state` and `actions`.
    stats: Mapping[str, normalize.NormStats]
    # Folder of the statistics under `assets/`, as in openpi.
    asset_id: str
    # Names of the robot's dimensions of `state` and `actions`, such as its joints, where the
    # dataset tells them.
    names: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    # Integration steps that the policy was trained for.
    num_steps: int = 10
    # Products in 8 bits whose weights the policy was trained with (see `inference.quantize`).
    quantize: quantization.Scheme = "none"

    @property
    def kind(self) -> normalize.Kind:
        """The normalization of the model's inputs: z-score for π0, quantiles for π0.5."""
        return normalize.kind_of(self.model.pi05)

    @property
    def seen(self) -> pi0.Pi0Config:
        """The model with only the robot's cameras: the others are black and masked everywhere."""
        there = tuple(name for name in self.model.cameras if name in self.robot.cameras)
        return dataclasses.replace(self.model, cameras=there)

    def inputs(self, *, resize: bool = True) -> transforms.Composed:
        """Robot observation → model sample without its batch axis.

        Without `resize`, images keep the robot's size.

        Raises:
          ValueError: robot, tokenizer or statistics do not fit the model.
        """
        prompts = tokenizer.Tokenizer(self.tokenizer, self.model.max_token_len)
        if prompts.vocab_size > self.model.vocab_size:
            raise ValueError(
                f"tokenizer {self.tokenizer} has {prompts.vocab_size} pieces, the model embeds "
                f"{self.model.vocab_size}: give the one the model was trained with"
            )
        return pipelines.inputs(
            self.robot,
            cameras=self.model.cameras,
            image_size=self.model.image_size,
            action_dim=self.model.action_dim,
            tokenizer=prompts,
            stats=self.stats,
            kind=self.kind,
            discrete_state=self.model.discrete_state_input,
            resize=resize,
        )

    def outputs(self) -> transforms.Transform:
        """Normalized model actions, with the robot's state beside them → robot actions."""
        return pipelines.outputs(self.robot, stats=self.stats, kind=self.kind)

    @property
    def still(self) -> str:
        """The dimensions of the state that hardly moved in training, in words; empty if none."""
        found = np.flatnonzero(normalize.still(self.stats["state"])[: self.robot.state_dim])
        names = self.names.get("state") or self.robot.state_vector.places
        return ", ".join(str(names[i]) for i in found)

    def warn_of_still(self) -> None:
        """Warn of still dimensions, where other code than ours normalizes the state."""
        if self.still:
            progress.warn(
                f"state dimensions {self.still} hardly moved in training: openpi and LeRobot pass "
                "a sensor's noise in them to the model, enlarged, which shallow_pi does not; send "
                "their values of training there"
            )

    def steps(self, given: int | None) -> int:
        """The integration steps given, or those it was trained for; warns where they differ."""
        if given is not None and given != self.num_steps:
            progress.warn(
                f"the policy samples in {given} integration steps and was trained for "
                f"{self.num_steps}: its actions may be worse"
            )
        return self.num_steps if given is None else given

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the files of an `assets` folder."""
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        normalize.save(folder / self.asset_id, self.stats)
        shutil.copyfile(self.tokenizer, folder / TOKENIZER_NAME)
        content = {
            "model": dataclasses.asdict(self.model),
            "robot": self.robot.name,
            "robot_fields": dataclasses.asdict(self.robot),
            "asset_id": self.asset_id,
            "names": self.names,
            "num_steps": self.num_steps,
            "quantize": self.quantize,
        }
        (folder / FILE_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load(step: str | os.PathLike[str]) -> Assets:
    """Read the assets of a step folder.

    Raises:
      FileNotFoundError: a file is missing; says which.
      ValueError: `shallow_pi.json` is not what `save` writes.
    """
    folder = pathlib.Path(step) / run_folder.ASSETS
    path = folder / FILE_NAME
    if not path.is_file():
        check_is_policy(pathlib.Path(step))
        raise FileNotFoundError(
            f"no {FILE_NAME} in {folder}: expected a step folder written by shallow_pi, such as "
            "checkpoints/<config>/<exp>/<step>"
        )
    with _reading(path) as content:
        model = model_from_dict(content["model"])
        # A policy keeps the robot it was trained for, listed or not; older folders name it only.
        fields, asset_id = content.get("robot_fields"), str(content["asset_id"])
        normalize.check_asset_id(asset_id, f"asset_id in {path}")
        names = {key: tuple(value) for key, value in content.get("names", {}).items()}
        robot = robots.from_dict(fields) if fields else robots.find(content["robot"])
        num_steps = content.get("num_steps", 10)  # Older folders do not say it.
        if not isinstance(num_steps, int) or num_steps < 1:
            raise TypeError(f"num_steps {num_steps!r}")
        scheme = content.get("quantize", "none")
        if scheme not in quantization.SCHEMES:
            raise TypeError(f"quantize {scheme!r}")
    stats = normalize.load(folder / asset_id)
    return Assets(model, robot, folder / TOKENIZER_NAME, stats, asset_id, names, num_steps, scheme)


def check_is_policy(step: pathlib.Path) -> None:
    """Raise for a step of a run on synthetic samples, which has parameters and nothing else."""
    data = (run_folder.read_config(step.parent) or {}).get("data")
    if isinstance(data, dict) and data.get("source") == "synthetic":
        raise ValueError(
            f"{step} is not a policy: its run is a trial on synthetic samples, without a robot, "
            "statistics or a tokenizer; train on a dataset"
        )


def told(step: pathlib.Path) -> dict[str, int | bool]:
    """Fields of the model that no shape shows, where a step folder tells them."""
    path = step / run_folder.ASSETS / FILE_NAME
    if not path.is_file():
        return lerobot_policy.told(step)
    with _reading(path) as content:
        model = model_from_dict(content["model"])
    return {
        "action_horizon": model.action_horizon,
        "max_token_len": model.max_token_len,
        "discrete_state_input": model.discrete_state_input,
    }


def names(step: pathlib.Path) -> Mapping[str, tuple[str, ...]]:
    """Names of the dimensions of `state` and `actions`, where a step folder tells them."""
    path = step / run_folder.ASSETS / FILE_NAME
    return load(step).names if path.is_file() else lerobot_policy.names(step)


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The content of a `shallow_pi.json`; what the block misses there is named as its damage."""
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); export the policy again") from error


def teacher_statistics(
    step: pathlib.Path, asset_id: str, robot: robots.Robot, model: pi0.Pi0Config
) -> checkpoint_statistics.Found | None:
    """The statistics of a teacher's step folder; None where it has none.

    Args:
      step: the folder; ours, openpi's or LeRobot's.
      asset_id: name of the statistics.
      robot: the student's.
      model: the teacher's sizes, as the run takes them.

    Raises:
      ValueError: the folder says that the teacher is for a robot of other units or reads other
        prompts, or none of its several statistics has that name.
    """
    if (step / run_folder.ASSETS / FILE_NAME).is_file():
        own = load(step)
        if different := robots.unit_differences(own.robot, robot):
            raise ValueError(
                f"the teacher in {step} was trained for robot {own.robot.name}, not for "
                f"{robot.name}: {'; '.join(different)}\n"
                "velocities compare in the same units only: give a robot file with the teacher's "
                "(--data.robot), or another --teacher.path"
            )
    in_prompt = told(step).get("discrete_state_input", model.discrete_state_input)
    if in_prompt != model.discrete_state_input:
        no = "" if in_prompt else "no-"
        raise ValueError(
            f"the teacher in {step} reads its state {'in the prompt' if in_prompt else 'apart'}, "
            f"this model does not: give --model.{no}discrete-state-input, or another --teacher.path"
        )
    lerobot_policy.check_robot(step, robot)
    return checkpoint_statistics.find(
        step,
        asset_id,
        normalize.kind_of(model.pi05),
        options="--data.asset-id NAME, or --data.norm-stats FOLDER",
    )


def model_from_dict(values: Mapping[str, Any]) -> pi0.Pi0Config:
    """The inverse of `dataclasses.asdict` on a `Pi0Config`, through JSON."""
    nested = {
        "backbone": gemma.GemmaConfig(**values["backbone"]),
        "expert": gemma.GemmaConfig(**values["expert"]),
        "image": siglip.SiglipConfig(**values["image"]),
        "cameras": tuple(values["cameras"]),
    }
    # Older folders say how the training ran, which is not the model's.
    own = {name: value for name, value in values.items() if name != "remat"}
    return pi0.Pi0Config(**{**own, **nested})
