"""What a run measured, step by step: `metrics.jsonl`, TensorBoard, and wandb or trackio on request.

`metrics.jsonl` holds one object a line, `{"step": 10, "loss/task": 0.3, ...}`, and no step twice:
a resumed run drops the lines that an interrupted one wrote after its last checkpoint. Only the
first process of a multi-host job opens a log.
"""

import contextlib
import importlib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Self, SupportsFloat

import numpy as np
import tensorboardX
from jaxtyping import UInt8

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends scalars to the folder of a run.

    Args:
      folder: the run's folder; made if absent.
      tensorboard: also write TensorBoard events, to `folder/tensorboard`.
      wandb: also log to this Weights & Biases project (extra `wandb`).
      trackio: also log to this trackio project (extra `trackio`).
      first_step: the first step this run will log; lines from it on are dropped.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tensorboard: bool = True,
        wandb: str | None = None,
        trackio: str | None = None,
        first_step: int = 0,
    ) -> None:
        self.folder = pathlib.Path(folder)
        modules = [
            (_optional(name), project)
            for name, project in (("wandb", wandb), ("trackio", trackio))
            if project is not None
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        _drop_from(self.folder, first_step)
        self._file = (self.folder / FILE).open("a", encoding="utf-8")
        self._board = (
            tensorboardX.SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step)
            if tensorboard
            else None
        )
        self._runs = [module.init(project=project) for module, project in modules]

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Record the scalars of one step."""
        if "step" in values:
            raise ValueError('"step" is the name of the step itself: call the metric otherwise')
        scalars = {name: _scalar(name, value) for name, value in values.items()}
        # JSON has no NaN: null stands for what is not a finite number.
        row = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        line = json.dumps({"step": int(step), **row}, allow_nan=False) + "\n"
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise OSError(
                f"{self.folder / FILE} cannot be written ({error.strerror}): free space there, "
                "then go on with --resume"
            ) from error
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, int(step))
        for run in self._runs:
            run.log(scalars, step=int(step))

    def image(self, step: int, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Show a picture in TensorBoard, where it is on."""
        if self._board is not None:
            self._board.add_image(name, picture, int(step), dataformats="HWC")

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        with contextlib.suppress(OSError):  # Every line was flushed; a full disk raises again.
            self._file.close()
        if self._board is not None:
            self._board.close()
        for run in self._runs:
            run.finish()
        self._board, self._runs = None, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(folder: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl` in order; a value that was not finite is NaN."""
    rows = []
    for row in _rows(pathlib.Path(folder) / FILE):
        rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):  # The run was killed while writing it.
                break
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}): {line[:80]!r}"
            ) from error
    return rows


def _drop_from(folder: pathlib.Path, first_step: int) -> None:
    path = folder / FILE
    if not path.exists():
        return
    kept = [json.dumps(row) + "\n" for row in _rows(path) if row["step"] < first_step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def _scalar(name: str, value: SupportsFloat) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        found = getattr(value, "shape", value)
        raise ValueError(f"metric {name!r} must be one number, got {found!r}") from error


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"logging to {name} needs the package: uv sync --extra {name}, or leave {name} out"
        ) from error
