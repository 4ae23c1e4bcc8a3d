"""Time one inference at batch 1, with random weights: by part, by depth, and by what is spared.

uv run scripts/benchmark.py [--model pi05] [--depths 18 6] [--cameras 2] [--output DIR]

    --model pi0                     the full-size models: pi0, pi05; or turntable, for a CPU
    --prompt 48 --horizon 50        tokens of the prompt, actions of a chunk
    --output benchmarks/mine        also writes benchmark.json there, and benchmark.png
"""

import dataclasses
import importlib.metadata
import json
import pathlib
from typing import Literal

import jax
import tyro

from shallow_pi.data import assets
from shallow_pi.evaluation import benchmark, plots
from shallow_pi.models import pi0
from shallow_pi.training import config, distributed

ROOT = pathlib.Path(__file__).parents[1]
GIGA = 1e9


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What to time."""

    # Whose sizes.
    model: Literal["pi0", "pi05", "turntable"] = "pi05"
    # Layers of backbone and action expert.
    depths: tuple[int, ...] = (18, 6)
    # Cameras that are there.
    cameras: int = 2
    # Prompt tokens; 0 is the model's own number.
    prompt: int = 0
    # Actions of a chunk; 0 is 10 for the full-size models.
    horizon: int = 0
    # Integration steps.
    num_steps: int = 10
    # Timed calls of each part.
    repeats: int = 50
    # Also time every saving switched off.
    ablate: bool = True
    # Folder for benchmark.json and benchmark.png; empty for none.
    output: str = ""

    def create(self, depth: int) -> pi0.Pi0Config:
        """The model to time."""
        if self.model == "turntable":
            base = assets.load(ROOT / "assets" / "pi0_turntable").model
        else:
            length = 200 if self.model == "pi05" else 48
            base = pi0.Pi0Config(pi05=self.model == "pi05", max_token_len=length, action_horizon=10)
        if not 1 <= self.cameras <= len(base.cameras):
            raise ValueError(
                f"--cameras must lie in 1..{len(base.cameras)} for {self.model}, got {self.cameras}"
            )
        return dataclasses.replace(
            base,
            depth=depth,
            cameras=base.cameras[: self.cameras],
            max_token_len=self.prompt or base.max_token_len,
            action_horizon=self.horizon or base.action_horizon,
        )


def main() -> None:
    """Time every depth, print a table, write what was asked for."""
    distributed.cache_compilations()
    given = tyro.cli(Arguments, description=__doc__)
    with config.exit_on():
        models = [given.create(depth) for depth in given.depths]
        size = 2048 if jax.default_backend() == "cpu" else 8192
        limit = benchmark.ceiling(models[0].dtype, size)
        timings = [
            benchmark.measure(
                model, num_steps=given.num_steps, repeats=given.repeats, ablate=given.ablate
            )
            for model in models
        ]
        _show(timings, limit)
        if given.output:
            _write(pathlib.Path(given.output), given, timings, limit)


def _show(timings: list[benchmark.Timing], limit: benchmark.Ceiling) -> None:
    print(
        f"{timings[0].device}: {limit.flops_per_second / 1e12:.2f} TFLOP/s, "
        f"{limit.bytes_per_second / GIGA:.0f} GB/s measured"
    )
    for timing in timings:
        parts = ", ".join(f"{name} {ms:.2f}" for name, ms in timing.median_ms.items())
        whole = timing.median_ms["whole"]
        share = timing.flops / (whole / 1e3) / limit.flops_per_second
        floor = 1e3 * timing.weight_bytes / limit.bytes_per_second
        print(f"{timing.depth:>2} layers, ms: {parts}")
        print(
            f"   {timing.flops / 1e12:.3f} TFLOP at {100 * share:.0f} % of the matrix rate; "
            f"reading its weights alone takes {floor:.2f} ms"
        )
        for name, ms in timing.without_ms.items():
            print(f"   without {name}: {ms:.2f} ms ({ms - whole:+.2f})")
    slow, fast = timings[0], timings[-1]
    if slow is not fast:
        ratio = slow.median_ms["whole"] / fast.median_ms["whole"]
        print(f"{fast.depth} layers are {ratio:.2f} times as fast as {slow.depth}")


def _write(
    folder: pathlib.Path,
    given: Arguments,
    timings: list[benchmark.Timing],
    limit: benchmark.Ceiling,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "arguments": dataclasses.asdict(dataclasses.replace(given, output="")),
        "ceiling": dataclasses.asdict(limit),
        "timings": [dataclasses.asdict(timing) for timing in timings],
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")},
    }
    path = folder / "benchmark.json"
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    picture = folder / "benchmark.png"
    plots.breakdown(picture, [(t.depth, t.median_ms) for t in timings], given.num_steps)
    print(f"written: {path}, {picture}")


if __name__ == "__main__":
    main()
