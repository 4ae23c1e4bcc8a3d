"""Measurements as tables, as lines and as the plain values of their JSON files."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import rich.box
import rich.table

from shallow_pi import figures
from shallow_pi.checkpoints import run_folder
from shallow_pi.models import pi0
from shallow_pi.speed import inference, latency, stages, step, tuning

TERA, GIGA = 1e12, 1e9
# Variables that tell XLA how to compile.
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Targets of a distillation step: fine-tuning steps it costs at most, and MFU at least.
MOST_RATIO, LEAST_UTILIZATION = 1.6, 0.45
# File name → function that draws to a path.
Plots = Mapping[str, Callable[[pathlib.Path], None]]


def tuning_table(model: pi0.Pi0Config, found: tuning.Tuned) -> rich.table.Table:
    """Median milliseconds of every way to run a model, the fastest first."""
    table = empty_table(f"{model.depth} layers: ways to run them, median ms", "", "ms")
    for name, milliseconds in found.median_ms.items():
        table.add_row(name, f"{milliseconds:.2f}")
    return table


def inference_table(
    timings: Sequence[inference.Timing], limit: inference.Ceiling
) -> rich.table.Table:
    """Times, work and memory of an inference, a column for each timing."""
    first = timings[0]
    table = empty_table(
        f"{first.device}: {limit.flops_per_second / TERA:.2f} TFLOP/s and "
        f"{limit.bytes_per_second / GIGA:.0f} GB/s measured. Median ms, 95th percentile in "
        "brackets",
        "layers",
        *(str(timing.depth) for timing in timings),
    )
    for field in ("cameras", "prompt_tokens", "horizon", "num_steps"):
        table.add_row(field.replace("_", " "), *(str(getattr(t, field)) for t in timings))
    table.add_section()
    for part in first.median_ms:
        table.add_row(part, *(f"{t.median_ms[part]:.2f} ({t.p95_ms[part]:.2f})" for t in timings))
    table.add_row("device, back to back", *(f"{t.device_ms:.2f}" for t in timings))
    for name in first.others_ms:
        table.add_row(f"{name}, whole", *(f"{t.others_ms[name]:.2f}" for t in timings))
    table.add_section()
    table.add_row("GFLOP", *(f"{t.flops['whole'] / GIGA:.2f}" for t in timings))
    table.add_row("weights read, GB", *(f"{t.weight_bytes['whole'] / GIGA:.2f}" for t in timings))
    shares = [timing.shares(limit) for timing in timings]
    for part in shares[0]:
        percent = [f"{100 * s[part][0]:.0f}, {100 * s[part][1]:.0f} %" for s in shares]
        table.add_row(f"{part}: share of both rates", *percent)
    table.add_row("program, GB", *(f"{t.program_bytes / GIGA:.2f}" for t in timings))
    peaks = (f"{t.peak_bytes / GIGA:.2f}" if t.peak_bytes else "" for t in timings)
    table.add_row("peak memory, GB", *peaks)
    return table


def host_table(
    timings: Mapping[str, inference.Timing], policies: Mapping[str, stages.HostPath]
) -> rich.table.Table:
    """Stages from pixels to actions (`timings`), and of `Policy.infer` on an ALOHA observation."""
    columns = [
        (f"{name}: pixels to actions", one.stages_ms, one.median_ms["end to end"], one.device_ms)
        for name, one in timings.items()
    ]
    columns += [
        (f"{name}: Policy.infer", one.stages_ms, one.infer_ms, one.device_ms)
        for name, one in policies.items()
    ]
    names = (name for name, *_ in columns)
    table = empty_table("Median ms by stage, each timed alone", "stage", *names)
    for stage in (*stages.BEFORE, *stages.PROGRAM, *stages.AFTER):
        cells = [found.get(stage) for _, found, *_ in columns]
        table.add_row(stage, *("" if cell is None else f"{cell:.2f}" for cell in cells))
    table.add_section()
    table.add_row("whole call", *(f"{whole:.2f}" for *_, whole, _ in columns))
    table.add_row("device, back to back", *(f"{device:.2f}" for *_, device in columns))
    table.add_row("above the device", *(f"{w - d:.2f}" for *_, w, d in columns))
    return table


def inference_lines(timings: Sequence[inference.Timing]) -> list[str]:
    """The cost of each optimization switched off, and ratios to other samplers and depths."""
    lines = []
    for timing in timings:
        whole = timing.median_ms["whole"]
        slower = [f"{name} {ms - whole:+.2f}" for name, ms in timing.without_ms.items()]
        if slower:
            lines.append(f"{timing.depth} layers, ms more without: {', '.join(slower)}")
        if timing.quantized_ms:
            bits = ", ".join(f"{name} {ms:.2f}" for name, ms in timing.quantized_ms.items())
            lines.append(f"{timing.depth} layers, ms with products in 8 bits: {bits}")
        for name, ms in timing.others_ms.items():
            lines.append(
                f"{timing.depth} layers: ours is {ms / whole:.2f} times as fast as {name}'s "
                f"(largest difference of an action {timing.others_difference:.1e})"
            )
    if len(timings) > 1:
        ratio = timings[0].median_ms["whole"] / timings[-1].median_ms["whole"]
        lines.append(f"the last column is {ratio:.2f} times as fast as the first")
    return lines


def inference_contents(
    timings: Sequence[inference.Timing],
    limit: inference.Ceiling,
    policies: Mapping[str, stages.HostPath],
) -> dict[str, object]:
    """The content of benchmark.json, without the arguments."""
    return {
        "policies": {name: dataclasses.asdict(one) for name, one in policies.items()},
        "ceiling": dataclasses.asdict(limit),
        "timings": [
            dataclasses.asdict(timing) | {"shares": timing.shares(limit)} for timing in timings
        ],
        **surroundings(),
    }


def surroundings() -> dict[str, object]:
    """XLA's flags, and versions."""
    return {
        "flags": {name: os.environ.get(name, "") for name in FLAGS},
        "versions": latency.versions(),
    }


def step_table(
    name: str, timing: step.Timing, limit: inference.Ceiling, stated: float | None
) -> rich.table.Table:
    """Times, rates and planned memory of both kinds of step.

    `limit` has the measured rates of a device; `stated` is the matrix rate that its maker states.
    """
    kinds = list(timing.median_ms)
    table = empty_table(
        f"{name}, batch {timing.batch_size} on {timing.devices} × {timing.device}: "
        f"{limit.flops_per_second / TERA:.3g} TFLOP/s measured",
        "step",
        *kinds,
    )
    table.add_row(
        "ms, median (95th percentile)",
        *(f"{timing.median_ms[k]:.1f} ({timing.p95_ms[k]:.1f})" for k in kinds),
    )
    table.add_row("samples a second", *(f"{timing.samples_per_second(k):.1f}" for k in kinds))
    table.add_row("tokens a second", *(f"{timing.tokens_per_second(k):.0f}" for k in kinds))
    table.add_row("useful TFLOP a step", *(f"{timing.flops[k] / TERA:.3g}" for k in kinds))
    for which, rate in (("measured", limit.flops_per_second), ("data-sheet", stated)):
        if rate:
            shares = (f"{100 * timing.utilization(k, rate):.0f} %" for k in kinds)
            table.add_row(f"MFU, of the {which} rate", *shares)
    table.add_section()
    for part in timing.plan[kinds[0]]:
        sizes = (f"{timing.plan[k][part] / GIGA:.3g}" for k in kinds)
        table.add_row(f"planned, {part}, GB", *sizes)
    return table


def step_lines(timing: step.Timing, limit: inference.Ceiling, stated: float | None) -> list[str]:
    """Peak memory, and both targets; arguments as of `step_table`."""
    lines = []
    if timing.peak_bytes:
        peak = timing.peak_bytes / GIGA
        lines.append(f"peak memory of a device, both steps: {peak:.3g} GB")
    lines.append(
        f"a distillation step costs {timing.ratio:.2f} fine-tuning steps (target: {MOST_RATIO} at "
        "most)"
    )
    share = timing.utilization(step.DISTILLATION, stated or limit.flops_per_second)
    lines.append(f"MFU {100 * share:.0f} % (target: {100 * LEAST_UTILIZATION:.0f} % or more)")
    return lines


def step_contents(timing: step.Timing, limit: inference.Ceiling) -> dict[str, object]:
    """The content of step.json, without the arguments."""
    return {
        **dataclasses.asdict(timing),
        "ratio": timing.ratio,
        "ceiling": dataclasses.asdict(limit),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "versions": latency.versions(),
    }


def write(
    folder: pathlib.Path, file: str, content: Mapping[str, object], plots: Plots
) -> list[str]:
    """Write a JSON file, and plots where matplotlib is installed; returns a line for each."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file
    run_folder.write_text(path, json.dumps(content, indent=2) + "\n", run_folder.AGAIN)
    return [f"written: {path}", *draw(folder, plots)]


def draw(folder: pathlib.Path, plots: Plots) -> list[str]:
    """Draw into a folder where matplotlib is installed; returns a line for each plot."""
    lines: list[str] = []
    for name, plot in plots.items():
        try:
            with run_folder.writing(folder / name, run_folder.AGAIN):
                plot(folder / name)
        except figures.PlotsMissingError as error:
            return [*lines, str(error)]
        lines.append(f"written: {folder / name}")
    return lines


def empty_table(title: str, corner: str, *columns: str) -> rich.table.Table:
    """A table without rows; its columns are right-aligned but for the first, headed `corner`."""
    made = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    made.add_column(corner)
    for name in columns:
        made.add_column(name, justify="right")
    return made
