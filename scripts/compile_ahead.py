"""Compile a config's step for devices that are not there: does it fit, and what does it exchange?

uv run scripts/compile_ahead.py NAME --topology v5e:8x8 [--field value ...]

    pi0_aloha_l6 --topology v5e:4x4 --mesh.fsdp 16      a TPU slice, on a CPU (needs libtpu)
    pi0_aloha_l6 --devices 8 --mesh.fsdp 8              eight virtual CPU devices
    --output benchmarks/ahead                           also writes NAME-TOPOLOGY.json there

The step is compiled from shapes alone; a full-size one takes some minutes.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any

from shallow_pi import progress
from shallow_pi.planning import accelerators, compile, hlo, memory
from shallow_pi.speed import flops, latency
from shallow_pi.training import command_line, setup

CONFIGS = pathlib.Path(__file__).parents[1] / "train_configs"
GIGA, TERA = 1e9, 1e12


def main() -> None:
    """Parse, compile, print, write."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--topology", default="")
    parser.add_argument("--output", default="")
    own, arguments = parser.parse_known_args()
    with command_line.exit_on():
        experiment = command_line.cli(CONFIGS, __doc__ or "", arguments)
        mesh = setup.make_mesh(experiment, compile.devices(own.devices, own.topology))
        spec = setup.any_spec(experiment, mesh)
        dtype = setup.teacher_dtype(experiment)
        name = own.topology or f"cpu:{own.devices}"
        progress.console.print(f"Compiling {experiment.name} for {name}: minutes at full size")
        began = time.perf_counter()
        program = compile.compile_step(spec, mesh, experiment.batch_size, dtype)
        seconds = time.perf_counter() - began
        useful = flops.training_flops(
            spec.student,
            spec.teacher if spec.losses.needs_teacher else None,
            batch=experiment.batch_size,
            draws=experiment.draws,
            freeze=experiment.student.freeze,
        )
        found = _contents(program, useful / mesh.size)
        card = accelerators.find(mesh.devices.flat[0].device_kind)
        if card is not None:
            seconds_of = compile.predict(program, useful / mesh.size, card)
            found["predicted_seconds"] = dict(zip(("compute", "exchange"), seconds_of, strict=True))
        _show(f"{experiment.name}, {name}", found, card)
        print(f"compiled in {seconds:.0f} s")
        if own.output:
            shape = "-".join(f"{axis}{n}" for axis, n in mesh.shape.items() if n > 1)
            file = f"{experiment.name}-{name.replace(':', '-')}-{shape}.json"
            path = pathlib.Path(own.output) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            more = {"mesh": dict(mesh.shape), "versions": latency.versions()}
            path.write_text(json.dumps(found | more, indent=2) + "\n", encoding="utf-8")
            print(f"written: {path}")


def _contents(program: compile.Program, useful: float) -> dict[str, Any]:
    """What is told of a program, as plain values."""
    values = {k: v for k, v in dataclasses.asdict(program).items() if k != "collectives"}
    values["useful_flops_per_device"] = useful
    if program.collectives is None:
        return {**values, "collectives": None}
    largest = sorted(program.collectives, key=lambda c: -c.times * c.bytes)[:10]
    return {
        **values,
        "collectives": {
            kind: {"times": times, "bytes": size}
            for kind, (times, size) in hlo.totals(program.collectives).items()
        },
        "largest_collectives": [dataclasses.asdict(one) for one in largest],
    }


def _show(title: str, found: dict[str, Any], card: accelerators.Card | None) -> None:
    print(f"{title}: batch {found['batch_size']} on {found['devices']} devices")
    for name, size in {**found["given"], "temporary": found["temporary"]}.items():
        print(f"  {name:<12} {size / GIGA:7.2f} GB a device")
    fits = ""
    if card is not None:
        room = memory.USABLE * card.memory
        fits = f": {'fits' if found['total'] <= room else 'does not fit'} in {room / GIGA:.0f} GB"
    print(f"  {'in all':<12} {found['total'] / GIGA:7.2f} GB a device{fits}")
    print(f"  useful work  {found['useful_flops_per_device'] / TERA:7.2f} TFLOP a device")
    if found["collectives"] is None:
        print("  what it exchanges is unknown: its compiler is newer than this JAX, which can read")
        print("  programs of the libtpu that it names itself (uv sync --extra tpu)")
    for kind, one in (found["collectives"] or {}).items():
        print(f"  {kind:<20} {one['times']:>6} times, {one['bytes'] / GIGA:7.2f} GB a device")
    if card is not None:
        compute, exchange = found["predicted_seconds"].values()
        beside = "" if exchange is None else f", {exchange:.2f} s of exchange beside it"
        share = f"{100 * compile.UTILIZATION:.0f} % of the card's rate"
        print(f"  forecast: {compute:.2f} s of computing at {share}{beside}")


if __name__ == "__main__":
    if "--help" in sys.argv[2:] or "-h" in sys.argv[2:]:
        print((__doc__ or "").strip(), end="\n\n")
    main()
