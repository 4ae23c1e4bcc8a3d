"""Inspect a config's data before training: images, prompts, ranges and suspicious values.

uv run scripts/inspect_data.py NAME [--data.path PATH] [--field value ...]

    pi0_aloha_l6 --data.path ~/data/my_aloha     the data that a run of that config trains on
    pi05_libero_l6 --samples 512 --output here   more samples, another folder
    --openpi.config pi05_libero                  an openpi config instead of NAME (needs openpi)

Reads random samples through the complete data path of a run (conversions, differences,
normalization, tokens, augmentation) and writes to FOLDER (default: data_sheets/NAME)

    sheet.png        images as the model sees them, prompts, action chunks, ranges
    histogram.png    each dimension of state and actions, normalized (uv sync --extra plots)

It prints prompts and ranges (as recorded, over all frames, in the robot's units; and normalized),
and warns of anything suspicious: dimensions that are constant, far from the statistics or outside
the robot's limits, images that are black or of one colour, prompts that are truncated or all the
same, much padding, a robot that often stands still. The teacher is not downloaded. If it is on this
machine (its assets are enough), its statistics and sizes are used; otherwise, with a warning, the
dataset's statistics.
"""

import collections
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from shallow_pi import figures, flags, progress
from shallow_pi.checkpoints import run_folder, safetensors_file
from shallow_pi.commands import exits
from shallow_pi.data import inspection, opening, sheet
from shallow_pi.data.robots import lerobot_policy
from shallow_pi.interop import openpi_flag
from shallow_pi.training import command_line, config, idle, setup

# Number of prompts printed.
PROMPTS = 10


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The config, the number of samples and the output folder."""

    # The config; every field can be set, as for a run.
    experiment: Annotated[config.DistillConfig, tyro.conf.arg(name="")]
    # Samples to read.
    samples: int = 64
    # Folder for the sheet and the histograms; empty is data_sheets/<config>.
    output: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, read, draw, print."""
    with exits.exit_on(ModuleNotFoundError):
        words = sys.argv[1:] if arguments is None else arguments
        default, words = openpi_flag.cli(words)
        if default is None:
            if not words or words[0].startswith("-"):  # Lists the configs, and exits.
                command_line.cli(command_line.configs(), __doc__ or "", words[:1])
            default = command_line.load(command_line.configs(), words.pop(0))
        given = flags.parse(
            Arguments,
            words,
            __doc__ or "",
            prog=f"{pathlib.Path(sys.argv[0]).name} {default.name}",
            default=Arguments(default),
            idle=idle.fields,
            conflicts=idle.conflicts,
            part="experiment",
        )
        experiment = given.experiment
        folder = run_folder.check_output(
            given.output or f"data_sheets/{experiment.name}", "give another --output"
        )
        teacher_step = setup.teacher_on_disk(experiment)
        if teacher_step is None:
            _warn_of_an_absent_teacher(experiment)
        elif not _is_assets_alone(teacher_step):
            setup.check_teacher(experiment, teacher_step)
            experiment = setup.resolve(experiment, teacher_step)
        data = opening.open_data(experiment.data, experiment.student_model, teacher_step)
        with progress.bar("Read samples", min(given.samples, len(data.train))) as advance:
            samples = inspection.draw(
                data.train,
                data.assets,
                given.samples,
                seed=experiment.seed,
                masks_padding=experiment.losses.mask_padded_actions,
                advance=advance,
            )
        written = ["sheet.png"]
        with run_folder.writing(folder, run_folder.AGAIN):
            sheet.write(folder / "sheet.png", samples, experiment.augmentation, experiment.seed)
            try:
                sheet.histograms(folder / "histogram.png", samples)
                written.append("histogram.png")
            except figures.PlotsMissingError as error:
                progress.say(f"note: {error}")

        found = inspection.ranges(samples)
        print(inspection.table(found), end="\n\n")
        shown = collections.Counter(inspection.prompts(samples)).most_common()
        for prompt, count in shown[:PROMPTS]:
            print(f"{count:>6} × {prompt}")
        if len(shown) > PROMPTS:
            print(f"{'':>8} and {len(shown) - PROMPTS} more")
        print()
        for line in inspection.facts(samples):
            print(line)
        if data.assets is None:
            print("the samples are synthetic: they have no statistics")
        for line in inspection.doubtful(samples, found):
            progress.warn(line)
        print(*(folder / name for name in written), sep="\n")


def _warn_of_an_absent_teacher(experiment: config.DistillConfig) -> None:
    teacher, data = experiment.teacher, experiment.data
    if teacher and teacher.path != setup.RANDOM and data.path and not data.norm_stats:
        progress.warn(
            f"the teacher {teacher.path} is not on this machine: sizes are the config's and "
            "statistics the dataset's, where a run takes the teacher's"
        )


def _is_assets_alone(step: pathlib.Path) -> bool:
    """True for a part of a teacher that has statistics, as openpi or LeRobot keep them."""
    has_params = (step / run_folder.PARAMS).is_dir() or safetensors_file.find(step) is not None
    kept = (run_folder.ASSETS, lerobot_policy.PREPROCESSOR)
    return not has_params and any((step / name).exists() for name in kept)
