"""A dataset is a folder or an address; of an address only what is needed is fetched, pinned."""

import fnmatch
import pathlib
import shutil
import sys
import types

import numpy as np
import polars as pl
import pytest

from shallow_pi.data.lerobot import hub, layout, reader, selection

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "lerobot"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Stands in for huggingface_hub: serves the v2.1 fixture and records the requests."""
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

    def hf_hub_download(repo, name, *, revision, repo_type):
        asked.append((repo, repo_type, revision, name))
        target = tmp_path / "hub" / COMMIT / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(FIXTURES / "pusht_v21_video" / name, target)

    module = types.ModuleType("huggingface_hub")
    module.snapshot_download, module.hf_hub_download = snapshot_download, hf_hub_download
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_LEROBOT_HOME", str(tmp_path / "lerobot"))
    return asked


@pytest.mark.parametrize("address", ["lerobot/pusht", "hf://datasets/lerobot/pusht"])
def test_a_dataset_of_the_hub_is_fetched_whole_at_one_commit(calls, address, capsys):
    dataset = reader.Dataset(hub.locate(address))
    assert len([dataset[i] for i in range(0, 110, 20)]) == 6
    assert calls == [("lerobot/pusht", "dataset", None), ("lerobot/pusht", "dataset", COMMIT)]
    assert f"lerobot/pusht@{COMMIT}" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["HF_LEROBOT_HOME", "HF_HOME"])
def test_a_dataset_recorded_here_is_read_where_lerobot_keeps_it(
    calls, tmp_path, monkeypatch, variable, capsys
):
    monkeypatch.delenv("HF_LEROBOT_HOME", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "nothing"))
    monkeypatch.setenv(variable, str(tmp_path / "home"))
    home = tmp_path / "home" / ("lerobot" if variable == "HF_HOME" else "")
    own = shutil.copytree(FIXTURES / "pusht_v21_video", home / "me" / "pusht")
    assert hub.locate("me/pusht") == own
    assert calls == []
    assert f"me/pusht is {own}" in capsys.readouterr().err
    for address in ("hf://datasets/me/pusht", "me/pusht@main"):
        assert hub.locate(address) != own


def test_only_the_files_of_chosen_episodes_and_cameras_come(calls):
    camera = "observation.images.top"
    chosen = selection.Selection(("2",))
    root = hub.locate("lerobot/pusht@v2.1", episodes=chosen, cameras=[camera])
    data = "data/chunk-000/episode_000002.parquet"
    video = f"videos/chunk-000/{camera}/episode_000002.mp4"
    assert calls[0] == ("lerobot/pusht", "dataset", "v2.1")
    assert sorted(calls[1:]) == [("lerobot/pusht", "dataset", COMMIT, f) for f in (data, video)]
    files = {str(f.relative_to(root)) for f in root.rglob("*") if f.is_file()}
    assert {name for name in files if not name.startswith("meta/")} == {data, video}
    assert len(reader.Dataset(root, episodes=[2])) == 30
    del calls[:]
    assert hub.locate("lerobot/pusht@v2.1", episodes=chosen, cameras=[camera]) == root
    assert len(calls) == 1, "what is there already is not asked for"


def test_images_next_to_the_data_files_are_fetched_too(calls, tmp_path, monkeypatch):
    camera = "observation.images.top"
    source = shutil.copytree(FIXTURES / "pusht_v30_image", tmp_path / "set" / "pusht_v21_video")
    file = source / "data" / "chunk-000" / "file-000.parquet"
    table = pl.read_parquet(file)
    (source / "images" / camera / "episode_000000").mkdir(parents=True)
    image = source / "images" / camera / "episode_000000" / "frame_0.png"
    image.write_bytes(table[camera][0]["bytes"])
    named = pl.Series(camera, [{"bytes": None, "path": "frame_0.png"}] * len(table))
    table.with_columns(named).write_parquet(file)
    expected = reader.Dataset(FIXTURES / "pusht_v30_image").image(0, camera)
    monkeypatch.setattr(sys.modules[__name__], "FIXTURES", tmp_path / "set")
    dataset = reader.Dataset(hub.locate("lerobot/pusht", cameras=[camera]))
    np.testing.assert_array_equal(dataset.image(0, camera), expected)


def test_files_of_many_episodes_are_asked_for_by_few_patterns():
    cameras = ["observation.images.a", "observation.images.b"]
    info = {"codebase_version": "v2.1", "features": {key: {"dtype": "video"} for key in cameras}}
    lengths = dict.fromkeys(range(95_000), 10)
    meta = layout.Layout(pathlib.Path("x"), info, {0: "go"}, lengths, {})
    patterns = meta.patterns(cameras)
    assert patterns == [
        "data/chunk-*/episode_*.parquet",
        "videos/chunk-*/observation.images.a/episode_*.mp4",
        "videos/chunk-*/observation.images.b/episode_*.mp4",
    ]
    names = meta.files([0, 94_999], cameras)
    assert len(names) == 6
    assert all(any(fnmatch.fnmatch(name, p) for p in patterns) for name in names)


def test_a_folder_is_a_folder_even_if_it_looks_like_an_address(calls, tmp_path):
    (tmp_path / "lerobot" / "pusht").mkdir(parents=True)
    assert hub.locate("lerobot/pusht") == pathlib.Path("lerobot/pusht")
    assert hub.locate("/data/absent") == pathlib.Path("/data/absent")
    assert calls == []


def test_an_error_lists_the_attempts(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    message = r"(?s)dataset a/b could not be downloaded .*--extra hf.*hf download a/b "
    message += "--repo-type dataset --revision v3 "
    with pytest.raises(FileNotFoundError, match=message):
        hub.locate("a/b@v3")
