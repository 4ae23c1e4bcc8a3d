"""Estimate the memory that a config needs on each device, and the largest batch that fits.

uv run scripts/estimate_memory.py NAME [--devices 1] [--card h100] [--field value ...]

    pi0_aloha_l6                            one device, the config's batch size
    pi0_aloha_l6 --devices 8 --mesh.fsdp 8  parameters and moments sharded over eight
    pi0_aloha_l6 --devices 8 --card h100    sharded over the fewest H100s of eight that fit
    pi05_libero_l6 --topology v5e:4x4       on a TPU slice (needs libtpu)
    --openpi.config pi05_libero             an openpi config instead of NAME (needs openpi)

The estimate is computed from sizes and takes seconds. `uv run scripts/compile_ahead.py` obtains the
compiler's own memory plan, which takes minutes at full size.
"""

import argparse
import sys

from shallow_pi.commands import exits
from shallow_pi.interop import openpi_flag
from shallow_pi.planning import accelerators, compile, report
from shallow_pi.training import command_line, setup


def main() -> None:
    """Parse, estimate, print."""
    if {"-h", "--help"} & set(sys.argv[2:]):
        print((__doc__ or "").strip(), end="\n\n")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--devices", type=int)
    parser.add_argument("--topology", default="")
    parser.add_argument("--card", default="", choices=["", *accelerators.TABLE])
    own, arguments = parser.parse_known_args()
    with exits.exit_on(ModuleNotFoundError):
        default, fields = openpi_flag.cli(arguments)
        experiment = command_line.cli(command_line.configs(), __doc__ or "", fields, default)
        devices = compile.devices(own.devices, own.topology)
        experiment = setup.resolve_from_disk(experiment)
        kind = own.topology.partition(":")[0]
        if kind and own.card not in ("", kind):
            raise ValueError(
                f"--card {own.card} and --topology {own.topology} name different devices: give "
                "only one"
            )
        kind = kind or own.card
        only = kind if kind in accelerators.TABLE else ""
        room = accelerators.TABLE[only].memory if only else None
        mesh = setup.make_mesh(experiment, devices, room)
        spec, dtype = setup.make_spec(experiment, mesh), setup.teacher_dtype(experiment)
        lines = report.estimated(spec, mesh, experiment.batch_size, dtype, only)
        print(f"{experiment.name}, " + "\n".join(lines))
