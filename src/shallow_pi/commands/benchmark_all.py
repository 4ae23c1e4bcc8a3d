"""Measure an accelerator at full size in five minutes at most: inference, training, openpi.

uv run scripts/benchmark_all.py --output benchmarks/mine

    --only pi05_l6 pi05_l18         only these variants (--list names all)
    --add '{"name": "tower_cudnn", "base": "pi05_l6", "options": {"tower_attention": "cudnn"}}'
                                    one more variant, compared with its base; it may set any field
                                    of speed/variants.py, such as "environment" for XLA_FLAGS or
                                    "arguments" for the flags of a training step
    --choices inference training    also compares options: attention, 8 bits, remat ...
    --budget-s 270                  begins no measurement after this many seconds
    --tiny                          everything in miniature, on a CPU

matplotlib is needed for the plots (uv sync --extra plots), and openpi to time its sampler.

Every variant is a process: up to --jobs of them compile at once, then each has the device to
itself. Its JSON file is written as soon as it is measured; if one fails, that is reported and the
others continue. Programs and tuning results of earlier runs are not used, unless
JAX_COMPILATION_CACHE_DIR is set.
"""

import dataclasses
import io
import itertools
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Literal

import rich.console

from shallow_pi import flags
from shallow_pi.checkpoints import run_folder
from shallow_pi.commands import benchmark_variant, exits
from shallow_pi.speed import summary, turns, variants

# Stands in for what openpi imports and its JAX side never uses.
STAND_INS = pathlib.Path(__file__).parents[3] / "tests" / "interop" / "stand_ins.py"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The variants to measure, and for how long."""

    # Folder for a JSON file and a log of each variant, summary.txt and the plots.
    output: str = "benchmarks/mine"
    # Names of the variants to measure, in this order; empty for all.
    only: tuple[str, ...] = ()
    # Additional variants to measure, each as JSON.
    add: tuple[str, ...] = ()
    # Also compare the options of inference, or of a training step.
    choices: tuple[Literal["inference", "training"], ...] = ()
    # Seconds after which nothing is started.
    budget_s: float = 270.0
    # Processes that compile at once; 0 uses one per CPU core, 13 at most.
    jobs: int = 0
    # Everything in miniature.
    tiny: bool = False
    # Print the names of the variants and exit.
    list: bool = False

    def variants(self) -> Sequence[variants.Variant]:
        """The variants to measure, in order."""
        known = [*variants.VARIANTS, *itertools.chain(*variants.CHOICES.values())]
        listed = len(known)
        # Each is known to the next.
        for text in self.add:
            known.append(variants.parse(text, known))
        names = {one.name: one for one in known}
        if len(names) < len(known):
            raise ValueError(f"--add: names must differ, got {[one.name for one in known]}")
        if wrong := [name for name in self.only if name not in names]:
            raise ValueError(f"--only: no variants {wrong}, only {list(names)}")
        wanted = set(self.only) or {one.name for one in variants.VARIANTS}
        wanted |= {one.name for kind in self.choices for one in variants.CHOICES[kind]}
        wanted |= {one.name for one in known[listed:]}
        chosen = [name for name in names if name in wanted]
        chosen.sort(key=lambda name: self.only.index(name) if name in self.only else len(names))
        found = [names[name] for name in chosen]
        return variants.tiny(found) if self.tiny else found


def main() -> None:
    """Parse, measure, print, write."""
    given = flags.parse(Arguments, None, __doc__ or "")
    with exits.exit_on():
        chosen = given.variants()
        if given.list:
            print("\n".join(one.name for one in chosen))
            return
        folder = run_folder.check_output(given.output, "give another --output")
        folder.mkdir(parents=True, exist_ok=True)
        failed = measure(chosen, folder, given)
        found = summary.read(folder)
        console = rich.console.Console(width=120)
        tables = summary.tables(found)
        console.print(*tables)
        text = io.StringIO()
        rich.console.Console(file=text, width=120).print(*tables)
        run_folder.write_text(folder / "summary.txt", text.getvalue(), run_folder.AGAIN)
        print("\n".join(summary.draw(folder, found)))
        for name, reason in failed.items():
            print(f"failed: {name}: {reason}")
        if len(failed) == len(chosen):
            raise SystemExit(1)


def measure(
    chosen: Sequence[variants.Variant], folder: pathlib.Path, given: Arguments
) -> dict[str, str]:
    """Run every variant's process; returns the reasons of those that failed."""
    began, failed = time.monotonic(), dict[str, str]()

    def ended(job: turns.Job, reason: str) -> None:
        if reason:
            failed[job.name] = reason
        seconds = time.monotonic() - began
        print(f"{seconds:5.0f} s  {job.name}: {reason or 'measured'}", flush=True)

    with tempfile.TemporaryDirectory() as private:
        environment = {
            "JAX_COMPILATION_CACHE_DIR": f"{private}/compiled",
            **os.environ,
            # Processes share the device's memory.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
            "SHALLOW_PI_CACHE": private,
        }
        jobs = [_job(one, folder, environment, given.tiny) for one in chosen]
        together = given.jobs or min(os.cpu_count() or 1, 13)
        turns.run(jobs, together=together, budget_s=given.budget_s, ended=ended)
    return failed


def _job(
    variant: variants.Variant, folder: pathlib.Path, environment: dict[str, str], tiny: bool
) -> turns.Job:
    output = folder / f"{variant.name}.json"
    command: list[Any] = [sys.executable]
    if variant.kind == "openpi" and STAND_INS.exists():
        command += [STAND_INS, "--all"]
    text = json.dumps(dataclasses.asdict(variant))
    command += [benchmark_variant.__file__, text, int(tiny), output]
    return turns.Job(
        variant.name,
        [str(word) for word in command],
        {**environment, **variant.environment},
        output,
    )
