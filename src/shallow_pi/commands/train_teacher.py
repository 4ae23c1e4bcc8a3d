"""Train a deep teacher from scratch on the task loss, evaluate it, and package it.

uv run scripts/train_teacher.py NAME [--field value ...]

    pi0_turntable                     into checkpoints/, packaged in assets/pi0_turntable
    pi0_turntable --resume            continue after an interruption

Configs whose names contain a depth (_l6), and debug, distil from a teacher: run those with
scripts/train_distill.py.
"""

import pathlib
import sys

import jax

from shallow_pi.checkpoints import run_folder
from shallow_pi.commands import exits
from shallow_pi.evaluation import study
from shallow_pi.parallel import processes
from shallow_pi.training import command_line, loop


def main() -> None:
    """Parse, train, measure, package."""
    with exits.exit_on():
        processes.initialize()
    processes.cache_compilations()
    experiment = command_line.cli(command_line.configs(), __doc__ or "", sys.argv[1:])
    processes.split_cpu(experiment.batch_size // experiment.accumulation)
    with exits.exit_on(*loop.ENDS):
        if experiment.teacher is not None:
            raise ValueError(
                f"{experiment.name} distils a student from a teacher: run it with "
                "scripts/train_distill.py, or name the teacher's own config here"
            )
        if jax.process_count() > 1:
            raise ValueError(
                f"{experiment.name} is packaged by one process, and this job has "
                f"{jax.process_count()}: train it with scripts/train_distill.py {experiment.name}, "
                "which packages nothing"
            )
        clone = command_line.configs().parent
        root = clone if (clone / "scripts").is_dir() else pathlib.Path()
        packaged = root / "assets" / experiment.name
        run_folder.check_output(packaged, "give another --name")
        study.package(experiment, study.run(experiment), packaged)
