"""A dataset is a folder or an address; of an address only what is needed is fetched, pinned."""

import fnmatch
import pathlib
import shutil
import sys
import types

import pytest

from shallow_pi.data.lerobot import hub, reader

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "lerobot"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Stands in for huggingface_hub: serves the v2.1 fixture and keeps what it was asked for."""
    asked = []

    def snapshot_download(repo, *, revision, allow_patterns, repo_type):
        asked.append((repo, repo_type, revision))
        target = tmp_path / "hub" / COMMIT
        for file in (FIXTURES / "pusht_v21_video").rglob("*"):
            name = file.relative_to(FIXTURES / "pusht_v21_video")
            if file.is_file() and any(fnmatch.fnmatch(str(name), p) for p in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target / name)
        return str(target)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download = snapshot_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize("address", ["lerobot/pusht", "hf://datasets/lerobot/pusht"])
def test_a_dataset_of_the_hub_is_fetched_whole_at_one_commit(calls, address, capsys):
    dataset = reader.Dataset(hub.locate(address))
    assert len([dataset[i] for i in range(0, 110, 20)]) == 6
    assert calls == [("lerobot/pusht", "dataset", None), ("lerobot/pusht", "dataset", COMMIT)]
    assert f"lerobot/pusht@{COMMIT}" in capsys.readouterr().err


def test_only_the_files_of_chosen_episodes_and_cameras_come(calls):
    camera = "observation.images.top"
    root = hub.locate("lerobot/pusht@v2.1", episodes=[2], cameras=[camera])
    assert calls[0] == ("lerobot/pusht", "dataset", "v2.1")
    files = {str(f.relative_to(root)) for f in root.rglob("*") if f.is_file()}
    assert {name for name in files if not name.startswith("meta/")} == {
        "data/chunk-000/episode_000002.parquet",
        f"videos/chunk-000/{camera}/episode_000002.mp4",
    }
    assert len(reader.Dataset(root, episodes=[2])) == 30


def test_a_folder_is_a_folder_even_if_it_looks_like_an_address(calls, tmp_path):
    (tmp_path / "lerobot" / "pusht").mkdir(parents=True)
    assert hub.locate("lerobot/pusht") == pathlib.Path("lerobot/pusht")
    assert hub.locate("/data/absent") == pathlib.Path("/data/absent")
    assert calls == []


def test_what_was_tried_is_told(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = r"dataset a/b could not be fetched .*--extra hf.*hf download a/b --repo-type dataset "
    message += "--revision v3 "
    with pytest.raises(FileNotFoundError, match=message):
        hub.locate("a/b@v3")
