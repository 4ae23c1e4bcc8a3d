"""The metrics log of a run: `metrics.jsonl`, TensorBoard, and optionally wandb or trackio.

`metrics.jsonl` holds one object per line, `{"step": 10, "loss/task": 0.3, ...}`, and each step
once: a resumed run drops the lines that an interrupted one wrote after its last checkpoint. In
wandb and trackio it goes on under the same identity. Only the first process of a multi-host job
opens a log.
"""

import contextlib
import importlib
import json
import math
import os
import pathlib
import secrets
import time
import types
from collections.abc import Mapping
from typing import Any, Self, SupportsFloat

import numpy as np
from jaxtyping import UInt8
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2, summary_pb2

from shallow_pi.checkpoints import run_folder


class MetricsLog:
    """Appends scalars to the folder of a run.

    Args:
      folder: the run's folder; made if absent.
      tensorboard: also write TensorBoard events, to `folder/tensorboard`.
      wandb: also log to this Weights & Biases project (extra `wandb`).
      trackio: also log to this trackio project (extra `trackio`).
      first_step: the first step to log; existing lines from it on are dropped.
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
        modules = trackers(wandb, trackio)
        path = self.folder / run_folder.METRICS_FILE
        with contextlib.ExitStack() as opened:
            with run_folder.writing(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                _drop_from(path, first_step)
                self._file = opened.enter_context(path.open("a", encoding="utf-8"))
            self._board = None
            if tensorboard:
                self._board = _Board(self.folder / run_folder.TENSORBOARD_FOLDER, first_step)
                opened.callback(self._board.close)
            self._runs = [_start(module, project, self.folder) for module, project in modules]
            for run in self._runs:
                opened.callback(run.finish)
            self._opened = opened.pop_all()

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Record the scalars of one step."""
        if "step" in values:
            raise ValueError('"step" is the name of the step itself: give the metric another name')
        scalars = {name: _scalar(name, value) for name, value in values.items()}
        # JSON has no NaN: null stands for a value that is not finite.
        row = {name: value if math.isfinite(value) else None for name, value in scalars.items()}
        line = json.dumps({"step": int(step), **row}, allow_nan=False) + "\n"
        with run_folder.writing(self.folder / run_folder.METRICS_FILE):
            self._file.write(line)
            self._file.flush()
        if self._board is not None:
            summaries = (summary.scalar(name, value) for name, value in scalars.items())
            self._board.write(int(step), *summaries)
        for run in self._runs:
            run.log(scalars, step=int(step))

    def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
        """Log an image to TensorBoard, if it is on."""
        if self._board is not None:
            self._board.write(int(step), summary.image(name, pixels, dataformats="HWC"))

    def close(self) -> None:
        """Close everything; safe to call twice."""
        with contextlib.suppress(OSError):  # Every line was flushed; a full disk raises again.
            self._opened.close()
        self._board, self._runs = None, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Board:
    """TensorBoard events, written synchronously.

    tensorboardX's own writer uses a thread; a full disk ends it, and the run would wait forever.
    """

    def __init__(self, folder: pathlib.Path, first_step: int) -> None:
        self._folder = folder
        with run_folder.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = event_file_writer.EventsWriter(str(folder / "events"))
            # Hides what an interrupted run wrote from this step on.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(first_step, session_log=start)

    def write(self, step: int, *summaries: summary_pb2.Summary) -> None:
        with run_folder.writing(self._folder):
            for one in summaries:
                self._write(step, summary=one)
            self._writer.flush()

    def _write(self, step: int, **content: object) -> None:
        self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=step, **content))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # All was flushed; a full disk raises again.
            self._writer.close()


def read(folder: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl` in order; a value that was not finite is NaN."""
    rows = []
    for row in _rows(pathlib.Path(folder) / run_folder.METRICS_FILE):
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


def _drop_from(path: pathlib.Path, first_step: int) -> None:
    if not path.exists():
        return
    kept = [json.dumps(row) + "\n" for row in _rows(path) if row["step"] < first_step]
    run_folder.write_text(path, "".join(kept))


def _scalar(name: str, value: SupportsFloat) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        found = getattr(value, "shape", value)
        raise ValueError(f"metric {name!r} must be one number, got {found!r}") from error


def _start(module: types.ModuleType, project: str, folder: pathlib.Path) -> Any:
    """The run of a folder in wandb or trackio: the same one after a resume."""
    tracker, path = module.__name__, folder / run_folder.TRACKER_FILE
    if not path.exists():
        run_folder.write_text(path, secrets.token_hex(4))
    identity = path.read_text(encoding="utf-8")
    name = f"{folder.parent.name}-{folder.name}-{identity}"  # Trackio's runs are told by name.
    options = {"id": identity} if tracker == "wandb" else {}
    config = run_folder.read_config(folder)
    try:
        return module.init(project=project, name=name, config=config, resume="allow", **options)
    except Exception as error:  # No account, no network, no such project.
        raise ValueError(
            f"--{tracker} {project} cannot be logged to ({type(error).__name__}: {error}): log in "
            f"to {tracker}, leave --{tracker} out, or, for wandb without a network, set "
            "WANDB_MODE=offline"
        ) from error


def trackers(wandb: str | None, trackio: str | None) -> list[tuple[types.ModuleType, str]]:
    """The packages of the trackers that have a project, each with it.

    Raises:
      ValueError: one is not installed.
    """
    named = {"wandb": wandb, "trackio": trackio}
    return [(_optional(name), project) for name, project in named.items() if project is not None]


def _optional(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"logging to {name} needs the package: uv sync --extra {name}, or leave {name} out"
        ) from error
