"""A run on disk: step folders in openpi's layout, saved asynchronously, resumed bit for bit.

`<folder>/<step>/params` is `{"params": tree}`, the EMA where there is one, with the frozen parts
that no state holds: with `assets` beside it the step folder is a deployable policy. `train_state`
holds the rest of the state, each array once; `data` the position in the data and the validation
error. One Orbax `CheckpointManager` writes all four under a temporary name and renames at the end,
so a step folder is complete or absent. The step with the lowest validation error stays;
`<folder>/best` is a link to it.
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
from typing import Any, Self

import flax.traverse_util
import jax
import orbax.checkpoint as ocp

from shallow_pi.checkpoints import weights
from shallow_pi.parallel import processes

# A flax.struct dataclass with the fields step, params, opt_state and ema_params.
State = Any
# The step with the lowest validation error: its link, and its number and error in a file.
BEST, BEST_FILE = "best", "best.json"
# Writes deployable files (normalization, tokenizer, model config) into the folder it is given.
WriteAssets = Callable[[pathlib.Path], None]


class SaveError(OSError):
    """A checkpoint could not be written; the ones before it are intact."""


class _AssetsHandler(ocp.CheckpointHandler):
    """Lets a callback write files inside the step that Orbax commits as a whole."""

    def save(self, directory: Any, args: "_Assets") -> None:
        if jax.process_index() == 0:
            args.write(pathlib.Path(os.fspath(directory)))

    def restore(self, directory: Any, args: "_NoAssets | None" = None) -> None:
        raise ValueError(f"{directory} holds plain files: read them from there")


@ocp.args.register_with_handler(_AssetsHandler, for_save=True)
class _Assets(ocp.args.CheckpointArgs):
    def __init__(self, write: WriteAssets) -> None:
        self.write = write


@ocp.args.register_with_handler(_AssetsHandler, for_restore=True)
class _NoAssets(ocp.args.CheckpointArgs):
    """Orbax wants a restore argument for each handler; assets are read as files."""


class Checkpoints:
    """The checkpoints of one run. One process group writes to a folder at a time.

    Args:
      folder: the run's folder; made if absent. What an interrupted save left is removed.
      keep: how many of the last checkpoints stay, besides the best one; None keeps all. What goes
        is deleted once a later save is complete (`wait`).
      keep_period: checkpoints at multiples of it always stay.
      save_interval: `save` without `force` skips steps that are no multiple of it.
      frozen: parameters that complete the state's in every step; a nested dictionary of arrays.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep: int | None = 1,
        keep_period: int | None = None,
        save_interval: int = 1,
        frozen: Mapping[str, Any] | None = None,
    ) -> None:
        counts = {"keep": keep, "keep_period": keep_period, "save_interval": save_interval}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self.folder = pathlib.Path(folder).expanduser().absolute()
        self._keep, self._keep_period = keep, keep_period
        self._save_interval = save_interval
        self._frozen = flax.traverse_util.flatten_dict(frozen or {})
        self._saving: int | None = None
        self._unsettled = False
        with _explained(f"{self.folder} cannot hold checkpoints", self._last_complete):
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(self.folder)
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_handlers={
                    "params": ocp.PyTreeCheckpointHandler(),
                    "train_state": ocp.PyTreeCheckpointHandler(),
                    "assets": _AssetsHandler(),
                    "data": ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(),
            )
        self._best = self._find_best()

    def should_save(self, step: int) -> bool:
        """Whether `save` would write at this step without `force`."""
        return step % self._save_interval == 0

    @property
    def best(self) -> tuple[int, float] | None:
        """The step with the lowest validation error among those saved with one, and that error."""
        return self._best

    def is_best(self, error: float | None) -> bool:
        """Whether a validation error is lower than any saved so far."""
        if error is None or not math.isfinite(error):
            return False
        return self._best is None or error < self._best[1]

    def save(
        self,
        step: int,
        state: State,
        data_state: Any,
        write_assets: WriteAssets,
        force: bool = False,
        error: float | None = None,
    ) -> bool:
        """Start saving; the state may be donated or changed as soon as this returns.

        Args:
          step: names the folder; a step that is already saved is left as it is.
          state: arrays on every device of the job.
          data_state: what the data iterator needs to go on, as plain JSON; process 0's is kept.
          write_assets: called with the `assets` folder of the step, on process 0.
          force: save although the step is no multiple of `save_interval`.
          error: on held-out data, where it was measured at this step; the best step stays.

        Returns:
          Whether a save was started. An error in the background surfaces in the next call of
          `save`, `wait` or `close`.
        """
        if not (force or self.should_save(step)):
            return False
        self.wait()
        if step in self._manager.all_steps():
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

    def wait(self) -> None:
        """Return when everything is on disk; raises what went wrong in the background."""
        unsettled, self._unsettled = self._unsettled, False
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        self._saving = None
        if unsettled:  # A save is complete: what it replaces may go.
            self._settle()

    def latest_step(self) -> int | None:
        """The last step that is complete on disk."""
        return self._last_complete()

    def restore(self, abstract: State, step: int | None = None) -> tuple[State, Any]:
        """Read a step (the last one) into the shardings of `abstract`.

        Args:
          abstract: the state as `jax.ShapeDtypeStruct`s with shardings, or as arrays.
          step: which step; None is the last complete one.

        Returns:
          The state, bit for bit as saved, and the data state.
        """
        step = self.latest_step() if step is None else step
        if step is None or not (self.folder / str(step)).is_dir():
            found = ", ".join(map(str, _steps(self.folder))) or "none"
            raise FileNotFoundError(
                f"{self.folder} has no checkpoint {'' if step is None else step} "
                f"(complete steps: {found}): start without --resume, or name one of these"
            )
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
        params = {path: leaf for path, leaf in params.items() if path not in self._frozen}
        state = _merge(abstract, flax.traverse_util.unflatten_dict(params), read["train_state"])
        return state, read["data"]["data"]

    def close(self) -> None:
        """Wait, then free the threads; safe to call twice."""
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
        found = []
        for step in _steps(self.folder):
            folder = self.folder / str(step)
            if not (folder / "data").is_dir():
                continue
            args = ocp.args.Composite(data=ocp.args.JsonRestore())
            try:
                error = self._manager.restore(step, args=args)["data"].get("error")
            except Exception as problem:
                raise weights.damaged(folder, problem) from problem
            if error is not None and math.isfinite(error):
                found.append((error, step))
        return (min(found)[1], min(found)[0]) if found else None

    def _settle(self) -> None:
        """Point to the best step, and delete those that need not stay."""
        with _explained(f"{self.folder} cannot be tidied", self._last_complete):
            if self._best is not None and processes.is_main():
                _point_to(self.folder, *self._best)
            steps = sorted(self._manager.all_steps())
            stay = set(steps if self._keep is None else steps[-self._keep :])
            stay |= {step for step in steps if step % (self._keep_period or math.inf) == 0}
            stay |= {step for step in steps if self._best is not None and step == self._best[0]}
            for step in steps:
                if step not in stay:
                    self._manager.delete(step)

    def _split(self, state: State) -> tuple[Any, dict[str, Any]]:
        """The deployable parameters, and everything else, so that nothing is stored twice."""
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

    def _last_complete(self) -> int | None:
        # Orbax counts the step that is being written; the disk does not, until it is complete.
        return max(_steps(self.folder), default=None)

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return _explained(
            f"checkpoint {self.folder / str(self._saving)} could not be written",
            self._last_complete,
        )


def _merge(abstract: State, params: Any, rest: dict[str, Any]) -> State:
    name = "params" if abstract.ema_params is None else "ema_params"
    return dataclasses.replace(abstract, **rest, **{name: params})


def _steps(folder: pathlib.Path) -> list[int]:
    """The complete steps: a step folder gets its plain name when everything is in it."""
    if not folder.is_dir():
        return []
    return sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit())


def _point_to(folder: pathlib.Path, step: int, error: float) -> None:
    """Name the best step in a file and, where the file system has links, by a link."""
    partial = folder / f"{BEST_FILE}.partial"
    partial.write_text(json.dumps({"step": step, "error": error}) + "\n", encoding="utf-8")
    partial.replace(folder / BEST_FILE)
    link = folder / f"{BEST}.partial"
    with contextlib.suppress(OSError):
        link.unlink(missing_ok=True)
        link.symlink_to(str(step))
        link.replace(folder / BEST)


def _remove_unfinished(folder: pathlib.Path) -> None:
    """Delete what an interrupted save left; Orbax's own clean-up does so in some versions alone."""
    processes.sync("opened the checkpoints")
    if jax.process_index() == 0:
        for child in folder.glob("[0-9]*.orbax-checkpoint-tmp*"):
            _remove(child)
    processes.sync("removed unfinished checkpoints")


def _remove(folder: pathlib.Path, attempts: int = 20) -> None:
    """Delete a folder into which the threads of a save that failed may still be writing."""
    for attempt in range(1, attempts + 1):
        try:
            shutil.rmtree(folder)
            return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or attempt == attempts:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def _explained(problem: str, last_complete: Callable[[], int | None]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # Orbax raises whatever TensorStore did, bare Exception included.
        reason = next(iter(str(error).splitlines()), "")[:300]
        step = last_complete()
        rescue = (
            "no checkpoint of this run is complete" if step is None else f"step {step} is intact"
        )
        raise SaveError(
            f"{problem} ({type(error).__name__}: {reason}); {rescue}. Free space there or make it "
            "writable, then continue with --resume"
        ) from error
