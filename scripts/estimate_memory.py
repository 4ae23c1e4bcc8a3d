"""What a config needs on each device, and the largest batch that fits, before there is one.

uv run scripts/estimate_memory.py NAME [--devices 1] [--card h100] [--field value ...]

    pi0_aloha_l6                            one device, the config's own batch
    pi0_aloha_l6 --devices 8 --mesh.fsdp 8  parameters and moments split over eight
    pi05_libero_l6 --topology v5e:4x4       as TPUs would hold it (needs libtpu)
    pi0_aloha_l6 --topology h100            as an H100 would (needs the CUDA extra, and no GPU)

The step is compiled from shapes alone, on virtual CPU devices unless a topology is named.
"""

import argparse
import pathlib
import sys

from shallow_pi import progress
from shallow_pi.planning import accelerators, compile
from shallow_pi.training import command_line, config, setup

CONFIGS = pathlib.Path(__file__).parents[1] / "train_configs"
GIGA = 1e9


def main() -> None:
    """Parse, compile two batch sizes, print the table."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--topology", default="")
    parser.add_argument("--card", default="", choices=["", *accelerators.CARDS])
    own, arguments = parser.parse_known_args()
    with command_line.exit_on():
        experiment = command_line.cli(CONFIGS, __doc__ or "", arguments)
        mesh = setup.make_mesh(experiment, compile.devices(own.devices, own.topology))
        spec = setup.any_spec(experiment, mesh)
        dtype = setup.teacher_dtype(experiment)
        ways = mesh.shape["data"] * mesh.shape["fsdp"] * experiment.accumulation
        sizes = (experiment.batch_size, 2 * experiment.batch_size)
        programs = []
        with progress.bar("Compile", total=len(sizes)) as advance:
            for size in sizes:
                programs.append(compile.compile_step(spec, mesh, size, dtype))
                advance(1)
        card = own.card or own.topology.partition(":")[0]
        _show(experiment, programs, card, ways)


def _show(
    experiment: config.DistillConfig, programs: list[compile.Program], card: str, ways: int
) -> None:
    program = programs[0]
    print(
        f"{experiment.name}, batch {program.batch_size} on {program.devices} devices; GB a device"
    )
    rows = {**program.given, "activations and gradients": program.temporary}
    rows |= {"teacher, on the host": program.host} if program.host else {}
    for name, size in rows.items():
        print(f"  {name:<26} {size / GIGA:8.2f}")
    print(f"  {'in all':<26} {program.total / GIGA:8.2f}")
    for name in [card] if card in accelerators.CARDS else accelerators.CARDS:
        size = accelerators.CARDS[name].memory
        largest = compile.largest_batch(programs, size, ways)
        verdict = "fits" if program.fits(size) else "does not fit"
        print(f"  {name:<8} {size / GIGA:4.0f} GB: {verdict}; largest batch {largest}")


if __name__ == "__main__":
    if "--help" in sys.argv[2:] or "-h" in sys.argv[2:]:
        print((__doc__ or "").strip(), end="\n\n")
    main()
