"""Datasets by address: a local folder, or the needed files of a dataset on the Hugging Face hub.

`owner/name[@revision]` (also written `hf://datasets/owner/name[@revision]`) is fetched by
huggingface_hub, which caches (`HF_HOME`), locks and resumes downloads. The meta files come first;
they list the data files and videos of the chosen episodes and cameras. A moving revision (`main`)
is pinned to its commit before the rest is fetched, and the commit is logged. A bare `owner/name`
that LeRobot has recorded or converted on this machine is read where LeRobot keeps it.
"""

import os
import pathlib
import re
from collections.abc import Collection

from shallow_pi import progress, user_cache
from shallow_pi.checkpoints import fetch
from shallow_pi.data.lerobot import images, layout, selection

_ADDRESS = re.compile(r"(hf://datasets/)?(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def locate(
    path: str | os.PathLike[str],
    *,
    episodes: selection.Selection | None = None,
    cameras: Collection[str] | None = None,
) -> pathlib.Path:
    """The local folder of a dataset, fetched first if necessary.

    Args:
      path: a local folder, or an address on the hub.
      episodes: fetch only their files; None fetches all.
      cameras: fetch only their videos; None fetches all.

    Raises:
      FileNotFoundError: it is neither; says what was tried and how to fetch it manually.
      ValueError: a dataset of a version that cannot be read.
    """
    text = os.fspath(path)
    local = pathlib.Path(os.path.expanduser(text))  # Unlike pathlib, leaves `~nobody` unchanged.
    match = _ADDRESS.fullmatch(text)
    if local.exists() or match is None:
        return local
    repo, revision = match["repo"], match["revision"]
    if text == repo and (own := _recorded(repo)).exists():
        progress.say(f"{repo} is {own} (hf://datasets/{repo} takes that of the hub)")
        return own
    root = fetch.snapshot(repo, revision, ["meta/*", "meta/**/*"], kind="dataset")
    meta = layout.read(root)
    # The cache names the folder of a snapshot after its commit.
    commit = root.name if re.fullmatch(r"[0-9a-f]{40}", root.name) else revision
    if revision is None and commit:
        progress.say(f"{repo} is {repo}@{commit}")
    chosen = list(meta.lengths) if episodes is None else episodes.of(meta.lengths)
    used = [episode for episode in chosen if meta.lengths[episode]]
    features = meta.info["features"]
    wanted = features if cameras is None else cameras
    kinds = {key: features.get(key, {}).get("dtype") for key in wanted}
    videos = [key for key, kind in kinds.items() if kind == "video"]
    missing = [n for n in meta.files(used, videos) if not os.path.exists(os.path.join(root, n))]
    if missing and len(chosen) == len(meta.lengths):
        root = fetch.snapshot(repo, commit, meta.patterns(videos), kind="dataset")
    elif missing:
        fetch.files(repo, commit, missing, kind="dataset")
    stored = images.Images(meta)
    for key in (key for key, kind in kinds.items() if kind == "image" and used):
        if stored.is_beside(key, used[0]):
            fetch.snapshot(repo, commit, [f"*{key}/*"], kind="dataset")
    return root


def _recorded(repo: str) -> pathlib.Path:
    """The folder in which LeRobot writes a dataset; it may not exist."""
    if "HF_LEROBOT_HOME" in os.environ:
        return user_cache.chosen("HF_LEROBOT_HOME", "") / repo
    return user_cache.chosen("HF_HOME", "~/.cache/huggingface") / "lerobot" / repo
