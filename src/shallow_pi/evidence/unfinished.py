"""Keep the state of a long training, so that one that was interrupted goes on where it was."""

import hashlib
import io
import pathlib
import time
import zipfile
from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import PyTree

from shallow_pi import atomic, progress
from shallow_pi.checkpoints import run_folder

# Seconds between saves; a training that takes less keeps nothing.
EVERY = 300.0


class Unfinished:
    """The state of one training in one file, written every few minutes.

    `folder` holds such files, and is made if there is something to keep; `name` is for people.
    `identity` is everything that the state depends on: another value is another file.
    """

    def __init__(self, folder: pathlib.Path, name: str, identity: Iterable[object]) -> None:
        digest = hashlib.sha256()
        for part in identity:
            digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        self.path = folder / f"{digest.hexdigest()[:16]}.npz"
        self._name, self._saved = name, time.monotonic()

    def restore(self, start: PyTree) -> PyTree:
        """The state that was kept, or `start`, which has its structure.

        Raises:
          ValueError: the file is damaged.
        """
        if not self.path.is_file():
            return start
        leaves, structure = jax.tree.flatten(start)
        try:
            with np.load(self.path) as kept:
                found = [kept[str(i)] for i in range(len(leaves))]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{self.path} is damaged ({run_folder.reason(error)}): expected the state of the "
                f"training of {self._name}; delete it to start that from the beginning"
            ) from error
        progress.say(f"{self._name}: goes on from {self.path}")
        return jax.tree.unflatten(structure, jax.device_put(found))

    def keep(self, state: PyTree) -> None:
        """Write the state if the last time is long ago; a kill leaves the earlier one."""
        if time.monotonic() - self._saved < EVERY:
            return
        content = io.BytesIO()
        leaves = jax.device_get(jax.tree.leaves(state))
        np.savez(content, **{str(i): leaf for i, leaf in enumerate(leaves)})
        with run_folder.writing(self.path, run_folder.AGAIN):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write(self.path, content.getvalue())
        self._saved = time.monotonic()

    def discard(self) -> None:
        """Remove the file: what was trained is stored elsewhere."""
        self.path.unlink(missing_ok=True)
