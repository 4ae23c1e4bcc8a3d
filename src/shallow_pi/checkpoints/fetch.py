"""Checkpoints and files by address: a local path, `gs://` or `hf://`; fetched once and kept.

`gs://B/P` is kept at `$OPENPI_DATA_HOME/B/P` (default `~/.cache/openpi`), as openpi keeps it and
under openpi's own lock, so what either has fetched serves both. A download is made beside its
place, file by file and block by block, and renamed when every size is right: it is complete or
absent, and one that was interrupted goes on where it stopped. A folder of which only a part was
asked for is marked (`<folder>.incomplete`) until all of it is fetched. `hf://owner/repo[@revision][/path]`
is left to huggingface_hub, which caches (`HF_HOME`), locks and resumes by itself.
"""

import base64
import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import fsspec

from shallow_pi import progress

# Bytes asked for at once: what an interruption loses at most.
BLOCK = 32 * 2**20
# Files of the hub fetched at once.
_DOWNLOADS = 8


def locate(url: str | os.PathLike[str], *, filesystem: Any = None) -> pathlib.Path:
    """The local path of a checkpoint, dataset or file, fetched first where it has to be.

    Args:
      url: a local path, `gs://<bucket>/<path>` or `hf://<owner>/<repo>[@<revision>][/<path>]`.
      filesystem: the fsspec file system a `gs://` address is read through; None is the public
        bucket, anonymously.

    Raises:
      FileNotFoundError: it cannot be fetched; says what was tried and where to put it by hand.
      OSError: there is no place to keep it.
      ValueError: an address of another kind.
    """
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return pathlib.Path(text).expanduser()
    if scheme == "gs":
        return _from_bucket(rest.strip("/"), filesystem)
    if scheme == "hf":
        return _from_hub(text, rest.strip("/"))
    raise ValueError(
        f"cannot fetch {text!r}: expected a local path, gs://<bucket>/<path> or "
        "hf://<owner>/<repo>[@<revision>][/<path>]"
    )


def kept(url: str | os.PathLike[str]) -> pathlib.Path | None:
    """Where `locate` would find it without fetching anything; None if it is not there, or hf://."""
    scheme, separator, rest = os.fspath(url).partition("://")
    if not separator:
        path = pathlib.Path(url).expanduser()
        return path if path.exists() else None
    target = _home() / rest.strip("/")
    return target if scheme == "gs" and _is_whole(target) else None


def _home() -> pathlib.Path:
    return pathlib.Path(os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")).expanduser()


def _from_bucket(source: str, filesystem: Any) -> pathlib.Path:
    home = _home()
    target = home / source
    if _is_whole(target):
        return target
    import filelock  # Here alone: a machine that times inference may lack it.

    # openpi's name for it, so that neither disturbs the other.
    lock = filelock.FileLock(target.with_suffix(".lock"))
    try:
        _make_parents(target, home)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            progress.console.print(f"Another process fetches {target}: waiting", highlight=False)
            lock.acquire()
    except OSError as error:
        raise OSError(
            f"gs://{source} is to be kept at {target}, where nothing can be written "
            f"({type(error).__name__}: {error}): make the folder writable, or set "
            "OPENPI_DATA_HOME to one that is"
        ) from error
    partial = target.with_name(f"{target.name}.unfinished")
    try:
        if not _is_whole(target):
            if target.is_dir():  # What was fetched of it alone.
                shutil.copytree(target, partial, dirs_exist_ok=True)
            _download(source, partial, filesystem)
            if target.is_dir():
                part = target.rename(target.with_name(f"{target.name}.part"))
                partial.rename(target)
                shutil.rmtree(part)
            else:
                partial.rename(target)
            _marker(target).unlink(missing_ok=True)
    except Exception as error:  # No gcsfs, no network, no rights, no space: all end alike.
        kept = f" What came so far is kept in {partial}, and the next try goes on from there."
        raise FileNotFoundError(
            f"gs://{source} is not at {target} and could not be downloaded "
            f"({type(error).__name__}: {error}).{kept if partial.exists() else ''} Downloading "
            "needs a network and gcsfs (uv sync --extra gcs). Or fetch it on another machine with "
            f"`gsutil cp -r gs://{source} .` and put it at {target}; "
            "OPENPI_DATA_HOME moves the folder"
        ) from error
    finally:
        lock.release()
    return target


def _marker(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f"{folder.name}.incomplete")


def _is_whole(target: pathlib.Path) -> bool:
    return target.exists() and not _marker(target).exists()


def _make_parents(target: pathlib.Path, home: pathlib.Path) -> None:
    """Make the folders above `target`; they hold a part of what they stand for."""
    above = [folder for folder in target.parents if home in folder.parents]
    for folder in reversed(above):
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            _marker(folder).touch()
            folder.mkdir(exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)


def _download(source: str, partial: pathlib.Path, filesystem: Any) -> None:
    """Copy a bucket's folder or file to `partial`, keeping what is there already."""
    # gcsfs tries for a minute or two before it gives up.
    progress.console.print(f"Looking for gs://{source}", highlight=False)
    if filesystem is None:
        filesystem = fsspec.filesystem("gs", token="anon")
    files = {
        name.lstrip("/"): entry
        for name, entry in filesystem.find(source, detail=True).items()
        if not name.endswith("/")
    }
    if not files:
        raise FileNotFoundError(f"gs://{source} holds no files")
    local = {name: partial / name[len(source) :].lstrip("/") for name in files}
    for stale in set(partial.rglob("*")) - set(local.values()):
        if stale.is_file():
            stale.unlink()
    sizes = {name: entry["size"] or 0 for name, entry in files.items()}
    for name, file in local.items():
        _keep_whole_blocks(file, sizes[name])
    done = sum(file.stat().st_size for file in local.values())
    total = sum(sizes.values())
    with progress.bar(f"Fetch {source.rpartition('/')[2]}", total >> 20, done >> 20) as advance:
        for name, file in local.items():
            with file.open("ab") as out:
                while (start := out.tell()) < sizes[name]:
                    end = min(start + BLOCK, sizes[name])
                    out.write(filesystem.cat_file(name, start=start, end=end))
                    out.flush()
                    if out.tell() != end:
                        raise OSError(f"{name} ended at byte {out.tell()} of {sizes[name]}")
                    before, done = done, done + end - start
                    advance((done >> 20) - (before >> 20), note="MB")
            _check(file, files[name])


def _keep_whole_blocks(file: pathlib.Path, size: int) -> None:
    """Make the file, or cut it to what certainly arrived: all of it, or whole blocks."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    have = file.stat().st_size
    if have != size:
        os.truncate(file, have // BLOCK * BLOCK if have < size else 0)


def _check(file: pathlib.Path, entry: dict[str, Any]) -> None:
    """Compare with the bucket's MD5; objects that were uploaded in parts have none."""
    if "md5Hash" not in entry:
        return
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "md5").digest()
    if digest != base64.b64decode(entry["md5Hash"]):
        file.unlink()
        raise OSError(f"{file.name} arrived damaged (its MD5 is not the bucket's) and was removed")


def _from_hub(url: str, rest: str) -> pathlib.Path:
    match = re.fullmatch(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<path>.+))?", rest)
    if match is None:
        raise ValueError(
            f"{url!r} is no address on the Hugging Face hub: expected "
            "hf://<owner>/<repo>[@<revision>][/<path>], such as hf://lerobot/pi05_base"
        )
    repo, revision, path = match["repo"], match["revision"], match["path"]
    patterns = None if path is None else [path, f"{path}/*"]
    target = snapshot(repo, revision, patterns, part=path or "") / (path or "")
    if not target.exists():
        raise FileNotFoundError(f"{repo} has no {path!r}: look at the files of that repository")
    return target


def snapshot(
    repo: str,
    revision: str | None,
    patterns: Sequence[str] | None,
    *,
    kind: Literal["", "dataset"] = "",
    part: str = "",
) -> pathlib.Path:
    """The folder of a repository of the Hugging Face hub, by way of its cache.

    Args:
      repo: `owner/name`.
      revision: branch, tag or commit; None is the newest.
      patterns: of the files that are needed; None is all.
      kind: of the repository; empty is a model.
      part: the folder or file of it that was asked for, for the message.

    Raises:
      FileNotFoundError: it cannot be fetched; says what was tried and how to fetch it by hand.
    """
    options: dict[str, Any] = {"repo_type": kind} if kind else {}
    with _named(repo, revision, kind, part):
        import huggingface_hub

        found = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns and list(patterns), **options
        )
    return pathlib.Path(found)


def files(
    repo: str, revision: str | None, names: Sequence[str], *, kind: Literal["", "dataset"] = ""
) -> None:
    """Fetch these files of a repository of the hub into its cache, without listing the others.

    Raises:
      FileNotFoundError: one cannot be fetched; says what was tried and how to fetch it by hand.
    """
    options: dict[str, Any] = {"repo_type": kind} if kind else {}
    with _named(repo, revision, kind, ""):
        import huggingface_hub

        def get(name: str) -> None:
            huggingface_hub.hf_hub_download(repo, name, revision=revision, **options)

        with (
            progress.bar("Fetch files", len(names)) as advance,
            concurrent.futures.ThreadPoolExecutor(_DOWNLOADS) as pool,
        ):
            try:
                for _ in pool.map(get, names):
                    advance(1)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def _named(repo: str, revision: str | None, kind: str, part: str) -> Iterator[None]:
    """Say of any error of the hub's client what was tried, and how to fetch it by hand."""
    try:
        yield
    except Exception as error:  # Not installed, no network, no rights, no such repository.
        what = f" --repo-type {kind}" if kind else ""
        version = "" if revision is None else f" --revision {revision}"
        include = f" --include '{part}' '{part}/*'" if part else ""
        raise FileNotFoundError(
            f"the {kind or 'model'} {repo} could not be fetched from the Hugging Face hub, and "
            f"there is no such folder here ({type(error).__name__}: {error}). It was looked for "
            "with huggingface_hub (uv sync --extra hf), in its cache (HF_HOME) and on the network. "
            f"Or fetch it on another machine with `hf download {repo}{what}{version}{include} "
            f"--local-dir DIR`, copy DIR here, and give DIR{'/' + part if part else ''} as the path"
        ) from error
