"""Compile a config's step for absent devices, and report memory, communication and time.

uv run scripts/compile_ahead.py NAME --topology v5e:8x8 [--field value ...]

    pi0_aloha_l6 --topology v5e:4x4 --mesh.fsdp 16      a TPU slice, on a CPU (needs libtpu)
    pi0_aloha_l6 --topology h100:8                      a GPU host (needs the CUDA extra, no GPU)
    pi0_aloha_l6 --devices 8 --mesh.fsdp 8              eight virtual CPU devices
    --openpi.config pi05_libero --topology h100:8       an openpi config (needs openpi)
    --output benchmarks/ahead                           also writes NAME-TOPOLOGY.json there

The step is compiled from shapes alone; at full size this takes a few minutes.
"""

import argparse
import json
import sys
import time

from shallow_pi import progress
from shallow_pi.checkpoints import run_folder
from shallow_pi.commands import exits
from shallow_pi.interop import openpi_flag
from shallow_pi.planning import accelerators, compile, report
from shallow_pi.speed import flops, latency
from shallow_pi.training import command_line, setup


def main() -> None:
    """Parse, compile, print, write."""
    if {"-h", "--help"} & set(sys.argv[2:]):
        print((__doc__ or "").strip(), end="\n\n")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--devices", type=int)
    parser.add_argument("--topology", default="")
    parser.add_argument("--output", default="")
    own, arguments = parser.parse_known_args()
    with exits.exit_on(ModuleNotFoundError):
        folder = own.output and run_folder.check_output(own.output, "give another --output")
        default, fields = openpi_flag.cli(arguments)
        experiment = command_line.cli(command_line.configs(), __doc__ or "", fields, default)
        devices = compile.devices(own.devices, own.topology)
        experiment = setup.resolve_from_disk(experiment)
        mesh = setup.make_mesh(experiment, devices)
        spec, dtype = setup.make_spec(experiment, mesh), setup.teacher_dtype(experiment)
        name = own.topology or f"cpu:{len(devices)}"
        progress.console.print(f"Compiling {experiment.name} for {name}: minutes at full size")
        began = time.perf_counter()
        _, program = compile.build(spec, mesh, experiment.batch_size, dtype)
        seconds = time.perf_counter() - began
        useful = flops.of_step(spec, experiment.batch_size) / mesh.size
        accelerator = accelerators.find(mesh.devices.flat[0].device_kind)
        lines = report.planned(program, mesh, useful, accelerator)
        print(f"{experiment.name}, {name}, " + "\n".join(lines))
        print(f"compiled in {seconds:.0f} s")
        if folder:
            axes = (f"{axis}{n}" for axis, n in mesh.shape.items() if n > 1)
            stem = "-".join([experiment.name, name.replace(":", "-"), *axes])
            path = folder / f"{stem}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            more = {
                "arguments": arguments,
                "mesh": dict(mesh.shape),
                "versions": latency.versions(),
            }
            content = report.contents(program, useful, accelerator) | more
            run_folder.write_text(path, json.dumps(content, indent=2) + "\n", run_folder.AGAIN)
            print(f"written: {path}")
