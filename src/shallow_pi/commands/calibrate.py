"""Measure the activations of a policy on data, so that it can run in 8 bits.

uv run scripts/calibrate.py POLICY --data.path DATASET [--samples 64] [--step last|best|N]

POLICY is a run's folder or a step folder, DATASET a LeRobot dataset of its robot; without
--data.path the datasets and episodes of the policy's run are used. Actions are sampled for frames
spread over all episodes, and the bounds of the activations of every large product are written to
assets/calibration.json beside the parameters. A table then shows how much each scheme changes
the actions of the same number of other frames. int8 and fp8 round activations within the bounds:

    uv run scripts/serve_policy.py --policy.dir POLICY --policy.quantize int8
    uv run scripts/export_student.py POLICY --format onnx --opset 19 --quantize int8

Calibrate again after changing the number of integration steps. Weights alone (w8, wf8) need no
calibration. docs/quantization.md compares the schemes.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

import numpy as np
import rich
import rich.box
import rich.table
import tyro

from shallow_pi import flags, progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.commands import exits
from shallow_pi.data import data_config, opening, sources
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.deploy import step_folder
from shallow_pi.inference import calibration, quantize, rounding_error
from shallow_pi.models import batch as batches
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0
from shallow_pi.parallel import processes


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The policy and the observations to calibrate it on."""

    # A run's folder, or a step folder of ours on this machine.
    policy: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="POLICY")]
    # The dataset; robot and statistics are the policy's own.
    data: data_config.DataConfig = dataclasses.field(default_factory=data_config.DataConfig)
    # Step of a run: last, best (the one its best.json names) or a number.
    step: str = "last"
    # Observations, spread evenly over the dataset.
    samples: int = 64
    # Observations in one batch.
    batch_size: int = 8
    # int8 clips activations beyond this percentile of their magnitudes; 100 clips none. Lower it
    # slightly, to 99.99, for a model with rare large activations.
    percentile: float = calibration.PERCENTILE
    # Integration steps of the sampler; 0 uses the number that the policy was trained for.
    num_steps: int = 0
    # Seed of the noise.
    seed: int = 0
    # Show how much each scheme changes the actions; compiles and runs five programs.
    compare: bool = True
    # Parts of the model that this comparison computes in 8 bits; the bounds of all parts are
    # measured.
    quantized: tuple[quantize.Part, ...] = quantize.PARTS


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, sample, write, print the file."""
    given = flags.parse(Arguments, arguments, __doc__ or "", idle=_idle)
    processes.cache_compilations()
    with exits.exit_on():
        flags.at_least(given, 1, "samples", "batch_size")
        flags.at_least(given, 0, "num_steps")
        folder = step_folder.find(given.policy, given.step)
        run_folder.check_output(folder / run_folder.ASSETS, "copy the policy to another folder")
        assets = policy_assets.load(folder)
        data = _data(given, folder)
        datasets, held_out = opening.open_datasets(data, assets.robot)
        source = sources.Mixture(
            [
                sources.DatasetSource(d, assets.robot, assets.model.action_horizon, assets.inputs())
                for d in (*datasets, *held_out)
            ]
        )
        model = assets.seen
        params = step_folder.params(folder, assets.model)
        chosen, between = _frames(len(source), min(given.samples, len(source)))
        with progress.bar("Calibrate", total=len(chosen)) as advance:
            found = calibration.calibrate(
                model,
                params,
                ((o.as_float(), noise) for o, noise in _batches(source, model, chosen, given)),
                num_steps=given.num_steps or assets.num_steps,
                percentile=given.percentile,
                advance=advance,
            )
        with run_folder.writing(folder / run_folder.ASSETS, run_folder.AGAIN):
            print(calibration.save(folder / run_folder.ASSETS, found))
        if given.compare and not between:
            progress.say("Too few frames to compare schemes on others than were calibrated on")
        elif given.compare:
            with progress.bar("Compare", total=len(between)) as advance:
                errors = rounding_error.measure(
                    model,
                    params,
                    _batches(source, model, between, given),
                    found,
                    action_dim=assets.robot.action_dim,
                    parts=given.quantized,
                    advance=advance,
                )
            _show(errors, len(between))


def _show(errors: Mapping[quantize.Scheme, rounding_error.Error], count: int) -> None:
    """Print the schemes, the nearest to the unrounded policy first."""
    table = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        title=f"Change of the actions of {count} other frames, % of their size",
    )
    table.add_column("scheme")
    for name in ("all frames, rms", "median frame", "95th percentile"):
        table.add_column(name, justify="right")
    for scheme, error in sorted(errors.items(), key=lambda item: item[1].rms):
        table.add_row(scheme, *(f"{100 * value:.2f}" for value in error))
    rich.print(table)


def _idle(given: Arguments) -> flags.Idle:
    yield True, "data.robot data.tokenizer data.norm_stats data.asset_id", "it is the policy's own"
    fields = f"{opening.UNREAD} data.held_out"
    yield True, fields, "frames of all episodes are read once, evenly; leave it out"


def _data(given: Arguments, folder: pathlib.Path) -> data_config.DataConfig:
    """The data config with a path: the one given, else with datasets and episodes of the run."""
    if given.data.path:
        return given.data
    data = (run_folder.read_config(folder.parent) or {}).get("data") or {}
    if not data.get("path"):
        raise ValueError(
            f"no dataset to calibrate on: {folder} is not in a run that names one; give "
            "--data.path DATASET, or round only weights (w8, wf8), which needs no calibration"
        )
    found = dataclasses.replace(
        given.data,
        path=data["path"],
        more=given.data.more or tuple(data.get("more", ())),
        episodes=given.data.episodes or tuple(data.get("episodes", ())),
        exclude_episodes=given.data.exclude_episodes or tuple(data.get("exclude_episodes", ())),
    )
    parts = [", ".join((found.path, *found.more))]
    for what, words in (("episodes", found.episodes), ("without", found.exclude_episodes)):
        parts += [f"{what} {' '.join(words)}"] * bool(words)
    progress.say(f"Dataset of the policy's run: {'; '.join(parts)}")
    return found


def _frames(total: int, count: int) -> tuple[list[int], list[int]]:
    """Frames spread evenly over all, and as many halfway between, as far as there are others."""
    places = np.linspace(0, total - 1, 2 * count).round().astype(int).tolist()
    chosen, between = places[::2], places[1::2]
    return chosen, sorted(set(between) - set(chosen))


def _batches(
    source: sources.Source, model: pi0.Pi0Config, chosen: Sequence[int], given: Arguments
) -> Iterator[tuple[observations.Observation, np.ndarray]]:
    """Each frame's observation once, and its noise; the last batch may be smaller."""
    noise = np.random.default_rng(given.seed)
    for start in range(0, len(chosen), given.batch_size):
        taken = chosen[start : start + given.batch_size]
        found = batches.stack([source[i] for i in taken]).observation
        # Cameras that the robot lacks are not computed.
        images = {name: found.images[name] for name in model.cameras}
        masks = {name: found.image_masks[name] for name in model.cameras}
        found = dataclasses.replace(found, images=images, image_masks=masks)
        shape = len(taken), model.action_horizon, model.action_dim
        yield found, noise.standard_normal(shape).astype(np.float32)
