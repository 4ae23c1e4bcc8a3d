"""Time a config's distillation step beside the student's own fine-tuning step, weights at random.

uv run scripts/benchmark_step.py NAME [--repeats 20] [--output DIR] [--field value ...]

    debug                                     tries it out on a CPU
    pi0_aloha_l6 --batch-size 32 --output benchmarks/step_h100
                                              full size on the devices there are; on one 80 GB H100:
        uv sync --extra cuda --extra plots
        uv run scripts/benchmark_step.py pi0_aloha_l6 --batch-size 32 --student.freeze vision \\
            embedder --output benchmarks/step_h100_frozen
        uv run scripts/benchmark_step.py pi05_libero_l6 --batch-size 32 --ema-decay 0 --output ...
    --output DIR                              also writes step.json and step.png there

Neither a teacher nor data is read. Targets: MFU of 45 % or more (useful operations, nothing that is
computed again), and at most 1.6 fine-tuning steps for a distillation step.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys
from typing import Any

import jax
import rich.box
import rich.console
import rich.table

from shallow_pi import figures
from shallow_pi.parallel import processes
from shallow_pi.speed import inference, latency, plots, step
from shallow_pi.training import command_line, config, setup

CONFIGS = pathlib.Path(__file__).parents[1] / "train_configs"
GIGA, TERA = 1e9, 1e12
MOST_RATIO, LEAST_UTILIZATION = 1.6, 0.45


def main() -> None:
    """Parse, build, measure, print, write."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", default="")
    own, arguments = parser.parse_known_args()
    with command_line.exit_on():
        if own.repeats < 1:
            raise ValueError(f"--repeats must be 1 or more, got {own.repeats}")
        processes.initialize()
        processes.cache_compilations()
        experiment = command_line.cli(CONFIGS, __doc__ or "", arguments)
        processes.split_cpu(experiment.batch_size // experiment.accumulation)
        timing, limit = _measure(experiment, own.repeats)
        if processes.is_main():
            dtype = experiment.model.dtype
            _show(experiment.name, timing, limit, step.data_sheet(timing.device, dtype))
            if own.output:
                _write(pathlib.Path(own.output).expanduser(), arguments, timing, limit)


def _measure(
    experiment: config.DistillConfig, repeats: int
) -> tuple[step.Timing, inference.Ceiling]:
    if experiment.teacher is not None:
        made_up = dataclasses.replace(experiment.teacher, path=setup.RANDOM)
        experiment = dataclasses.replace(experiment, teacher=made_up)
    mesh = setup.make_mesh(experiment, jax.devices())
    spec = setup.make_spec(experiment, mesh)
    size = 2048 if jax.default_backend() == "cpu" else 8192
    with step.explained(experiment.batch_size):
        limit = inference.ceiling(experiment.model.dtype, size)
        teacher = setup.load_teacher(experiment, None, mesh)
        timing = step.measure(
            spec,
            mesh,
            teacher,
            setup.random_state(spec, mesh, experiment.seed),
            batch_size=experiment.batch_size,
            repeats=repeats,
        )
    return timing, limit


def _show(
    name: str,
    timing: step.Timing,
    limit: inference.Ceiling,
    data_sheet: float | None,
) -> None:
    title = (
        f"{name}, batch {timing.batch_size} on {timing.devices} × {timing.device}: "
        f"{limit.flops_per_second / TERA:.3g} TFLOP/s measured"
    )
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    table.add_column("step")
    for kind in timing.median_ms:
        table.add_column(kind, justify="right")

    def row(label: str, values: dict[str, Any]) -> None:
        table.add_row(label, *(values[kind] for kind in timing.median_ms))

    kinds = list(timing.median_ms)
    row(
        "ms, median (95th percentile)",
        {kind: f"{timing.median_ms[kind]:.1f} ({timing.p95_ms[kind]:.1f})" for kind in kinds},
    )
    row("samples a second", {k: f"{timing.samples_per_second(k):.1f}" for k in kinds})
    row("tokens a second", {k: f"{timing.tokens_per_second(k):.0f}" for k in kinds})
    row("useful TFLOP a step", {k: f"{timing.flops[k] / TERA:.3g}" for k in kinds})
    rates = {"measured rate": limit.flops_per_second, "data-sheet rate": data_sheet}
    for which, rate in rates.items():
        if rate:
            shares = {k: f"{100 * timing.utilization(k, rate):.0f} %" for k in kinds}
            row(f"MFU, of the {which}", shares)
    table.add_section()
    for part in timing.plan[kinds[0]]:
        row(f"planned, {part}, GB", {k: f"{timing.plan[k][part] / GIGA:.3g}" for k in kinds})
    rich.console.Console().print(table)
    if timing.peak_bytes:
        print(f"peak memory of a device, both steps: {timing.peak_bytes / GIGA:.3g} GB")
    ratio = timing.ratio
    print(f"a distillation step costs {ratio:.2f} fine-tuning steps (target: {MOST_RATIO} at most)")
    share = timing.utilization(step.DISTILLATION, data_sheet or limit.flops_per_second)
    print(f"MFU {100 * share:.0f} % (target: {100 * LEAST_UTILIZATION:.0f} % or more)")


def _write(
    folder: pathlib.Path,
    arguments: list[str],
    timing: step.Timing,
    limit: inference.Ceiling,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "arguments": arguments,
        **dataclasses.asdict(timing),
        "ratio": timing.ratio,
        "ceiling": dataclasses.asdict(limit),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": latency.versions(),
    }
    path = folder / "step.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")
    try:
        plots.training_step(folder / "step.png", timing)
        print(f"written: {folder / 'step.png'}")
    except figures.PlotsMissingError as error:
        print(error)


if __name__ == "__main__":
    if "--help" in sys.argv[2:] or "-h" in sys.argv[2:]:
        print((__doc__ or "").strip(), end="\n\n")
    main()
