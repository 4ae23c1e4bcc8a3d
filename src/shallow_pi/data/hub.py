"""Datasets by address: a local folder, or a dataset of the Hugging Face hub, needed files only.

`owner/name[@revision]` (also written `hf://datasets/owner/name[@revision]`) is left to
huggingface_hub, which caches (`HF_HOME`), locks and resumes by itself. The meta files come first;
they say which data files and videos the chosen episodes and cameras need. A revision that moves
(`main`) is pinned to its commit between the two, and the commit is told.
"""

import os
import pathlib
import re
from collections.abc import Collection

from shallow_pi import progress
from shallow_pi.data import lerobot_layout

_ADDRESS = re.compile(r"(hf://datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def locate(
    path: str | os.PathLike[str],
    *,
    episodes: Collection[int] | None = None,
    cameras: Collection[str] | None = None,
) -> pathlib.Path:
    """The local folder of a dataset, fetched first where it has to be.

    Args:
      path: a local folder, or an address on the hub.
      episodes: whose files are needed; None is all.
      cameras: whose videos are needed; None is all.

    Raises:
      FileNotFoundError: it is neither; says what was tried and how to fetch it by hand.
      ValueError: a dataset of a version that cannot be read.
    """
    text = os.fspath(path)
    local = pathlib.Path(text).expanduser()
    match = _ADDRESS.fullmatch(text)
    if local.exists() or match is None:
        return local
    repo, revision = match["repo"], match["revision"]
    root = _snapshot(repo, revision, ["meta/*", "meta/**/*"])
    layout = lerobot_layout.read(root)
    # The cache keeps a snapshot in a folder named after its commit.
    commit = root.name if re.fullmatch(r"[0-9a-f]{40}", root.name) else revision
    if revision is None and commit:
        progress.console.print(f"{repo} is {repo}@{commit}", highlight=False, soft_wrap=True)
    chosen = sorted(layout.lengths if episodes is None else set(episodes) & set(layout.lengths))
    keys = list(layout.info["features"] if cameras is None else cameras)
    return _snapshot(repo, commit, layout.files(chosen, keys))


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> pathlib.Path:
    try:
        import huggingface_hub

        found = huggingface_hub.snapshot_download(
            repo, repo_type="dataset", revision=revision, allow_patterns=patterns
        )
    except Exception as error:  # Not installed, no network, no rights, no such repository.
        version = "" if revision is None else f" --revision {revision}"
        raise FileNotFoundError(
            f"there is no folder {repo}, and no dataset of that name could be fetched from the "
            f"Hugging Face hub ({type(error).__name__}: {error}). It was looked for with "
            "huggingface_hub (uv sync --extra hf), in its cache (HF_HOME) and on the network. Or "
            f"fetch it on another machine with `hf download {repo} --repo-type dataset{version} "
            "--local-dir DIR`, copy DIR here, and give DIR as the path"
        ) from error
    return pathlib.Path(found)
