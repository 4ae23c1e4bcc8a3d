"""Checkpoints of a run: step folders in openpi's layout, saved asynchronously, resumed bit for bit.

`<folder>/<step>/params` is `{"params": tree}`: the moving average if there is one, and the frozen
parts, which are not in the state. With `assets` beside it the step folder is a deployable policy.
`train_state` holds the rest of the state, each array once; `data` the position in the data and the
validation error. One Orbax `CheckpointManager` writes all four under a temporary name and renames
at the end, and a superseded step is renamed before it is deleted, so a step folder is complete or
absent. The step with the lowest validation error stays; `<folder>/best` is a link to it.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Self

import flax.traverse_util
import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from shallow_pi import progress
from shallow_pi.checkpoints import orbax_noise, run_folder, weights
from shallow_pi.distill import step as distillation
from shallow_pi.parallel import processes

# Follows the number of a step that is being written or deleted.
_TEMPORARY = ".orbax-checkpoint-tmp"
# Writes deployable files (normalization, tokenizer, model config) into a folder.
WriteAssets = Callable[[pathlib.Path], None]
# Files and folders without which a step cannot be restored.
_PARTS = (
    f"{run_folder.PARAMS}/_METADATA",
    f"{run_folder.TRAIN_STATE}/_METADATA",
    run_folder.ASSETS,
    f"{run_folder.DATA}/{run_folder.DATA_FILE}",
)


class SaveError(run_folder.WriteError):
    """A checkpoint could not be written; earlier ones are intact."""


class _AssetsHandler(ocp.CheckpointHandler):
    """An Orbax handler that writes the assets of a step with a callback."""

    def save(self, directory: os.PathLike[str], args: "_Assets") -> None:
        if processes.is_main():
            args.write(pathlib.Path(os.fspath(directory)))

    def restore(self, directory: os.PathLike[str], args: "_NoAssets | None" = None) -> None:
        raise ValueError(f"{directory} holds plain files: read them directly")


@ocp.args.register_with_handler(_AssetsHandler, for_save=True)
class _Assets(ocp.args.CheckpointArgs):
    def __init__(self, write: WriteAssets) -> None:
        self.write = write


@ocp.args.register_with_handler(_AssetsHandler, for_restore=True)
class _NoAssets(ocp.args.CheckpointArgs):
    """The restore argument that Orbax requires of each handler; assets are read as files."""


class Checkpoints:
    """The checkpoints of one run; only one job may write to a folder at a time.

    Args:
      folder: the run's folder; made if absent. Remains of an interrupted save are removed.
      keep: number of latest checkpoints to keep, besides the best one; None keeps all. Superseded
        ones are deleted once a later save is complete (`wait`).
      keep_period: checkpoints at multiples of it are kept forever.
      frozen: parameters that complete the state's in every step, as nested dictionaries.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep: int | None = 1,
        keep_period: int | None = None,
        frozen: Mapping[str, PyTree] | None = None,
    ) -> None:
        for name, value in {"keep": keep, "keep_period": keep_period}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self.folder = pathlib.Path(folder).expanduser().absolute()
        self._keep, self._keep_period = keep, keep_period
        self._frozen = flax.traverse_util.flatten_dict(frozen or {})
        self._saving: int | None = None
        self._unsettled = False
        # Complete steps that cannot be read; they are never deleted.
        self._damaged: set[int] = set()
        orbax_noise.silence()
        with _explained(f"{self.folder} cannot hold checkpoints", self.latest_step):
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(self.folder)
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_handlers={
                    run_folder.PARAMS: _array_handler(),
                    run_folder.TRAIN_STATE: _array_handler(),
                    run_folder.ASSETS: _AssetsHandler(),
                    run_folder.DATA: ocp.JsonCheckpointHandler(run_folder.DATA_FILE),
                },
                options=ocp.CheckpointManagerOptions(),
            )
        best = processes.of_main(self._find_best())  # All must save together.
        self._best = None if best is None else (best[0], best[1])
        self._link_best()  # The run may have been killed before it did.

    @property
    def best(self) -> tuple[int, float] | None:
        """The saved step with the lowest validation error, and that error."""
        return self._best

    @property
    def best_path(self) -> pathlib.Path:
        """The link to the best step; without one, the file that names it."""
        link = self.folder / run_folder.BEST
        return link if link.is_symlink() else self.folder / run_folder.BEST_FILE

    def is_best(self, error: float | None) -> bool:
        """True if a validation error is lower than that of every saved step."""
        if error is None or not math.isfinite(error):
            return False
        return self._best is None or error < self._best[1]

    def save(
        self,
        step: int,
        state: distillation.DistillState,
        data_state: Mapping[str, object],
        write_assets: WriteAssets,
        error: float | None = None,
    ) -> bool:
        """Start saving; the state may be donated or changed as soon as this returns.

        Args:
          step: the step's number, which names the folder; a saved step is not saved again.
          state: the state, on the devices of the job.
          data_state: position in the data, as plain JSON; that of process 0 is saved.
          write_assets: called in process 0 with the `assets` folder of the step.
          error: validation error of this step, if it was measured; the best step is kept.

        Returns:
          True if a save was started. An error in the background is raised by the next call of
          `poll`, `save`, `wait` or `close`.
        """
        self.wait()
        if step in run_folder.steps(self.folder):
            return False
        params, rest = self._split(state)
        self._saving = step
        with self._writing():
            self._unsettled = self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave({"params": params}),
                    train_state=ocp.args.PyTreeSave(rest),
                    assets=_Assets(write_assets),
                    data=ocp.args.JsonSave({"data": data_state, "error": error}),
                ),
                force=True,
            )
        if error is not None and self.is_best(error):
            self._best = step, error
        return self._unsettled

    def poll(self) -> None:
        """`wait` if a save has ended; else return at once.

        A failed save is known at the next step instead of the next save, which may be hours later.
        """
        if self._unsettled and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on disk; raises an error of a save in the background."""
        unsettled, self._unsettled = self._unsettled, False
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._saving = None
        if unsettled:  # A save is complete: superseded steps may go.
            self._settle()

    def latest_step(self) -> int | None:
        """The last step that is complete on disk; Orbax also counts one that is being written."""
        return max(run_folder.steps(self.folder), default=None)

    def restore(
        self, abstract: distillation.DistillState, step: int | None = None
    ) -> tuple[distillation.DistillState, dict[str, object]]:
        """Read a step (by default the last) into the shardings of `abstract`.

        Args:
          abstract: the state as `jax.ShapeDtypeStruct`s with shardings, or as arrays.
          step: number of the step; None is the last complete one.

        Returns:
          The state, bit for bit as saved, and the position in the data.

        Raises:
          ValueError, FileNotFoundError: it is not there, of another shape, or damaged; names the
            step before it.
          PermissionError: a file of it is not readable.
        """
        step = self.latest_step() if step is None else step
        if step is None or not (self.folder / str(step)).is_dir():
            found = ", ".join(map(str, run_folder.steps(self.folder))) or "none"
            raise FileNotFoundError(
                f"{self.folder} has no checkpoint {'' if step is None else step} "
                f"(complete steps: {found}): start without --resume, or name one of these"
            )
        try:
            return self._read(abstract, step)
        except (weights.DamagedError, FileNotFoundError) as error:
            before = [str(number) for number in run_folder.steps(self.folder) if number < step]
            again = f"goes on from step {before[-1]}" if before else "starts from the beginning"
            raise weights.DamagedError(
                f"{error}\nstep {step} is damaged and left alone: repair it, or move "
                f"{self.folder / str(step)} elsewhere, and --resume {again}"
            ) from error

    def _read(
        self, abstract: distillation.DistillState, step: int
    ) -> tuple[distillation.DistillState, dict[str, object]]:
        folder = self.folder / str(step)
        params, rest = self._split(abstract)
        expected = {"params": {"params": params}, "train_state": rest}
        for item, tree in expected.items():
            weights.check_tree(tree, weights.stored_shapes(folder / item), str(folder / item))
        try:
            read = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    data=ocp.args.JsonRestore(),
                    **{
                        item: ocp.args.PyTreeRestore(
                            item=tree,
                            restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
                        )
                        for item, tree in expected.items()
                    },
                ),
            )
        except Exception as error:  # Orbax raises whatever TensorStore did, bare ones included.
            raise weights.damaged(folder, error) from error
        params = flax.traverse_util.flatten_dict(read["params"]["params"])
        own = {path: leaf for path, leaf in params.items() if path not in self._frozen}
        name = "params" if abstract.ema_params is None else "ema_params"
        whole = {**read["train_state"], name: flax.traverse_util.unflatten_dict(own)}
        return dataclasses.replace(abstract, **whole), read["data"]["data"]

    def close(self) -> None:
        """Wait for a running save, then stop the threads; safe to call twice."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # A failed save raises a second time here.
                self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find_best(self) -> tuple[int, float] | None:
        """The best of the complete steps; warns of damaged ones."""
        found = []
        for step in run_folder.steps(self.folder):
            folder = self.folder / str(step)
            try:
                if lacks := [name for name in _PARTS if not (folder / name).exists()]:
                    raise FileNotFoundError(errno.ENOENT, f"it lacks {', '.join(lacks)}")
                text = (folder / run_folder.DATA / run_folder.DATA_FILE).read_text(encoding="utf-8")
                error = json.loads(text)["error"]
            except (OSError, ValueError, TypeError, KeyError) as fault:
                problem = run_folder.reason(fault)
                progress.warn(f"{folder} is damaged and left alone ({problem})", tolerated=True)
                self._damaged.add(step)
                continue
            if error is not None and math.isfinite(error):
                found.append((error, step))
        return (min(found)[1], min(found)[0]) if found else None

    def _link_best(self) -> None:
        if self._best is not None and processes.is_main():
            _point_to(self.folder, *self._best)

    def _settle(self) -> None:
        """Link the best step, and delete superseded ones."""
        with _explained(f"{self.folder} cannot be tidied", self.latest_step):
            if not processes.is_main():
                return
            self._link_best()
            steps = run_folder.steps(self.folder)
            stay = set(steps if self._keep is None else steps[-self._keep :])
            stay |= {step for step in steps if step % (self._keep_period or math.inf) == 0}
            stay |= {step for step in steps if self._best is not None and step == self._best[0]}
            stay |= self._damaged
            for step in steps:
                if step not in stay:
                    _delete(self.folder / str(step))

    def _split(self, state: distillation.DistillState) -> tuple[PyTree, dict[str, PyTree]]:
        """The deployable parameters, and the rest of the state; no array is in both."""
        rest = {
            field.name: getattr(state, field.name)
            for field in dataclasses.fields(state)
            if field.metadata.get("pytree_node", True)
        }
        ema, params = rest.pop("ema_params"), rest.pop("params")
        if ema is not None:
            params, rest["params"] = ema, params
        whole = flax.traverse_util.flatten_dict(params) | self._frozen
        return flax.traverse_util.unflatten_dict(whole), rest

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return _explained(
            f"checkpoint {self.folder / str(self._saving)} could not be written", self.latest_step
        )


def _array_handler() -> ocp.PyTreeCheckpointHandler:
    """An Orbax handler that lets one process write a replicated array from one device.

    By default every device writes a part, which spreads the bytes over hosts, but compiles a
    program for each part of each shape at the first save: 192 of 24 shapes on 8 devices, in 10 s.
    """
    if jax.process_count() > 1:
        return ocp.PyTreeCheckpointHandler()
    kinds = ocp.type_handlers
    whole = kinds.ArrayHandler(use_replica_parallel=False)
    return ocp.PyTreeCheckpointHandler(
        type_handler_registry=kinds.create_type_handler_registry((jax.Array, whole))
    )


def _point_to(folder: pathlib.Path, step: int, error: float) -> None:
    """Record the best step in a file and, if the file system supports it, in a symbolic link."""
    best = json.dumps({"step": step, "error": error}) + "\n"
    run_folder.write_text(folder / run_folder.BEST_FILE, best)
    link = folder / f"{run_folder.BEST}.partial"
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(str(step))
        link.replace(folder / run_folder.BEST)
    except OSError as error:
        progress.warn(
            f"{folder / run_folder.BEST} cannot be linked ({run_folder.reason(error)}): the best "
            f"step is named in {run_folder.BEST_FILE}",
            tolerated=True,
        )


def _delete(step: pathlib.Path) -> None:
    """Delete a step; if the process is killed meanwhile, the next start removes the rest."""
    doomed = step.with_name(f"{step.name}{_TEMPORARY}-superseded")
    step.rename(doomed)
    _remove(doomed)


def _remove_unfinished(folder: pathlib.Path) -> None:
    """Delete the remains of interrupted saves and deletions; not every version of Orbax does so."""
    processes.sync("opened the checkpoints")
    if processes.is_main():
        for child in folder.glob(f"[0-9]*{_TEMPORARY}*"):
            _remove(child)
    processes.sync("removed unfinished checkpoints")


def _remove(folder: pathlib.Path) -> None:
    """Delete a folder that threads of a failed save may still be writing to.

    Where that fails it is warned of: NFS keeps a file that somebody has open, and its folder.
    """
    for left in reversed(range(20)):
        try:
            shutil.rmtree(folder)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or not left:
                progress.warn(
                    f"{folder} is not needed and cannot be deleted ({run_folder.reason(error)}): "
                    "the next start of the run tries again",
                    tolerated=True,
                )
                return
            time.sleep(0.1)


@contextlib.contextmanager
def _explained(problem: str, last_complete: Callable[[], int | None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax raises whatever TensorStore did, bare Exception included.
        step = last_complete()
        rescue = (
            "no checkpoint of this run is complete" if step is None else f"step {step} is intact"
        )
        raise SaveError(
            f"{problem} ({run_folder.reason(error)}); {rescue}. Free space there or make it "
            "writable, then go on with --resume"
        ) from error
