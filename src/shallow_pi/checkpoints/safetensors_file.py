"""openpi's parameters in a safetensors file: PyTorch checkpoints read and written without torch.

The table of `safetensors_layout` maps a file of openpi or LeRobot to openpi's JAX tree. The number
of heads of a matrix is openpi's, unless the header (filled by `write`) gives another. Tensors are
read one at a time, so the host never holds a whole model.
"""

import functools
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from shallow_pi import progress
from shallow_pi.checkpoints import fetch, run_folder
from shallow_pi.checkpoints import safetensors_layout as layout
from shallow_pi.models import parameters

NAME = "model.safetensors"
# Names the file of each tensor, where there are several.
INDEX = f"{NAME}.index.json"
# Width of openpi's backbone; a file without head counts in its header is taken to have its heads.
OPENPI_WIDTH = 2048
_DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16, "F64": jnp.float64}


def find(path: str | os.PathLike[str]) -> pathlib.Path | None:
    """The safetensors file at `path`, or in that folder if it has no `params`."""
    path = pathlib.Path(path).expanduser().absolute()
    if path.suffix == ".safetensors" and not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"there is no checkpoint at {path}: check the spelling")
        return path
    if (path / run_folder.PARAMS).is_dir():
        return None
    return next((path / name for name in (NAME, INDEX) if (path / name).is_file()), None)


class File:
    """An open safetensors file, or the files of an index, read as openpi's JAX tree.

    Raises:
      ValueError: the file is damaged, is no π0 or π0.5, or has tensors the table does not know.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        files = {file: _open(file) for file in _files(path)}
        # Spelling used here → the tensor's own name and its file.
        self._stored = {
            layout.spelled(name): (name, file)
            for file in files.values()
            for name in file.keys()  # noqa: SIM118 (it is no mapping)
            if not (layout.STATISTICS.fullmatch(name) or layout.CONSTANTS.fullmatch(name))
        }
        found = (file.metadata() for file in files.values())
        header: dict[str, str] = next(filter(None, found), {})
        if layout.EMBEDDING not in self._stored and layout.TIED in self._stored:
            self._stored[layout.EMBEDDING] = self._stored[layout.TIED]
        self._known = {"one": 1, "kv_heads": int(header.get("num_kv_heads", 1))}
        self._known["image_heads"] = int(header.get("num_image_heads", 16))
        first_keys = f"{layout.BACKBONE}layers.0.self_attn.k_proj.weight"
        if first_keys not in self._stored or "action_in_proj.weight" not in self._stored:
            fast = "it looks like a π0-FAST checkpoint, which has no action expert" * (
                first_keys in self._stored
            )
            raise ValueError(
                f"{path} is not a π0 or π0.5 checkpoint of openpi or LeRobot: "
                f"{fast or 'it lacks the backbone or action_in_proj'}. Its tensors start with "
                f"{sorted(self._stored)[:3]}; give a π0 or π0.5 checkpoint"
            )
        if "num_kv_heads" not in header and (width := self._shape(first_keys)[-1]) != OPENPI_WIDTH:
            progress.warn(
                f"{path} does not say how many heads it has, and width {width} is not openpi's "
                f"{OPENPI_WIDTH}: assuming openpi's 1 key head and 16 image heads"
            )
        self._known["head_dim"] = self._shape(first_keys)[0] // self._known["kv_heads"]
        self._layers = {rule.parameter.path: self._count(rule) for rule in layout.RULES}
        self._check_names()

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every leaf, by path."""
        found = {}
        for rule in self._rules():
            name = rule.names[0].format(0)
            sizes = rule.sizes(self._shape(name), self._known)
            sizes |= dict.fromkeys(layout.SPLIT, len(rule.names))
            sizes |= dict.fromkeys(parameters.STACKS, self._layers[rule.parameter.path])
            dtype = self._dtype(name)
            shape = rule.parameter.shape(sizes)
            found[rule.parameter.path] = jax.ShapeDtypeStruct(shape, dtype)
        return found

    def read(
        self, shardings: Mapping[str, jax.sharding.Sharding], dtype: jax.typing.DTypeLike | None
    ) -> dict[str, jax.Array]:
        """Every leaf on its devices; the host holds this process's shards of one leaf at a time.

        `dtype` is what leaves are cast to; None keeps the stored one.
        """
        shapes = self.shapes()
        read: dict[str, jax.Array] = {}
        for rule in self._rules():
            block = self._block(rule, dtype)
            path = rule.parameter.path
            read[path] = jax.make_array_from_callback(shapes[path].shape, shardings[path], block)
        return read

    def _rules(self) -> list[layout.Rule]:
        return [rule for rule in layout.RULES if self._layers[rule.parameter.path]]

    def _block(
        self, rule: layout.Rule, dtype: jax.typing.DTypeLike | None
    ) -> Callable[[tuple[slice, ...] | None], np.ndarray]:
        """The callback of `jax.make_array_from_callback`: the elements at an index."""

        def layer(number: int) -> np.ndarray:
            tensors = [self._read(name.format(number)) for name in rule.names]
            parts = [rule.part(tensor, self._known) for tensor in tensors]
            return np.stack(parts) if len(parts) > 1 else parts[0]

        @functools.cache  # Devices that hold the same elements share them.
        def elements(spans: tuple[tuple[int | None, int | None], ...]) -> np.ndarray:
            index = tuple(slice(*span) for span in spans)
            if not rule.layered:
                block = layer(0)[index]
            else:
                chosen = range(self._layers[rule.parameter.path])[index[0]]
                block = np.stack([layer(number)[index[1:]] for number in chosen])
            return block if dtype is None else block.astype(dtype)

        return lambda index: elements(tuple((part.start, part.stop) for part in index or ()))

    def _read(self, name: str) -> np.ndarray:
        own, file = self._stored[name]
        return file.get_tensor(own)

    def _shape(self, name: str) -> tuple[int, ...]:
        own, file = self._stored[name]
        return tuple(file.get_slice(own).get_shape())

    def _dtype(self, name: str) -> np.dtype:
        own, file = self._stored[name]
        found = file.get_slice(own).get_dtype()
        if found not in _DTYPES:
            raise ValueError(
                f"{own} in {self.path} is of type {found}: expected one of {sorted(_DTYPES)}; give "
                "a checkpoint that is not quantized"
            )
        return np.dtype(_DTYPES[found])

    def _count(self, rule: layout.Rule) -> int:
        """Number of layers of a leaf in the file, 1 for one without a layer axis, 0 if absent."""
        if not rule.layered:
            return int(rule.names[0] in self._stored)
        pattern = re.compile(re.escape(rule.names[0]).replace(r"\{\}", r"(\d+)"))
        found = [int(match[1]) for name in self._stored if (match := pattern.fullmatch(name))]
        return max(found, default=-1) + 1

    def _check_names(self) -> None:
        expected = {
            name.format(layer)
            for rule in self._rules()
            for name in rule.names
            for layer in range(self._layers[rule.parameter.path])
        }
        missing = [f"missing {name}" for name in sorted(expected - set(self._stored))]
        unknown = set(self._stored) - expected - set(layout.UNUSED)
        problems = missing + [f"unknown {self._stored[name][0]}" for name in sorted(unknown)]
        if problems:
            lines = [f"{self.path} does not have openpi's tensors ({len(problems)} differ):"]
            lines += [f"  {problem}" for problem in problems]
            raise ValueError("\n".join(lines))


def statistics(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a file that are statistics of LeRobot's, by name."""
    file = _open(path)
    names = [name for name in file.keys() if layout.STATISTICS.fullmatch(name)]  # noqa: SIM118
    return {name: file.get_tensor(name) for name in names}


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold the tensors: the path itself, or those that an index names."""
    if path.name != INDEX:
        return [path]
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return [path.parent / name for name in sorted(set(named.values()))]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no index of safetensors files ({error!r}): copy the folder again"
        ) from error


def _open(path: pathlib.Path) -> Any:
    try:
        return safetensors.safe_open(path, "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        advice = fetch.lfs_advice(path) or (
            ". If it was copied or downloaded, it is probably truncated: delete it and fetch it "
            "again"
        )
        raise ValueError(
            f"{path} could not be read ({type(error).__name__}: {error}){advice}"
        ) from error


def write(
    path: pathlib.Path,
    leaves: Mapping[str, jax.typing.ArrayLike],
    *,
    num_kv_heads: int,
    num_image_heads: int,
    prefix: str = "",
    unused: bool = False,
) -> None:
    """Write parameters under the names of openpi's PyTorch model (`prefix="model."`: LeRobot's).

    The numbers of heads are kept in the header, because no tensor shape gives them. With `unused`,
    the action expert's unused output matrix is written too, as zeros, as openpi's class has it.
    """
    rules = {rule.parameter.path: rule for rule in layout.RULES}
    if unknown := sorted(set(leaves) - set(rules)):
        raise ValueError(f"{unknown} have no name in PyTorch: expected the leaves of a π0 or π0.5")
    if path.exists():
        raise FileExistsError(f"{path} already exists and is never overwritten: move it away")
    tensors = {}
    for leaf_path, leaf in leaves.items():
        rule, values = rules[leaf_path], np.asarray(leaf)
        for layer, of_layer in enumerate(values if rule.layered else values[None]):
            parts = of_layer if len(rule.names) > 1 else of_layer[None]
            for name, part in zip(rule.names, parts, strict=True):
                tensors[prefix + name.format(layer)] = rule.tensor(part)
    if unused:
        embedding = tensors[prefix + layout.EMBEDDING]
        width = np.shape(leaves["action_in_proj/bias"])[0]
        tensors[prefix + layout.UNUSED[1]] = np.zeros((len(embedding), width), embedding.dtype)
    heads = {"num_kv_heads": str(num_kv_heads), "num_image_heads": str(num_image_heads)}
    save(tensors, path, heads)


def save(
    tensors: dict[str, np.ndarray], path: pathlib.Path, header: Mapping[str, str] | None = None
) -> None:
    """Write contiguous tensors to a file that is readable by all users.

    Raises:
      OSError: it cannot be written.
    """
    try:
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt", **(header or {})})
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written ({run_folder.reason(error)})") from error
    path.chmod(0o644)  # Newer versions of safetensors make it readable by its owner only.
