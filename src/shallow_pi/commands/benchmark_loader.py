"""Measure how fast a dataset's images are read: by PyAV alone, the loader, the loader's caches.

uv run scripts/benchmark_loader.py [--path PATH] [--step-ms 250 --batch-size 64] [--output FILE]

    --path ~/data/my_aloha --threads 8 --workers 8     your dataset, on eight cores
    --height 480 --width 640 --codec h264              synthetic video of that size

Without PATH it writes a synthetic dataset: two cameras, video with frequent key frames. The
methods alternate, `--repeats` times each, and the medians are reported. "PyAV" only decodes the
same images in the same order to RGB, with the same number of threads: once with its defaults, once
with single-threaded decoders that seek as ours do. The loader also resizes, transforms and stacks
them.

With `--step-ms`, the length of a training step, the report says which methods keep up with it. For
methods in a single process it also shows CPU milliseconds per image, which remain reliable on a
busy machine, where rates do not.
"""

import dataclasses
import json
import pathlib
import sys
import tempfile
from collections.abc import Sequence

from shallow_pi import flags
from shallow_pi.checkpoints import run_folder
from shallow_pi.commands import exits
from shallow_pi.speed import loader


@dataclasses.dataclass(frozen=True)
class Arguments(loader.Setting):
    """The data to read, and the methods to compare."""

    # File for the numbers, as JSON.
    output: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, measure, print, write."""
    with exits.exit_on():
        words = sys.argv[1:] if arguments is None else arguments
        given = flags.parse(Arguments, words, __doc__ or "", idle=_idle)
        if given.output:
            run_folder.check_output(pathlib.Path(given.output).parent, "give another --output")
        with tempfile.TemporaryDirectory() as scratch:
            result = loader.measure(given, pathlib.Path(scratch))
        print(loader.table(result))
        if given.output:
            output = pathlib.Path(given.output).expanduser()
            output.parent.mkdir(parents=True, exist_ok=True)
            run_folder.write_text(output, json.dumps(result, indent=2) + "\n", run_folder.AGAIN)


def _idle(given: Arguments) -> flags.Idle:
    reason = f"the images are those of --path {given.path}; give only one"
    yield given.path, "height width codec group frames", reason
