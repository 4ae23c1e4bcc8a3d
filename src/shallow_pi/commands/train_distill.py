"""Distil a deep policy into a shallow one, and evaluate both if the config has a simulated task.

uv run scripts/train_distill.py NAME [--field value ...]

    pi0_turntable_l6                        the complete experiment on two CPU cores
    pi0_turntable_l6 --student.depth 4      any field of a config can be set
    pi0_turntable_l6 --resume               continue after an interruption
    --openpi.config pi05_libero             an openpi config instead of NAME (needs openpi): its
                                            model, robot and statistics
"""

import sys

from shallow_pi.commands import exits
from shallow_pi.evaluation import study
from shallow_pi.interop import openpi_flag
from shallow_pi.parallel import processes
from shallow_pi.training import command_line, loop


def main() -> None:
    """Parse, train the teacher first if requested, then run the study."""
    with exits.exit_on():
        processes.initialize()
    processes.cache_compilations()
    with exits.exit_on(ModuleNotFoundError):
        default, arguments = openpi_flag.cli(sys.argv[1:])
    experiment = command_line.cli(command_line.configs(), __doc__ or "", arguments, default)
    trained, own = [experiment], None
    with exits.exit_on(*loop.ENDS):
        if experiment.teacher is not None and experiment.teacher.train:
            own = command_line.teacher_experiment(command_line.configs(), experiment)
            trained.append(own)
        processes.split_cpu(*(each.batch_size // each.accumulation for each in trained))
        if own is not None:
            experiment = study.train_teacher(experiment, own)
        study.run(experiment)
