"""Download of checkpoints and files by address: a local path, `gs://` or `hf://`.

`gs://B/P` is cached at `$OPENPI_DATA_HOME/B/P` (default `~/.cache/openpi`), in openpi's layout and
under openpi's lock, so that both share their downloads. Files are downloaded block by block to a
temporary name beside their place, and renamed when every size is right: a download is complete or
absent, and an interrupted one resumes. A folder of which only a part was requested is marked
(`<folder>.incomplete`) until all of it is downloaded. `hf://owner/repo[@revision][/path]` is left
to huggingface_hub, which caches (`HF_HOME`), locks and resumes by itself.
"""

import base64
import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import fsspec

from shallow_pi import progress, suggestions, user_cache

# Bytes of a request: the most that an interruption loses.
BLOCK = 32 * 2**20
# Files of the hub downloaded at once.
_DOWNLOADS = 8
# First bytes of the text that Git LFS leaves in a file's place.
_LFS = b"version https://git-lfs"


def locate(url: str | os.PathLike[str], *, filesystem: Any = None) -> pathlib.Path:
    """The local path of a checkpoint, dataset or file, downloaded first if necessary.

    Args:
      url: a local path, `gs://<bucket>/<path>` or `hf://<owner>/<repo>[@<revision>][/<path>]`.
      filesystem: the fsspec file system for `gs://` addresses; None reads public buckets
        anonymously.

    Raises:
      FileNotFoundError: the download failed; says what was tried, and where to put the files by
        hand.
      OSError: the cache folder is not writable.
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
    page = rest.removeprefix("huggingface.co/")
    raise ValueError(
        f"cannot fetch {text!r}: expected a local path, gs://<bucket>/<path> or "
        "hf://<owner>/<repo>[@<revision>][/<path>]"
        + (f", here hf://{page.replace('/tree/', '@', 1)}" if page != rest else "")
    )


def advice(absent: pathlib.Path) -> str:
    """The step, name or address that may be meant by a local path where nothing is; or nothing."""
    if found := nearby(absent):
        return found
    with contextlib.suppress(ValueError):
        parts = absent.relative_to(pathlib.Path.cwd()).parts
        if parts and parts[0] in ("gs:", "hf:"):
            return f"; an address has two slashes: {parts[0]}//{'/'.join(parts[1:])}"
        if len(parts) == 2:
            return f"; a repository of the Hugging Face hub is hf://{'/'.join(parts)}"
    return ""


def nearby(absent: pathlib.Path) -> str:
    """The folder that may be meant by a path where nothing is, or why it is absent; or nothing."""
    for path in (absent, *absent.parents):
        if path.is_symlink() and not path.exists():
            return f"; {path} is a link to {path.readlink()}, which is absent: is its disk mounted?"
    if windows := re.search(r"(?:^|/)([A-Za-z]):[\\/](.*)", str(absent)):
        rest = windows[2].replace("\\", "/")
        return f"; under WSL, Windows' disks are in /mnt: /mnt/{windows[1].lower()}/{rest}"
    with contextlib.suppress(OSError):
        beside = [child.name for child in absent.parent.iterdir() if child.is_dir()]
        steps = sorted(filter(str.isdigit, beside), key=int)
        if absent.name.isdigit() and steps:
            return f"; {absent.parent} has the steps {', '.join(steps)}"
        return suggestions.closest(absent.name, beside)
    return ""


def lfs_advice(path: str | os.PathLike[str]) -> str:
    """Advice for an unreadable file that Git LFS has not fetched, or a folder with one; or nothing.

    It continues the sentence of an error.
    """
    path = pathlib.Path(path)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        with contextlib.suppress(OSError), file.open("rb") as opened:
            if opened.read(len(_LFS)) == _LFS:
                where = "it" if file == path else file
                return f"; {where} is a Git LFS pointer, not the file: run `git lfs pull`"
    return ""


def kept(url: str | os.PathLike[str]) -> pathlib.Path | None:
    """The local path if the files are there already; None if not, and for every hf:// address."""
    scheme, separator, rest = os.fspath(url).partition("://")
    if not separator:
        path = pathlib.Path(url).expanduser()
        return path if path.exists() else None
    target = _home() / rest.strip("/")
    return target if scheme == "gs" and _is_whole(target) else None


def _home() -> pathlib.Path:
    return user_cache.chosen("OPENPI_DATA_HOME", "~/.cache/openpi")


def _from_bucket(source: str, filesystem: Any) -> pathlib.Path:
    home = _home()
    target = home / source
    if _is_whole(target):
        return target
    import filelock  # Imported here: a machine that times inference may lack it.

    # openpi's name for it, so that neither disturbs the other.
    lock = filelock.FileLock(target.with_suffix(".lock"))
    try:
        _make_parents(target, home)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            progress.say(f"Another process is downloading {target}: waiting")
            lock.acquire()
    except OSError as error:
        raise OSError(
            f"cannot write {target}, the cache of gs://{source} "
            f"({type(error).__name__}: {error}): make the folder writable, or set "
            "OPENPI_DATA_HOME to one that is"
        ) from error
    partial = target.with_name(f"{target.name}.unfinished")
    try:
        if not _is_whole(target):
            if target.is_dir():  # A part of it that was downloaded before.
                shutil.copytree(target, partial, dirs_exist_ok=True)
            _download(source, partial, filesystem)
            if target.is_dir():
                part = target.with_name(f"{target.name}.part")
                shutil.rmtree(part, ignore_errors=True)  # Of a process killed while removing it.
                target.rename(part)
                partial.rename(target)
                shutil.rmtree(part)
            else:
                partial.rename(target)
            _marker(target).unlink(missing_ok=True)
    except Exception as error:  # No gcsfs, no network, no rights, no space: all end alike.
        kept = f"\nthe partial download in {partial} is kept, and the next try resumes it"
        raise FileNotFoundError(
            f"gs://{source} is not at {target} and could not be downloaded "
            f"({type(error).__name__}: {error}){kept if partial.exists() else ''}\n"
            "give this machine a network and gcsfs (uv sync --extra gcs); OPENPI_DATA_HOME moves "
            "the cache\n"
            f"or run `gsutil cp -r gs://{source} .` on another machine and put it at {target}"
        ) from error
    finally:
        lock.release()
    return target


def _marker(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f"{folder.name}.incomplete")


def _is_whole(target: pathlib.Path) -> bool:
    return target.exists() and not _marker(target).exists()


def _make_parents(target: pathlib.Path, home: pathlib.Path) -> None:
    """Make the folders above `target`, each marked as incomplete."""
    above = [folder for folder in target.parents if home in folder.parents]
    for folder in reversed(above):
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            _marker(folder).touch()
            folder.mkdir(exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)


def _download(source: str, partial: pathlib.Path, filesystem: Any) -> None:
    """Copy a folder or file of a bucket to `partial`, keeping the blocks that are there already."""
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
    """Make the file, or cut a partial one to whole blocks, which certainly arrived."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    have = file.stat().st_size
    if have != size:
        os.truncate(file, have // BLOCK * BLOCK if have < size else 0)


def _check(file: pathlib.Path, entry: Mapping[str, str]) -> None:
    """Compare a file with the bucket's MD5; objects that were uploaded in parts have none."""
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
    """The cached folder of a repository of the Hugging Face hub, downloaded if necessary.

    Args:
      repo: `owner/name`.
      revision: branch, tag or commit; None is the newest.
      patterns: the files to download; None is all.
      kind: kind of the repository; empty is a model.
      part: the requested folder or file of it, for error messages.

    Raises:
      FileNotFoundError: the download failed; says what was tried, and how to fetch it by hand.
    """
    options: dict[str, object] = {"repo_type": kind} if kind else {}
    with _named(repo, revision, kind, part):
        import huggingface_hub

        found = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=patterns and list(patterns), **options
        )
    return pathlib.Path(found)


def files(
    repo: str, revision: str | None, names: Sequence[str], *, kind: Literal["", "dataset"] = ""
) -> None:
    """Download these files of a repository into the hub's cache, without listing the others.

    Raises:
      FileNotFoundError: a download failed; says what was tried, and how to fetch it by hand.
    """
    options: dict[str, object] = {"repo_type": kind} if kind else {}
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
    """Raise any error of the hub's client as one that says what was tried and what to do."""
    try:
        yield
    except Exception as error:  # Not installed, no network, no rights, no such repository.
        what = f" --repo-type {kind}" if kind else ""
        version = "" if revision is None else f" --revision {revision}"
        include = f" --include '{part}' '{part}/*'" if part else ""
        raise FileNotFoundError(
            f"the {kind or 'model'} {repo} could not be downloaded from the Hugging Face hub, and "
            f"is no folder here ({type(error).__name__}: {error})\n"
            "huggingface_hub (uv sync --extra hf) looked in its cache (HF_HOME) and on the "
            "network\n"
            f"or run `hf download {repo}{what}{version}{include} --local-dir DIR` on another "
            f"machine, copy DIR here, and give DIR{'/' + part if part else ''} as the path"
        ) from error
