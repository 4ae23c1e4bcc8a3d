"""Export a student: write a folder, read it back, compare, and only then rename it into place.

An export is written under a temporary name and compared with the student parameter by parameter and
action by action; an existing folder is never overwritten.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from shallow_pi import atomic, progress
from shallow_pi.checkpoints import run_folder, weights
from shallow_pi.data.robots import assets as policy_assets
from shallow_pi.data.robots import tokenizer
from shallow_pi.deploy import step_folder
from shallow_pi.deploy.export import card, formats
from shallow_pi.deploy.export import student as students
from shallow_pi.inference import calibration
from shallow_pi.inference import quantize as quantization
from shallow_pi.models import pi0

# The oldest operators of ONNX that graphs are written for.
OPSET = 17


def export(
    source: str | os.PathLike[str],
    format: str,
    output: str | os.PathLike[str] | None = None,
    *,
    step: str | int = "last",
    any_size: bool = False,
    num_steps: int | None = None,
    dtype: str = "",
    opset: int = OPSET,
    quantize: quantization.Scheme = "none",
    report: Callable[[str], None] = lambda _: None,
) -> pathlib.Path:
    """Export a student, and return the folder.

    Args:
      source: a step folder, or a run's folder; `gs://`, `hf://` too.
      format: a name in `formats.FORMATS`.
      output: the folder to create; None uses `exports/<step>-<format>` next to the step.
      step: of a run: "last", "best" or a number.
      any_size: allow sizes that differ from openpi's, which the released classes cannot load.
      num_steps: integration steps of a graph, in which they are unrolled; None takes the number
        that the student was trained for.
      dtype: of a graph's weights and arithmetic; empty uses the format's default.
      opset: for `onnx`, the operator set version.
      quantize: products in 8 bits, for graphs; int8 needs the student's calibration.
      report: called with progress messages.

    Raises:
      ValueError: an unknown format, a student that it cannot represent, or values that differ when
        read back.
      FileNotFoundError: no step folder, or an incomplete one.
      FileExistsError: the output exists; nothing is ever overwritten.
      OSError: the output cannot be written.
    """
    chosen = formats.find(format)
    formats.check_scheme(format, quantize)
    if opset != OPSET and format != "onnx":
        raise ValueError(f"--opset {opset} is for --format onnx, not {format}: leave it out")
    if output:  # Before a checkpoint is fetched.
        run_folder.check_output(output, "give another --output", is_new=True)
    folder = step_folder.find(source, step)
    target = pathlib.Path(output or folder.parent / "exports" / f"{folder.name}-{format}")
    target = run_folder.check_output(target, "give another --output", is_new=True)
    assets = policy_assets.load(folder)
    if chosen.DTYPES:
        dtype = _dtype(format, dtype or chosen.DTYPES[0], chosen.DTYPES)
        assets = dataclasses.replace(assets, model=dataclasses.replace(assets.model, dtype=dtype))
    elif dtype:
        raise ValueError(f"--dtype is for graphs, --format {format} keeps the parameters' own")
    elif num_steps is not None:
        raise ValueError(
            f"--num-steps {num_steps} is for graphs, --format {format} keeps the "
            f"{assets.num_steps} that the student was trained for: leave it out"
        )
    different = students.other_sizes(assets.model, chosen.BUILT_IN)
    if different and not any_size:
        others = ", ".join(
            f"--format {name}"
            for name, one in formats.FORMATS.items()
            if not students.other_sizes(assets.model, one.BUILT_IN)
        )
        raise ValueError(
            f"this student has sizes that the classes behind --format {format} cannot have:\n  "
            + "\n  ".join(different)
            + f"\nserve it from its step folder (shallow-pi serve), give {others}, or --any-size "
            "to export it for classes you have changed"
        )
    origin = students.origin(folder)

    steps = assets.steps(num_steps)
    _warn_of_float(assets.quantize, format, quantize)
    # Read for every format, so that a missing file is named before the parameters are read.
    prompts = tokenizer.Tokenizer(assets.tokenizer, assets.model.max_token_len)
    if not chosen.DTYPES:
        prompts.warn_of_paligemmas()
        assets.warn_of_still()
    calibrated = calibration.load(folder / run_folder.ASSETS, assets.model)
    schemes = formats.SCHEMES.get(format, ())
    scheme, bounds = calibration.choose(
        assets.model, quantize, "none", calibrated, steps, schemes=schemes
    )
    expected = pi0.abstract_params(assets.model)
    student = students.Student(assets, expected, steps, opset, scheme, bounds)
    chosen.check(student)

    report(f"Reading {folder}: {assets.model.kind}, {assets.model.depths}")
    params = weights.load_params(
        folder, expected, dtype=jnp.dtype(dtype) if dtype else None, what="student"
    )
    student = dataclasses.replace(student, params=params)
    exported = chosen.prepare(student)
    kept = None if chosen.DTYPES else _that_fits(calibrated, student.model, exported.model)

    advice = "repeat the command, or give another --output"
    with run_folder.writing(target, advice), atomic.folder(target) as partial:
        report(f"Writing {format}")
        exported.assets.save(partial / run_folder.ASSETS)
        if kept is not None:
            calibration.save(partial / run_folder.ASSETS, kept)
        chosen.write(partial, exported)
        report("Reading it back and comparing its actions with the student's")
        checked = chosen.verify(partial, exported, student)
        usage = chosen.usage(target.name, exported)
        readme = card.text(
            *(usage, target.name, student, origin, checked),
            is_policy=not chosen.DTYPES,
            other_sizes=different,
        )
        (partial / "README.md").write_text(readme, encoding="utf-8")
    report(f"{target}: {checked}")
    return target


def _warn_of_float(trained: quantization.Scheme, format: str, asked: quantization.Scheme) -> None:
    """Warn if a student that was trained for 8 bits is exported in float."""
    if trained == "none" or asked != "none":
        return
    holds = trained in formats.SCHEMES.get(format, ())
    remedy = f"give --quantize {trained}" if holds else "shallow-pi serve rounds it"
    progress.warn(
        f"the student was trained for products in 8 bits ({trained}), and --format {format} holds "
        f"its unrounded weights: its actions may be worse ({remedy})"
    )


def _that_fits(
    calibrated: calibration.Calibration | None, own: pi0.Pi0Config, exported: pi0.Pi0Config
) -> calibration.Calibration | None:
    """The student's calibration, if an export has the same layers; warns if it has others."""
    if calibrated is None or quantization.depths(own) == quantization.depths(exported):
        return calibrated
    progress.warn(
        f"the student's {calibration.FILE_NAME} is left out, because the export has other layers: "
        "calibrate it too, where shallow_pi is to run it in 8 bits (scripts/calibrate.py)"
    )
    return None


def _dtype(format: str, dtype: str, known: Sequence[str]) -> str:
    if dtype not in known:
        raise ValueError(f"--format {format} has --dtype {', '.join(known)}, not {dtype!r}")
    return dtype
