"""Tables and plots of a folder of measured variants (`scripts/benchmark_all.py`)."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import rich.table

from shallow_pi.speed import inference, plots, report, stages

# Contents of the variants' JSON files, by name.
Found = Mapping[str, Mapping[str, Any]]
_Part = TypeVar("_Part", inference.Timing, stages.HostPath)
# Shown for what was not measured.
NONE = ""


def read(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The measured variants of a folder, by name, in the order they were measured."""
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    contents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    return {name: content for name, content in contents.items() if "variant" in content}


def tables(found: Found) -> list[rich.table.Table]:
    """Inference, stages, batches and training steps, each where something was measured."""
    whole, paths = _with_parts(found), _paths(found)
    made = [_inference(found), _batches(found), _steps(found)]
    if whole or paths:
        made.insert(1, report.host_table(whole, paths))
    return [table for table in made if table.row_count]


def _with_parts(found: Found) -> dict[str, inference.Timing]:
    return {name: one for name, one in timings(found).items() if "prefix" in one.median_ms}


def _inference(found: Found) -> rich.table.Table:
    columns = ("device", "waited for", "pixels to actions", "against", "kernels", "compiled, s")
    table = _table("Inference at batch 1, median ms", found, *columns)
    for name, content in found.items():
        device = _device(content)
        if device is None:
            continue
        timing = content.get("timing", {})
        median, kernels = timing.get("median_ms", {}), timing.get("kernels") or {}
        waited = median.get("whole", content.get("openpi", {}).get("median_ms"))
        base = content["variant"]["base"]
        against = _device(found.get(base, {}))
        table.add_row(
            name,
            _ms(device),
            _ms(waited),
            _ms(median.get("end to end")),
            f"{device / against:.3f} × {base}" if against else NONE,
            f"{kernels['count']:.0f}" if kernels else NONE,
            f"{content['compile_seconds']:.0f}",
        )
    return table


def _device(content: Mapping[str, Any]) -> float | None:
    value = {**content.get("timing", {}), **content.get("openpi", {})}.get("device_ms")
    return None if value is None else float(value)


def _batches(found: Found) -> rich.table.Table:
    columns = ("batch", "device", "infer_batch", "observations/s")
    table = _table("Batches, median ms", found, *columns)
    for variant, content in found.items():
        for size, one in content.get("batches", {}).items():
            rate = f"{1e3 * int(size) / one['infer_batch']:.0f}"
            table.add_row(variant, size, _ms(one["device"]), _ms(one["infer_batch"]), rate)
    return table


def _steps(found: Found) -> rich.table.Table:
    columns = ("ms", "fine-tuning", "ratio", "samples/s", "MFU", "peak GB", "remat", "attention")
    table = _table("Training steps", found, *columns, "against")
    for variant, content in found.items():
        if "mfu" not in content:
            continue
        median = content["median_ms"]
        base = found.get(content["variant"]["base"], {}).get("median_ms", {}).get("distillation")
        table.add_row(
            variant,
            _ms(median["distillation"]),
            _ms(median["fine-tuning"]),
            f"{content['ratio']:.2f}",
            f"{content['samples_per_second']['distillation']:.1f}",
            f"{100 * content['mfu']['distillation']:.0f} %",
            f"{content['peak_bytes'] / 1e9:.1f}",
            content["execution"]["remat"],
            "{tower_attention}, {prefix_attention}".format(**content["execution"]),
            f"{median['distillation'] / base:.3f}" if base else NONE,
        )
    return table


def _table(title: str, found: Found, *columns: str) -> rich.table.Table:
    devices = sorted({content["device"] for content in found.values()})
    return report.empty_table(f"{', '.join(devices)}: {title}", "variant", *columns)


def _ms(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def timings(found: Found) -> dict[str, inference.Timing]:
    """The timings of inference, by variant."""
    return _read(found, "timing", inference.Timing)


def _paths(found: Found) -> dict[str, stages.HostPath]:
    return _read(found, "policy", stages.HostPath)


def _read(found: Found, key: str, kind: type[_Part]) -> dict[str, _Part]:
    """The variants' parts of one kind, from the fields that it has here."""
    fields = {field.name for field in dataclasses.fields(kind)}
    return {
        name: kind(**{k: v for k, v in content[key].items() if k in fields})
        for name, content in found.items()
        if key in content
    }


def draw(folder: pathlib.Path, found: Found) -> list[str]:
    """Draw breakdown, growth with depth, and host path; returns a line for each."""
    whole, paths = _with_parts(found), _paths(found)
    depths = [one for name, one in timings(found).items() if _plain(found, name)]
    drawn: dict[str, Callable[[pathlib.Path], None]] = {}
    if whole:
        drawn["breakdown.png"] = lambda path: plots.breakdown(path, list(whole.values()))
    if depths:
        drawn["growth.png"] = lambda path: plots.growth(path, depths)
    if whole or paths:
        drawn["host_path.png"] = lambda path: plots.host_path(path, whole, paths)
    return report.draw(folder, drawn)


def _plain(found: Found, name: str) -> bool:
    """A π0.5 of two cameras, all its steps, and nothing changed: it differs in depth alone."""
    variant = found[name]["variant"]
    most = max(one["variant"]["num_steps"] for one in found.values())
    sizes = variant["model"], variant["cameras"], variant["num_steps"], variant["base"]
    return sizes == ("pi05", 2, most, "")
