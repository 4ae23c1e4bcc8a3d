"""Parameters on disk in openpi's layout: read, write, compare.

A `params` folder is an Orbax PyTree checkpoint `{"params": tree}`; its paths are openpi's, so
checkpoints need no renaming in either direction. openpi's trainer writes every leaf one level
deeper, under a key "value", which is stripped if all leaves have it. LoRA adapters are merged into
their matrices, and a PyTorch checkpoint (`model.safetensors`) is read as the same tree. A
checkpoint is compared with the expected tree before any data are read, and the error names every
path; each shard goes straight to its device.
"""

import contextlib
import errno
import glob
import hashlib
import math
import os
import pathlib
import re
from collections.abc import Iterable
from typing import Any, cast

import flax.traverse_util
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, PyTree

from shallow_pi.checkpoints import fetch, lora, orbax_noise, run_folder, safetensors_file
from shallow_pi.models import parameters

# Host memory for reading a checkpoint, in 10⁹ bytes; a larger parameter is read alone.
HOST_GB = 2
# Pieces of a large file that `digest` reads, and bytes of each.
SAMPLES, SAMPLE = 16, 65_536
# Where TensorStore says which array it could not read.
_UNREAD = re.compile(r'"([^"]+)/[^"/]*" in OCDBT database')
# A parameter, or its shape.
Leaf = Array | jax.ShapeDtypeStruct


def save_params(path: str | os.PathLike[str], params: PyTree) -> None:
    """Write `params` as openpi's `params` folder, under a temporary name until it is complete.

    Raises:
      FileExistsError: the folder is there.
      OSError: it cannot be written.
    """
    folder = _absolute(path)
    run_folder.check_name(folder)
    if folder.exists():
        raise FileExistsError(
            f"{folder} already exists and a checkpoint is never overwritten: "
            "move it away or write to another folder"
        )
    orbax_noise.silence()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder, {"params": params})
    except Exception as error:  # Orbax raises whatever TensorStore did, bare Exception included.
        raise OSError(f"{folder} cannot be written ({run_folder.reason(error)})") from error
    # Orbax's note that the folder is complete names its path on this machine; nobody reads it.
    (folder / "commit_success.txt").unlink(missing_ok=True)


def load_params(
    path: str | os.PathLike[str],
    expected: PyTree,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    sharding: PyTree | None = None,
    what: str = "teacher",
) -> PyTree:
    """Check and read a `params` folder, the step folder that holds it, or a safetensors file.

    Args:
      path: `<step>/params`, `<step>`, `model.safetensors` or its folder.
      expected: pytree of `jax.ShapeDtypeStruct`; of the dtypes only floating or not is compared.
      dtype: dtype that floating leaves are cast to while reading; None keeps the stored one, except
        that a matrix with a LoRA adapter becomes float32.
      sharding: one sharding, or a pytree of them like `expected`; None is the first local device.
      what: name of these parameters in errors.
    """
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(sharding, jax.sharding.Sharding):
        shardings = dict.fromkeys(leaves(expected), sharding)
    else:
        shardings = leaves(sharding)

    if (file := safetensors_file.find(path)) is not None:
        opened = safetensors_file.File(file)
        check_tree(expected, opened.shapes(), f"{what} ({file})")
        found = opened.read(shardings, dtype)
    else:
        folder = params_folder(path)
        stored = _stored(folder)
        merged = _merged(_plain(stored), folder)
        check_tree(expected, merged, f"{what} ({folder})")
        found = _restore(folder, stored, shardings, dtype)
    # The tree has the containers and order of `expected`, not the file's.
    return jax.tree_util.tree_map_with_path(lambda path, _: found[path_name(path)], expected)


def _restore(
    folder: pathlib.Path,
    stored: PyTree,
    shardings: dict[str, jax.sharding.Sharding],
    dtype: jax.typing.DTypeLike | None,
) -> dict[str, jax.Array]:
    """Every parameter of a checked `params` folder by path, on its devices."""
    nested = _has_value_keys(stored)
    adapters = lora.adapters(leaves(_plain(stored)))
    # An adapter is small: it is replicated over the devices of its matrix.
    factors = {path: base for base, pair in adapters.items() for path in pair}

    def restore_args(path: tuple[object, ...], leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
        name = path_name(path[:-1] if nested else path)
        cast_to = dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else None
        if name in adapters or name in factors:
            cast_to = None  # Rounded once, after merging.
        where = _replicated(shardings[factors[name]]) if name in factors else shardings[name]
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array, sharding=where, dtype=cast_to or leaf.dtype
        )

    args = {"params": jax.tree_util.tree_map_with_path(restore_args, stored)}
    item = jax.tree.map(lambda _: 0, args)
    try:
        # Without a limit Orbax reads everything before casting: a full copy in host memory.
        largest = max(
            math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(stored)
        )
        handler = ocp.PyTreeCheckpointHandler(
            restore_concurrent_gb=max(HOST_GB, -(-largest // 10**9))
        )
        # A Checkpointer would wait for every process of the job; one may read a policy alone.
        with contextlib.closing(handler):
            read = handler.restore(
                epath.Path(folder), args=ocp.args.PyTreeRestore(item=item, restore_args=args)
            )
    except Exception as error:  # Orbax raises whatever TensorStore did, bare Exception included.
        raise damaged(folder, error) from error
    found = leaves(_plain(read["params"]))
    for base, pair in adapters.items():
        found[base] = _merge(
            base, dtype or jnp.float32, shardings[base], found[base], *(found.pop(p) for p in pair)
        )
    return found


def _merge(
    path: str,
    dtype: jax.typing.DTypeLike,
    where: jax.sharding.Sharding,
    w: jax.Array,
    a: jax.Array,
    b: jax.Array,
) -> jax.Array:
    """The sum of a matrix and its adapter, on the devices of the matrix."""
    merge = jax.jit(lambda *given: lora.merge(path, *given).astype(dtype), out_shardings=where)
    return merge(w, a, b)


def _replicated(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


def stored_shapes(folder: str | os.PathLike[str]) -> PyTree:
    """Shapes and dtypes of an Orbax PyTree checkpoint, read from its metadata."""
    folder = _absolute(folder)
    orbax_noise.silence()
    try:
        # The handler's answer, unlike a Checkpointer's, has one form in every Orbax we support.
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder)).tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    except Exception as error:  # Orbax raises whatever TensorStore did, bare Exception included.
        raise damaged(folder, error) from error


def stored_params(path: str | os.PathLike[str]) -> PyTree:
    """Shapes and dtypes of the parameters at `path`, any path that `load_params` reads."""
    if (file := safetensors_file.find(path)) is not None:
        shapes = safetensors_file.File(file).shapes()
    else:
        folder = params_folder(path)
        shapes = _merged(_plain(_stored(folder)), folder)
    return flax.traverse_util.unflatten_dict(shapes, sep="/")


def check_tree(expected: PyTree, actual: PyTree, what: str) -> None:
    """Raise a ValueError that names every missing, extra and misshapen path."""
    want, have = leaves(expected), leaves(actual)
    missing = [f"missing {path} {want[path].shape}" for path in want if path not in have]
    extra = [f"extra {path} {have[path].shape}" for path in have if path not in want]
    wrong = []
    for path in want:
        if path not in have:
            continue
        if tuple(want[path].shape) != tuple(have[path].shape):
            wrong.append(f"shape {path}: expected {want[path].shape}, found {have[path].shape}")
        elif _is_float(want[path]) != _is_float(have[path]):
            wrong.append(f"dtype {path}: expected {want[path].dtype}, found {have[path].dtype}")
    problems = [*missing, *extra, *wrong]
    if problems:
        lines = [f"{what} does not have the expected parameters ({len(problems)} differ):"]
        lines += [f"  {problem}" for problem in problems]
        lines += [f"hint: {hint}" for hint in _hints(want, have)]
        raise ValueError("\n".join(lines))


def leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a pytree by path, such as "PaliGemma/llm/embedder/input_embedding"."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def path_name(path: Iterable[object]) -> str:
    """A key path of jax.tree_util as "a/b/0"."""
    names = []
    for key in path:
        name = getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))
        names.append(str(key if name is None else name))
    return "/".join(names)


def step_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of a checkpoint that holds its assets too, from its path or that of its weights.

    LeRobot's checkpoints have it inside, as `pretrained_model`.
    """
    folder = pathlib.Path(path)
    is_params = folder.name == run_folder.PARAMS and not (folder / run_folder.PARAMS).is_dir()
    if is_params or folder.name in (safetensors_file.NAME, safetensors_file.INDEX):
        folder = folder.parent
    inside = folder / "pretrained_model"
    return inside if inside.is_dir() else folder


def params_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """The `params` folder at or in `path`.

    Raises:
      FileNotFoundError, ValueError: there is none; says what is there instead.
    """
    folder = _absolute(path)
    if (folder / run_folder.PARAMS).is_dir():
        folder = folder / run_folder.PARAMS
    if not folder.is_dir():
        begun = f"{glob.escape(folder.name)}.orbax-checkpoint-tmp*"
        partial = sorted(folder.parent.glob(begun))
        found = f"; only {partial[0].name}, a save that never finished" if partial else ""
        raise FileNotFoundError(
            f"there is no checkpoint at {folder}{found}: give a step folder "
            f"(…/<step>) or its params folder, and check the spelling{fetch.advice(folder)}"
        )
    if not (folder / "_METADATA").exists():
        inside = sorted(child.name for child in folder.iterdir())
        steps = [name for name in inside if name.isdigit()]
        runs = [
            name
            for name in inside  # openpi's runs have steps and no config.
            if (folder / name / run_folder.CONFIG_FILE).is_file()
            or any(child.name.isdigit() for child in (folder / name).glob("*"))
        ]
        if (folder / "checkpoints" / "last").is_dir():
            advice = f"it is a run of LeRobot's: name {folder / 'checkpoints' / 'last'}"
        elif runs:
            advice = f"it holds the runs {', '.join(runs)}: name one, such as {folder / runs[0]}"
        elif steps:
            last = max(steps, key=int)
            advice = f"it holds the steps {', '.join(steps)}: name one, such as {folder / last}"
        elif any(name.endswith((".onnx", ".stablehlo")) for name in inside):
            advice = (
                "it is an export as graphs, which run as its README.md says: give the step folder "
                "that was exported"
            )
        elif "adapter_model.safetensors" in inside:
            advice = (
                "it holds an adapter of PEFT's without the model: merge it with the code that "
                "trained it (merge_and_unload), and save the sum"
            )
        elif pickled := [name for name in inside if name.endswith((".pt", ".pth", ".bin"))]:
            advice = (
                f"PyTorch's own files ({', '.join(pickled[:3])}) are not read, because they may "
                f"hold any code: save the weights as {safetensors_file.NAME} (safetensors.torch)"
            )
        else:
            some = ", ".join(inside[:8]) + (" ..." if len(inside) > 8 else "")
            advice = (
                f"it holds {some or 'nothing'}. A checkpoint without its parameters was written, "
                "copied or downloaded in part: write or download it again"
            )
        raise ValueError(f"{folder} holds no parameters (no _METADATA in it); {advice}")
    return folder


def digest(path: str | os.PathLike[str]) -> str:
    """A short hash that tells the parameters in a folder from others that were there before.

    It reads whole files up to 1 MiB, and pieces of larger ones.
    """
    single = safetensors_file.find(path)
    folder = params_folder(path) if single is None else single.parent
    inside = folder.rglob("*") if single is None else folder.glob("*.safetensors")
    found = hashlib.sha256()
    for file in sorted(one for one in inside if one.is_file()):
        size = file.stat().st_size
        found.update(f"{file.relative_to(folder)} {size} ".encode())
        with file.open("rb") as opened:
            for start in range(0, size, max(SAMPLE, size // SAMPLES)):
                opened.seek(start)
                found.update(opened.read(SAMPLE))
    return found.hexdigest()[:10]


def _stored(folder: pathlib.Path) -> PyTree:
    tree = stored_shapes(folder)
    if not isinstance(tree, dict) or "params" not in tree:
        top = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(
            f'{folder} holds {top}, expected one entry "params": give the params folder of a step'
        )
    return tree["params"]


def _merged(plain: PyTree, folder: pathlib.Path) -> dict[str, Any]:
    """The leaves by path without adapters, after a check that these can be merged.

    Raises:
      ValueError: adapters that cannot be merged, or no action expert (π0-FAST).
    """
    flat = leaves(plain)
    backbone = f"{parameters.LAYERS}/attn/q_einsum/w"
    if backbone in flat and not any(path.startswith("action_in_proj/") for path in flat):
        raise ValueError(
            f"{folder} is a π0-FAST checkpoint: it has no action expert; give one of π0 or π0.5, "
            "such as gs://openpi-assets/checkpoints/pi0_base"
        )
    try:
        lora.adapters(flat)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return {path: leaf for path, leaf in flat.items() if not lora.is_adapter(path)}


def _has_value_keys(tree: PyTree) -> bool:
    paths = list(leaves(tree))
    return bool(paths) and all(path.endswith("/value") for path in paths)


def _plain(tree: PyTree) -> PyTree:
    """The tree without openpi's trailing "value" keys."""
    return _strip_value(tree) if _has_value_keys(tree) else tree


def _strip_value(tree: dict[str, PyTree]) -> PyTree:
    if set(tree) == {"value"} and not isinstance(tree["value"], dict):
        return tree["value"]
    return {key: _strip_value(child) for key, child in tree.items()}


def _is_float(leaf: Leaf) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _depth(flat: dict[str, Leaf]) -> int | None:
    return next(
        (leaf.shape[0] for path, leaf in flat.items() if parameters.stack(path) == "layers"), None
    )


def _hints(want: dict[str, Leaf], have: dict[str, Leaf]) -> list[str]:
    """Advice for three usual mistakes that explain the differences."""

    def family(flat: dict[str, Leaf]) -> str | None:
        if any("time_mlp_in/" in path and "action_time" not in path for path in flat):
            return "π0.5"
        return "π0" if any("state_proj/" in path for path in flat) else None

    def action_dim(flat: dict[str, Leaf]) -> int | None:
        return next((x.shape[0] for p, x in flat.items() if "action_in_proj/kernel" in p), None)

    hints = []
    if family(want) and family(have) and family(want) != family(have):
        hints.append(
            f"this is a {family(have)} checkpoint and the config says {family(want)}: "
            f"use the other checkpoint, or a config of {family(have)} "
            f"(--model.{'' if family(have) == 'π0.5' else 'no-'}pi05)"
        )
    for name, of in (("layers", _depth), ("action dimensions", action_dim)):
        expected, found = of(want), of(have)
        if expected is not None and found is not None and expected != found:
            flag = "--model.depth" if name == "layers" else "--model.action-dim"
            hints.append(
                f"the checkpoint has {found} {name}, the config {expected}: give {flag} {found}, "
                "or use the other checkpoint"
            )
    return hints


class DamagedError(ValueError):
    """A checkpoint cannot be read."""


def damaged(folder: pathlib.Path, error: Exception) -> Exception:
    """The error to raise for a checkpoint that `error` prevented from being read."""
    if not folder.exists():
        return FileNotFoundError(f"there is no checkpoint at {folder}")
    first: BaseException = error
    while first.__cause__ is not None:
        first = first.__cause__
    if (denied := os.strerror(errno.EACCES)) in str(first):
        return PermissionError(f"{folder} could not be read ({denied}): make it readable")
    # Orbax's text is a page of TensorStore's settings; its cause names the array.
    if (array := _UNREAD.search(str(first))) is not None:
        name = array[1].removeprefix("params.").replace(".", "/")
        why = f"a file in it is missing or cut short, and with it {name}"
    else:
        why = f"{type(first).__name__}: {next(iter(str(first).splitlines()), '')[:300]}"
    advice = fetch.lfs_advice(folder) or (
        ". If it was copied or downloaded, it is probably truncated: fetch it again"
    )
    return DamagedError(f"{folder} could not be read ({why}){advice}")


def _absolute(path: str | os.PathLike[str]) -> pathlib.Path:
    """The absolute path, which Orbax needs."""
    return pathlib.Path(cast(str, path)).expanduser().absolute()
