"""Time one inference at batch 1, with random weights: by part, by size, and by optimization.

uv run scripts/benchmark.py [--model pi05] [--depths 18 6] [--cameras 2] [--output DIR]

    --model pi0                         the full-size models: pi0, pi05; for a CPU: turntable, small
    --depths 18 9 6 4 --cameras 2 3     lists: all combinations are run
    --prompts 48 200 --horizons 10 50 --num-steps 5 10
    --against openpi                    also times openpi's sampler on the same weights, alternating
                                        with ours (needs a Python environment with openpi)
    --tune                              first finds the fastest options (layers and steps unrolled
                                        or scanned, attention kernels), at the first of the given
                                        cameras, prompts and steps, and stores them for policies
                                        and later benchmarks
    --quantize int8 fp8 w8              also times 8-bit products (docs/quantization.md)
    --output benchmarks/mine            also writes benchmark.json and plots there
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import rich.console

from shallow_pi import flags
from shallow_pi.checkpoints import run_folder
from shallow_pi.commands import exits
from shallow_pi.inference import quantize as quantization
from shallow_pi.inference import tuning as options
from shallow_pi.models import gemma, pi0, siglip
from shallow_pi.parallel import processes
from shallow_pi.speed import inference, plots, report, stages, tuning
from shallow_pi.training import command_line

# Narrow, with the image size, patches, cameras and vocabulary that openpi hard-codes.
SMALL = pi0.Pi0Config(
    backbone=gemma.GemmaConfig(width=64, mlp_dim=256, num_heads=8, num_kv_heads=1, head_dim=16),
    expert=gemma.GemmaConfig(width=32, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
    image=siglip.SiglipConfig(width=64, depth=2, mlp_dim=128, num_heads=4, patch_size=14),
    dtype="float32",
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The models to time, and the way to time them."""

    # The model; "small" is a narrow π0 that openpi can run too.
    model: Literal["pi0", "pi05", "turntable", "small"] = "pi05"
    # Layers of backbone and action expert.
    depths: tuple[int, ...] = (18, 6)
    # Number of cameras present.
    cameras: tuple[int, ...] = (2,)
    # Prompt tokens; 0 uses the model's maximum.
    prompts: tuple[int, ...] = (0,)
    # Actions in a chunk; 0 uses 10 for the full-size models.
    horizons: tuple[int, ...] = (0,)
    # Integration steps.
    num_steps: tuple[int, ...] = (10,)
    # Timed calls of each part.
    repeats: int = 50
    # First find the fastest options for each model on this device, and store them.
    tune: bool = False
    # Also time each optimization switched off.
    ablate: bool = True
    # 8-bit schemes to time, and to try with --tune: int8, fp8 (weights and activations), w8,
    # wf8 (weights alone).
    quantize: tuple[quantization.Scheme, ...] = ()
    # Also time `Policy.infer` on a 480 × 640 ALOHA observation, by stage.
    policy: bool = True
    # Another implementation to time on the same weights, alternating with ours.
    against: Literal["", "openpi"] = ""
    # Folder for benchmark.json and the plots; empty writes none.
    output: str = ""

    def models(self) -> Iterator[tuple[pi0.Pi0Config, int]]:
        """Every model to time, with its integration steps."""
        flags.at_least(self, 1, "repeats")
        for name in ("depths", "cameras", "prompts", "horizons", "num_steps"):
            if min(getattr(self, name), default=-1) < (name not in ("prompts", "horizons")):
                raise ValueError(f"{flags.as_flag(name)} must be positive numbers")
        for depth, cameras, prompt, horizon, steps in itertools.product(
            self.depths, self.cameras, self.prompts, self.horizons, self.num_steps
        ):
            yield self._model(depth, cameras, prompt, horizon), steps

    def base(self) -> pi0.Pi0Config:
        """The model before its sizes are varied; prompts are padded to their full length."""
        if self.model == "turntable":
            return command_line.load(command_line.configs(), "pi0_turntable").model
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
    """Parse, measure, print, write."""
    processes.cache_compilations()
    given = flags.parse(Arguments, None, __doc__ or "")
    with exits.exit_on(ModuleNotFoundError):
        models = list(given.models())
        if given.output:
            run_folder.check_output(given.output, "give another --output")
        others = _openpi(models[0][0]) if given.against else {}
        console = rich.console.Console()
        for model, steps in to_tune(models) if given.tune else ():
            found = tuning.tune(
                model, num_steps=steps, repeats=given.repeats, schemes=given.quantize
            )
            console.print(report.tuning_table(model, found))
            for name, reason in found.failed.items():
                print(f"skipped: {name}: {reason}")
            file = options.store(model, found.options, found.median_ms, found.quantize)
            print(f"written: {file}")
        limit = inference.ceiling(models[0][0].dtype)
        timings = [
            inference.measure(
                model,
                num_steps=steps,
                repeats=given.repeats,
                ablate=given.ablate,
                padded_to=given.base().max_token_len,
                others=others,
                schemes=given.quantize,
            )
            for model, steps in models
        ]
        named = dict(zip(plots.labels(timings), timings, strict=True))
        labels = dict(zip(named, models, strict=True))
        paths = _policies(labels, given.repeats) if given.policy else {}
        console.print(report.inference_table(timings, limit))
        console.print(report.host_table(named, paths))
        lines = report.inference_lines(timings)
        if given.output:
            arguments = dataclasses.asdict(dataclasses.replace(given, output=""))
            content = {"arguments": arguments} | report.inference_contents(timings, limit, paths)
            drawn = {
                "breakdown.png": lambda path: plots.breakdown(path, timings),
                "growth.png": lambda path: plots.growth(path, timings),
                "host_path.png": lambda path: plots.host_path(path, named, paths),
            }
            folder = pathlib.Path(given.output).expanduser()
            lines += report.write(folder, "benchmark.json", content, drawn)
        print("\n".join(lines))


def to_tune(models: Sequence[tuple[pi0.Pi0Config, int]]) -> Iterator[tuple[pi0.Pi0Config, int]]:
    """The first of the models, with its steps, that share one stored tuning."""
    found: set[pathlib.Path] = set()
    for model, steps in models:
        if (file := options.path(model)) not in found:
            found.add(file)
            yield model, steps


def _policies(
    models: Mapping[str, tuple[pi0.Pi0Config, int]], repeats: int
) -> dict[str, stages.HostPath]:
    """`Policy.infer` of each model; of none, with a line that says why, where it cannot run."""
    found = {}
    for label, (model, steps) in models.items():
        try:
            # Pillow and SentencePiece, which the rest does without.
            from shallow_pi.speed import host_path

            with host_path.made_up_policy(model, steps) as policy:
                found[label] = host_path.measure(policy, repeats=repeats)
        except (ModuleNotFoundError, ValueError) as error:
            print(f"Policy.infer is not timed: {error}")
    return found


def _openpi(model: pi0.Pi0Config) -> dict[str, inference.Other]:
    """openpi's sampler, where it is installed and has these sizes; imported here alone."""
    from shallow_pi.interop import openpi

    openpi.model_config(dataclasses.replace(model, cameras=pi0.CAMERAS))
    return {"openpi": openpi.sampler}
