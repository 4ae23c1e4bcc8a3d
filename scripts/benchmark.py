"""Time one inference at batch 1, with random weights: by part, by size, and by optimization.

uv run scripts/benchmark.py [--model pi05] [--depths 18 6] [--cameras 2] [--output DIR]

    --model pi0                         the full-size models: pi0, pi05; for a CPU: turntable, small
    --depths 18 9 6 4 --cameras 2 3     every list may have several values: all combinations are run
    --prompts 48 200 --horizons 10 50 --num-steps 5 10
    --against openpi                    also openpi's own sampler on the same weights, in turns with
                                        ours (run it with the Python of an environment that has it)
    --tune                              first find out whether layers and steps written out or
                                        looped, and which attention kernel, are fastest here, and
                                        keep it for the policies and benchmarks to come
    --output benchmarks/mine            also writes benchmark.json there, and two pictures
"""

import dataclasses
import itertools
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Literal

import jax
import rich.box
import rich.console
import rich.table
import tyro

from shallow_pi import figures
from shallow_pi.data.robots import assets
from shallow_pi.inference import tuning
from shallow_pi.interop import openpi
from shallow_pi.models import gemma, pi0, siglip
from shallow_pi.parallel import processes
from shallow_pi.speed import inference, latency, plots, tuner
from shallow_pi.training import command_line

ROOT = pathlib.Path(__file__).parents[1]
TERA, GIGA = 1e12, 1e9
# What tells XLA how to compile.
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Narrow, but with openpi's pictures, patches, cameras and vocabulary, which it hard-codes.
SMALL = pi0.Pi0Config(
    backbone=gemma.GemmaConfig(width=64, mlp_dim=256, num_heads=8, num_kv_heads=1, head_dim=16),
    expert=gemma.GemmaConfig(width=32, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
    image=siglip.SiglipConfig(width=64, depth=2, mlp_dim=128, num_heads=4, patch_size=14),
    dtype="float32",
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to time."""

    # Whose sizes; "small" is a narrow π0 that openpi can run too.
    model: Literal["pi0", "pi05", "turntable", "small"] = "pi05"
    # Layers of backbone and action expert.
    depths: tuple[int, ...] = (18, 6)
    # Cameras that are there.
    cameras: tuple[int, ...] = (2,)
    # Prompt tokens; 0 is the model's own number.
    prompts: tuple[int, ...] = (0,)
    # Actions of a chunk; 0 is 10 for the full-size models.
    horizons: tuple[int, ...] = (0,)
    # Integration steps.
    num_steps: tuple[int, ...] = (10,)
    # Timed calls of each part.
    repeats: int = 50
    # Measure first which way of running each model is the fastest, and keep it.
    tune: bool = False
    # Also time every saving switched off.
    ablate: bool = True
    # Another implementation to time in turns with ours, on the same weights.
    against: Literal["", "openpi"] = ""
    # Folder for benchmark.json and the pictures; empty for none.
    output: str = ""

    def models(self) -> Iterator[tuple[pi0.Pi0Config, int]]:
        """Every model to time, with its integration steps."""
        for name in ("depths", "prompts", "horizons", "num_steps"):
            if min(getattr(self, name), default=-1) < (name in ("depths", "num_steps")):
                raise ValueError(f"--{name.replace('_', '-')} must be positive numbers")
        for depth, cameras, prompt, horizon, steps in itertools.product(
            self.depths, self.cameras, self.prompts, self.horizons, self.num_steps
        ):
            yield self._model(depth, cameras, prompt, horizon), steps

    def base(self) -> pi0.Pi0Config:
        """The model whose sizes are varied; its prompts are padded to their full length."""
        if self.model == "turntable":
            return assets.load(ROOT / "assets" / "pi0_turntable").model
        if self.model == "small":
            return SMALL
        length = 200 if self.model == "pi05" else 48
        return pi0.Pi0Config(pi05=self.model == "pi05", max_token_len=length, action_horizon=10)

    def _model(self, depth: int, cameras: int, prompt: int, horizon: int) -> pi0.Pi0Config:
        base = self.base()
        if not 1 <= cameras <= len(base.cameras):
            raise ValueError(
                f"--cameras must lie in 1..{len(base.cameras)} for {self.model}, got {cameras}"
            )
        return dataclasses.replace(
            base,
            depth=depth,
            cameras=base.cameras[:cameras],
            max_token_len=prompt or base.max_token_len,
            action_horizon=horizon or base.action_horizon,
        )


def main() -> None:
    """Time every model, print a table, write what was asked for."""
    processes.cache_compilations()
    given = tyro.cli(Arguments, description=__doc__)
    with command_line.exit_on(ModuleNotFoundError):
        models = list(given.models())
        others = {"openpi": openpi.sampler} if given.against else {}
        if others:
            openpi.model_config(dataclasses.replace(models[0][0], cameras=pi0.CAMERAS))
        if given.tune:
            for model, steps in models:
                _tune(model, steps, given.repeats)
        size = 2048 if jax.default_backend() == "cpu" else 8192
        limit = inference.ceiling(models[0][0].dtype, size)
        timings = [
            inference.measure(
                model,
                num_steps=steps,
                repeats=given.repeats,
                ablate=given.ablate,
                padded_to=given.base().max_token_len,
                others=others,
            )
            for model, steps in models
        ]
        _show(timings, limit)
        if given.output:
            _write(pathlib.Path(given.output).expanduser(), given, timings, limit)


def _tune(model: pi0.Pi0Config, num_steps: int, repeats: int) -> None:
    found = tuner.tune(model, num_steps=num_steps, repeats=repeats)
    title = f"{model.depth} layers: ways to run them, median ms"
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    table.add_column("ms", justify="right")
    for name, milliseconds in found.median_ms.items():
        table.add_row(name, f"{milliseconds:.2f}")
    rich.console.Console().print(table)
    for name, reason in found.failed.items():
        print(f"skipped: {name}: {reason}")
    print(f"written: {tuning.store(model, found.options, found.median_ms)}")


def _show(timings: list[inference.Timing], limit: inference.Ceiling) -> None:
    first, last = timings[0], timings[-1]
    console = rich.console.Console()
    title = (
        f"{first.device}: {limit.flops_per_second / TERA:.2f} TFLOP/s and "
        f"{limit.bytes_per_second / GIGA:.0f} GB/s measured. Median ms, 95th percentile in brackets"
    )
    table = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
    table.add_column("layers")
    for timing in timings:
        table.add_column(str(timing.depth), justify="right")
    for field in ("cameras", "prompt_tokens", "horizon", "num_steps"):
        table.add_row(field.replace("_", " "), *(str(getattr(t, field)) for t in timings))
    table.add_section()
    for part in first.median_ms:
        table.add_row(part, *(f"{t.median_ms[part]:.2f} ({t.p95_ms[part]:.2f})" for t in timings))
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
    table.add_row("peak memory, GB", *(f"{t.peak_bytes / GIGA:.2f}" for t in timings))
    console.print(table)
    for timing in timings:
        whole = timing.median_ms["whole"]
        slower = [f"{name} {ms - whole:+.2f}" for name, ms in timing.without_ms.items()]
        if slower:
            print(f"{timing.depth} layers, ms more without: {', '.join(slower)}")
        for name, ms in timing.others_ms.items():
            print(
                f"{timing.depth} layers: ours is {ms / whole:.2f} times as fast as {name}'s "
                f"(largest difference of an action {timing.others_difference:.1e})"
            )
    if first is not last:
        ratio = first.median_ms["whole"] / last.median_ms["whole"]
        print(f"the last row is {ratio:.2f} times as fast as the first")


def _write(
    folder: pathlib.Path,
    given: Arguments,
    timings: list[inference.Timing],
    limit: inference.Ceiling,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "arguments": dataclasses.asdict(dataclasses.replace(given, output="")),
        "ceiling": dataclasses.asdict(limit),
        "timings": [
            dataclasses.asdict(timing) | {"shares": timing.shares(limit)} for timing in timings
        ],
        "flags": {name: os.environ.get(name, "") for name in FLAGS},
        "versions": latency.versions(),
    }
    path = folder / "benchmark.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path}")
    for name, draw in (("breakdown", plots.breakdown), ("growth", plots.growth)):
        try:
            draw(folder / f"{name}.png", timings)
        except figures.PlotsMissingError as error:
            print(error)
            return
        print(f"written: {folder / name}.png")


if __name__ == "__main__":
    main()
