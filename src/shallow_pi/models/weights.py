"""Parameters on disk in openpi's layout: read, write, compare, fetch.

A `params` folder is an Orbax PyTree checkpoint `{"params": tree}`; its paths are openpi's, so
checkpoints travel in both directions with no renaming. openpi's trainer writes every leaf one level
deeper, under a key "value"; it is stripped where all leaves have it. What comes from disk is
compared with the expected tree before a byte of it is read, and the error names every path.
"""

import os
import pathlib
import shutil
from collections.abc import Iterable
from typing import Any, cast

import fsspec
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from shallow_pi import progress

# Any pytree: nested dicts of arrays, of shapes or of shardings.
Tree = Any

LAYERS = "PaliGemma/llm/layers/"


def save_params(path: str | os.PathLike[str], params: Tree) -> None:
    """Write `params` as openpi's `params` folder, under a temporary name until it is complete."""
    folder = _absolute(path)
    if folder.exists():
        raise FileExistsError(
            f"{folder} already exists and a checkpoint is never overwritten: "
            "move it away or write to another folder"
        )
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(folder, {"params": params})


def load_params(
    path: str | os.PathLike[str],
    expected: Tree,
    *,
    dtype: Any = None,
    sharding: Tree | None = None,
    what: str = "teacher",
) -> Tree:
    """Read a `params` folder, or the step folder that holds it, and check it first.

    Args:
      path: `<step>/params` or `<step>`.
      expected: pytree of `jax.ShapeDtypeStruct`; its dtypes do not matter, floating or not does.
      dtype: floating leaves are cast to it while reading; None keeps what is stored.
      sharding: one sharding or a pytree of them like `expected`; None is the first local device.
      what: the word for these parameters in errors.
    """
    folder = params_folder(path)
    stored = _stored(folder)
    check_tree(expected, _plain(stored), f"{what} ({folder})")

    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(sharding, jax.sharding.Sharding):
        shardings = dict.fromkeys(leaves(expected), sharding)
    else:
        shardings = leaves(sharding)

    nested = _has_value_keys(stored)

    def restore_args(path: Any, leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
        cast_to = dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else None
        name = path_name(path[:-1] if nested else path)
        return ocp.ArrayRestoreArgs(
            restore_type=jax.Array, sharding=shardings[name], dtype=cast_to or leaf.dtype
        )

    args = {"params": jax.tree_util.tree_map_with_path(restore_args, stored)}
    item = jax.tree.map(lambda _: 0, args)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            read = checkpointer.restore(
                folder, args=ocp.args.PyTreeRestore(item=item, restore_args=args)
            )
    except Exception as error:  # Orbax raises whatever TensorStore did, bare Exception included.
        raise damaged(folder, error) from error
    # The tree has the caller's containers and order, whatever the file's were.
    found = leaves(_plain(read["params"]))
    return jax.tree_util.tree_map_with_path(lambda path, _: found[path_name(path)], expected)


def param_depth(path: str | os.PathLike[str]) -> int:
    """How many Gemma layers the checkpoint at `path` has, from its metadata."""
    folder = params_folder(path)
    depth = _depth(leaves(stored_params(folder)))
    if depth is None:
        raise ValueError(
            f"{folder} holds no {LAYERS}...: it is not a π0 or π0.5 checkpoint; "
            "give the folder of one, such as <step>/params"
        )
    return depth


def stored_shapes(folder: str | os.PathLike[str]) -> Tree:
    """Shapes and dtypes of an Orbax PyTree checkpoint, from its metadata alone."""
    folder = _absolute(folder)
    try:
        # The handler's answer, unlike a Checkpointer's, has one form in every Orbax we support.
        tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder)).tree
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    except Exception as error:  # Orbax raises whatever TensorStore did, bare Exception included.
        raise damaged(folder, error) from error


def stored_params(path: str | os.PathLike[str]) -> Tree:
    """Shapes and dtypes of the parameters in a `params` folder or its step folder."""
    return _plain(_stored(params_folder(path)))


def check_tree(expected: Tree, actual: Tree, what: str) -> None:
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


def leaves(tree: Tree) -> dict[str, Any]:
    """The leaves of a pytree by path, such as "PaliGemma/llm/embedder/input_embedding"."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def path_name(path: Iterable[Any]) -> str:
    """A key path of jax.tree_util as "a/b/0"."""
    names = []
    for key in path:
        name = getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))
        names.append(str(key if name is None else name))
    return "/".join(names)


def params_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """The `params` folder at or in `path`; an error that says what is there instead."""
    folder = _absolute(path)
    if (folder / "params").is_dir():
        folder = folder / "params"
    if not folder.is_dir():
        partial = sorted(folder.parent.glob(f"{folder.name}.orbax-checkpoint-tmp*"))
        found = f"; only {partial[0].name}, a save that never finished" if partial else ""
        raise FileNotFoundError(
            f"there is no checkpoint at {folder}{found}: give a step folder "
            "(…/<step>) or its params folder, and check the spelling"
        )
    if not (folder / "_METADATA").exists():
        inside = sorted(child.name for child in folder.iterdir())
        steps = [name for name in inside if name.isdigit()]
        if steps:
            last = max(steps, key=int)
            advice = f"it holds the steps {', '.join(steps)}: name one, such as {folder / last}"
        else:
            advice = f"it holds {inside or 'nothing'}: it was half written, copied or downloaded"
            advice += "; delete it and write or fetch it again"
        raise ValueError(f"{folder} is not a params folder (no _METADATA in it); {advice}")
    return folder


def locate(url: str | os.PathLike[str]) -> pathlib.Path:
    """The local path of a checkpoint or file; `gs://B/P` is downloaded once.

    Like openpi, `gs://B/P` is kept at `$OPENPI_DATA_HOME/B/P` (default `~/.cache/openpi`), so what
    either of the two has fetched serves both.
    """
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return pathlib.Path(text).expanduser()
    if scheme != "gs":
        raise ValueError(f"cannot fetch {text!r}: expected a local path or gs://<bucket>/<path>")
    home = pathlib.Path(os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")).expanduser()
    rest = rest.rstrip("/")
    target = home / rest
    if not target.exists():
        try:
            _download(rest, target)
        except Exception as error:  # No gcsfs, no network, no rights, no space: all end alike.
            raise FileNotFoundError(
                f"{text} is not at {target} and could not be downloaded "
                f"({type(error).__name__}: {error}). Downloading needs a network and gcsfs "
                f"(uv sync --extra gcs). Or fetch it on another machine with "
                f"`gsutil cp -r {text} .` and put it at {target}; "
                "OPENPI_DATA_HOME moves the folder"
            ) from error
    return target


def _download(source: str, target: pathlib.Path) -> None:
    """Copy a bucket's folder or file to `target`, complete or not at all."""
    filesystem = fsspec.filesystem("gs", token="anon")
    # gcsfs tries for a minute or two before it gives up.
    progress.console.print(f"Looking for gs://{source}", highlight=False)
    files = {
        name.lstrip("/"): entry["size"] or 0
        for name, entry in filesystem.find(source, detail=True).items()
        if not name.endswith("/")
    }
    if not files:
        raise FileNotFoundError(f"gs://{source} holds no files")
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    megabytes = [max(1, size >> 20) for size in files.values()]
    try:
        with progress.bar(f"Fetch {target.name}", total=sum(megabytes)) as advance:
            for name, size in zip(files, megabytes, strict=True):
                local = partial / name[len(source) :].lstrip("/")
                local.parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(name, str(local))
                advance(size, note="MB")
        partial.rename(target)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink(missing_ok=True)


def _stored(folder: pathlib.Path) -> Tree:
    tree = stored_shapes(folder)
    if not isinstance(tree, dict) or "params" not in tree:
        top = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(
            f'{folder} holds {top}, expected one entry "params": give the params folder of a step'
        )
    return tree["params"]


def _has_value_keys(tree: Tree) -> bool:
    paths = list(leaves(tree))
    return bool(paths) and all(path.endswith("/value") for path in paths)


def _plain(tree: Tree) -> Tree:
    """Without openpi's trailing "value" keys."""
    return _strip_value(tree) if _has_value_keys(tree) else tree


def _strip_value(tree: dict[str, Any]) -> Tree:
    if set(tree) == {"value"} and not isinstance(tree["value"], dict):
        return tree["value"]
    return {key: _strip_value(child) for key, child in tree.items()}


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _depth(flat: dict[str, Any]) -> int | None:
    return next((leaf.shape[0] for path, leaf in flat.items() if LAYERS in path), None)


def _hints(want: dict[str, Any], have: dict[str, Any]) -> list[str]:
    """The three usual mistakes, where the difference shows one of them."""

    def family(flat: dict[str, Any]) -> str | None:
        if any("time_mlp_in/" in path and "action_time" not in path for path in flat):
            return "π0.5"
        return "π0" if any("state_proj/" in path for path in flat) else None

    def action_dim(flat: dict[str, Any]) -> int | None:
        return next((x.shape[0] for p, x in flat.items() if "action_in_proj/kernel" in p), None)

    hints = []
    if family(want) and family(have) and family(want) != family(have):
        hints.append(
            f"this is a {family(have)} checkpoint and the config says {family(want)}: "
            f"set pi05={family(have) == 'π0.5'} or use the other checkpoint"
        )
    for name, of in (("layers", _depth), ("action dimensions", action_dim)):
        expected, found = of(want), of(have)
        if expected is not None and found is not None and expected != found:
            field = "depth" if name == "layers" else "action_dim"
            hints.append(
                f"the checkpoint has {found} {name}, the config {expected}: set {field}={found} "
                "or use the other checkpoint"
            )
    return hints


def damaged(folder: pathlib.Path, error: Exception) -> Exception:
    """The error to raise for a checkpoint that cannot be read because of `error`."""
    if not folder.exists():
        return FileNotFoundError(f"there is no checkpoint at {folder}")
    first_line = next(iter(str(error).splitlines()), "")[:300]
    return ValueError(
        f"{folder} could not be read ({type(error).__name__}: {first_line}). If it was copied or "
        "downloaded, it is probably truncated: delete it and fetch it again; a run continues "
        "from its previous step folder"
    )


def _absolute(path: str | os.PathLike[str]) -> pathlib.Path:
    """Orbax wants absolute paths."""
    return pathlib.Path(cast(str, path)).expanduser().absolute()
