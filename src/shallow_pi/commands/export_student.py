"""Export a student for openpi, LeRobot, TensorRT or plain JAX.

uv run scripts/export_student.py SOURCE --format FORMAT [--step last|best|N] [--output DIR]

SOURCE is a run's folder (checkpoints/<config>/<exp>), of which --step chooses a step, or a step
folder. Formats:

    openpi            params/ and assets/ for openpi with a config of the student's depth
    openpi-padded     the same with zeros up to 18 layers, for an unchanged openpi; no faster
    openpi-pytorch    model.safetensors for openpi's PyTorch model
    lerobot           a LeRobot policy folder; LeRobot needs plugins/lerobot_policy_shallow_pi
    onnx              ONNX graphs for TensorRT and ONNX Runtime (docs/edge.md); needs the extra onnx
    stablehlo         one program for CPU, CUDA and TPU that JAX runs without this package

The export is read back and its actions are compared with the student's before its folder (default:
<run>/exports/<step>-<format>) appears. An existing folder is never overwritten. The folder's
README.md explains how to run it.

    uv run scripts/export_student.py checkpoints/pi0_aloha_l6/first --format openpi
    uv run scripts/export_student.py checkpoints/pi0_aloha_l6/first --step best --format lerobot
    uv run scripts/export_student.py 30000 --format openpi-padded
    uv run scripts/export_student.py checkpoints/pi05_libero_l6/first --format onnx --num-steps 5
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from shallow_pi import flags, progress
from shallow_pi.commands import exits
from shallow_pi.deploy.export import export, formats
from shallow_pi.inference import quantize as quantization
from shallow_pi.parallel import processes


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The arguments of the command."""

    # The student's run folder, or a step folder; local, gs:// or hf://.
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    # The format: one of the names above.
    format: str
    # Step of a run: last, best (the one its best.json names) or a number.
    step: str = "last"
    # The folder to create; empty uses exports/<step>-<format> next to the step.
    output: str = ""
    # Allow sizes that the format's classes have built in otherwise; no released class loads them.
    any_size: bool = False
    # onnx and stablehlo: integration steps, which are unrolled there; 0 uses the number that the
    # student was trained for.
    num_steps: int = 0
    # onnx: float16, float32, bfloat16; stablehlo: bfloat16, float32; empty uses the first.
    dtype: str = ""
    # onnx: operator set version, 17 to 20; TensorRT 10 reads up to 20.
    opset: int = export.OPSET
    # 8-bit products; onnx: int8; stablehlo: int8, w8 (weights alone). For int8, first calibrate the
    # student (the command calibrate).
    quantize: quantization.Scheme = "none"
    # Treat warnings as errors.
    strict: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, export, print the folder."""
    given = flags.parse(Arguments, arguments, __doc__ or "", idle=_idle)
    processes.cache_compilations()
    with exits.exit_on():
        folder = export.export(
            given.source,
            given.format,
            given.output or None,
            step=given.step,
            any_size=given.any_size,
            num_steps=given.num_steps or None,
            dtype=given.dtype,
            opset=given.opset,
            quantize=given.quantize,
            report=progress.say,
        )
    print(folder)


def _idle(given: Arguments) -> flags.Idle:
    if given.format not in formats.FORMATS:  # Refused later, with the names.
        return
    is_graph = bool(formats.FORMATS[given.format].DTYPES)
    yield is_graph, "any_size", f"--format {given.format} has any size; leave it out"
