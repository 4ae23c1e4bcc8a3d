"""Reports on memory and time of a step, estimated from sizes or planned by a compiler."""

import dataclasses
from collections.abc import Mapping

from jax.sharding import Mesh

from shallow_pi.distill import spec as specs
from shallow_pi.planning import accelerators, compile, hlo, memory

TERA = 1e12
# Number of the largest collectives that a report lists one by one.
LARGEST = 10


def estimated(
    spec: specs.Spec, mesh: Mesh, batch_size: int, teacher_dtype: str, only: str = ""
) -> list[str]:
    """The estimated memory of a step by part, and the accelerators that fit it.

    `only` names the one accelerator to compare with; empty compares with all.
    """
    found = memory.estimate(spec, mesh, batch_size, teacher_dtype)
    parts = found.parts
    if found.total == found.start:
        parts["before step 1"] = found.start
    lines = [_heading(mesh, batch_size), *_rows(parts, found.total)]
    for name in [only] if only else accelerators.TABLE:
        room = accelerators.TABLE[name].memory
        largest = memory.largest_batch(spec, mesh, room, teacher_dtype)
        best = f"largest batch {largest}" if largest else "no batch fits"
        lines.append(f"  {name:<14} {_size(room)}: {_verdict(found.total, room)}; {best}")
    return lines


def planned(
    program: compile.Program,
    mesh: Mesh,
    useful_flops: float,
    accelerator: accelerators.Accelerator | None,
) -> list[str]:
    """The memory, communication and forecast time of a compiled step.

    `useful_flops` are those of one device; `accelerator` is None for CPUs and unknown kinds.
    """
    parts = {**program.given, "temporary": program.temporary}
    lines = [_heading(mesh, program.batch_size), *_rows(parts, program.total)]
    if program.host:
        lines.append(f"  {'on the host':<14} {_size(program.host)}")
    if accelerator is not None:
        room = accelerator.memory
        lines.append(f"  {_verdict(program.total, room)} in {_size(room).strip()} of memory")
    lines.append(f"  {'useful work':<14} {useful_flops / TERA:7.2f} TFLOP")
    if program.collectives is None:
        lines.append("  communication: unknown, as this JAX cannot read the program of a newer XLA")
        lines.append("  (uv sync --extra tpu installs the matching libtpu)")
    for kind, (times, size) in hlo.totals(program.collectives or []).items():
        lines.append(f"  {kind:<20} {times:>6} times, {_size(size)}")
    if accelerator is not None:
        computation, communication = compile.predict(program, useful_flops, accelerator)
        share = f"{100 * compile.UTILIZATION:.0f} % of the stated matrix rate"
        line = f"  forecast: {computation:.2f} s of computation at {share}"
        if communication is not None:
            line += f", {communication:.2f} s of communication in parallel"
        lines.append(line)
    return lines


def contents(
    program: compile.Program, useful_flops: float, accelerator: accelerators.Accelerator | None
) -> dict[str, object]:
    """The same as plain values, for a file; arguments as of `planned`."""
    values = {k: v for k, v in dataclasses.asdict(program).items() if k != "collectives"}
    values["useful_flops_per_device"] = useful_flops
    if program.collectives is None:
        values["collectives"] = None
    else:
        values["collectives"] = {
            kind: {"times": times, "bytes": size}
            for kind, (times, size) in hlo.totals(program.collectives).items()
        }
        largest = sorted(program.collectives, key=lambda c: -c.times * c.bytes)[:LARGEST]
        values["largest_collectives"] = [dataclasses.asdict(one) for one in largest]
    if accelerator is not None:
        seconds = compile.predict(program, useful_flops, accelerator)
        values["predicted_seconds"] = dict(zip(("compute", "exchange"), seconds, strict=True))
    return values


def _heading(mesh: Mesh, batch_size: int) -> str:
    axes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    devices = f"{mesh.size} device{'s' * (mesh.size > 1)}"
    return f"batch {batch_size} on {devices} ({axes}); memory per device:"


def _rows(parts: Mapping[str, int], total: int) -> list[str]:
    listed = {**{name: size for name, size in parts.items() if size}, "total": total}
    return [f"  {name:<14} {_size(size)}" for name, size in listed.items()]


def _verdict(total: int, room: int) -> str:
    return "fits" if total <= memory.USABLE * room else "does not fit"


def _size(count: int) -> str:
    """Bytes in the unit that suits them, aligned."""
    unit, scale = memory.unit(count)
    return f"{count / scale:7.2f} {unit}"
