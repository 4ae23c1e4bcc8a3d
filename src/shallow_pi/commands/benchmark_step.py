"""Time a config's distillation step and a fine-tuning step of its student, with random weights.

uv run scripts/benchmark_step.py NAME [--repeats 20] [--output DIR] [--field value ...]

    debug                                     a short trial on a CPU
    pi0_aloha_l6 --batch-size 32 --output benchmarks/step_h100
                                              full size on all devices; on one 80 GB H100:
        uv sync --extra cuda --extra plots
        uv run scripts/benchmark_step.py pi0_aloha_l6 --batch-size 32 --student.freeze vision \\
            embedder --output benchmarks/step_h100_frozen
        uv run scripts/benchmark_step.py pi05_libero_l6 --batch-size 32 --ema-decay 0 --output ...
    --output DIR                              also writes step.json and step.png there

It reads neither a teacher nor data. The targets are an MFU of at least 45 % (recomputed operations
do not count), and a distillation step no longer than 1.6 fine-tuning steps.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable

import jax
import rich.console

from shallow_pi import flags
from shallow_pi.checkpoints import run_folder
from shallow_pi.commands import exits
from shallow_pi.parallel import processes
from shallow_pi.speed import inference, plots, report, step
from shallow_pi.training import command_line, config, setup


def main() -> None:
    """Parse, measure, print, write."""
    if {"-h", "--help"} & set(sys.argv[2:]):
        print((__doc__ or "").strip(), end="\n\n")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", default="")
    own, arguments = parser.parse_known_args()
    with exits.exit_on():
        flags.at_least(own, 1, "repeats")
        processes.initialize()
        processes.cache_compilations()
        experiment = command_line.cli(command_line.configs(), __doc__ or "", arguments)
        processes.split_cpu(experiment.batch_size // experiment.accumulation)
        if own.output and processes.is_main():
            run_folder.check_output(own.output, "give another --output")
        timing = measure(experiment, own.repeats)
        limit = inference.ceiling(experiment.model.dtype)
        if not processes.is_main():
            return
        stated = step.stated_rate(timing.device, experiment.model.dtype)
        rich.console.Console().print(report.step_table(experiment.name, timing, limit, stated))
        lines = report.step_lines(timing, limit, stated)
        if own.output:
            content = {"arguments": arguments} | report.step_contents(timing, limit)
            drawn = {"step.png": lambda path: plots.training_step(path, timing)}
            folder = pathlib.Path(own.output).expanduser()
            lines += report.write(folder, "step.json", content, drawn)
        print("\n".join(lines))


def measure(
    experiment: config.DistillConfig,
    repeats: int,
    *,
    profile: bool = False,
    ready: Callable[[], None] = lambda: None,
) -> step.Timing:
    """Time a config's steps; arguments as of `step.measure`."""
    if experiment.teacher is None:
        raise ValueError(f"{experiment.name} has no teacher: name a config with one")
    made_up = dataclasses.replace(experiment.teacher, path=setup.RANDOM)
    experiment = dataclasses.replace(experiment, teacher=made_up)
    mesh = setup.make_mesh(experiment, jax.devices())
    return step.measure(
        setup.make_spec(experiment, mesh),
        mesh,
        batch_size=experiment.batch_size,
        teacher_dtype=made_up.dtype,
        repeats=repeats,
        profile=profile,
        ready=ready,
    )
