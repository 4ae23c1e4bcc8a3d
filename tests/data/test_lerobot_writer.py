"""Written datasets read back bit for bit and have LeRobot's layout."""

import json
import pathlib

import numpy as np
import polars as pl
import pytest

from shallow_pi.data.lerobot import reader, video_writer
from shallow_pi.data.lerobot import writer as lerobot_writer

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "lerobot" / "pusht_v30_image"
FILES = [
    "meta/tasks.parquet",
    "meta/episodes/chunk-000/file-000.parquet",
    "data/chunk-000/file-000.parquet",
]


def _add_episode(writer: lerobot_writer.Writer, length: int, seed: int, task: str) -> dict:
    rng = np.random.default_rng(seed)
    episode = {
        "images": {
            "base": rng.integers(0, 256, (length, 12, 16, 3), np.uint8),
            "observation.images.wrist": rng.integers(0, 256, (length, 8, 8, 3), np.uint8),
        },
        "state": rng.normal(size=(length, 3)).astype(np.float32),
        "action": rng.normal(size=(length, 1)).astype(np.float32),
        "task": task,
    }
    writer.add_episode(**episode)
    return episode


def test_reader_returns_what_was_written(tmp_path) -> None:
    with lerobot_writer.Writer(tmp_path / "new", 20) as writer:
        first = _add_episode(writer, 7, 0, "touch the red block")
        second = _add_episode(writer, 5, 1, "touch the blue block")
        _add_episode(writer, 4, 2, "touch the red block")
    dataset = reader.Dataset(tmp_path / "new")
    assert (len(dataset), dataset.num_episodes, dataset.fps) == (16, 3, 20)
    for start, episode in ((0, first), (7, second)):
        for i in range(len(episode["state"])):
            frame = dataset[start + i]
            np.testing.assert_array_equal(
                frame["observation.images.base"], episode["images"]["base"][i]
            )
            np.testing.assert_array_equal(
                frame["observation.images.wrist"], episode["images"]["observation.images.wrist"][i]
            )
            np.testing.assert_array_equal(frame["observation.state"], episode["state"][i])
            np.testing.assert_array_equal(frame["action"], episode["action"][i])
            assert frame["task"] == episode["task"]
    assert dataset.tasks == {0: "touch the red block", 1: "touch the blue block"}
    actions, pad = dataset.chunk(10, 4)
    np.testing.assert_array_equal(actions, second["action"][[3, 4, 4, 4]])
    np.testing.assert_array_equal(pad, [False, False, True, True])


def _rewrite_fixture(folder: pathlib.Path) -> reader.Dataset:
    source = reader.Dataset(FIXTURE)
    names = {"observation.state": ["x", "y"], "action": ["x", "y"]}
    with lerobot_writer.Writer(folder, 10, robot_type="pusht", names=names) as writer:
        for episode in range(source.num_episodes):
            rows = np.flatnonzero(source.columns["episode_index"] == episode)
            images = {
                key: np.stack([source.image(int(i), key) for i in rows]) for key in source.cameras
            }
            state, action = (source.columns[key][rows] for key in ("observation.state", "action"))
            writer.add_episode(images, state, action, source.task(int(rows[0])))
    return source


def test_files_and_schemas_are_lerobots(tmp_path) -> None:
    source = _rewrite_fixture(tmp_path / "new")
    new = reader.Dataset(tmp_path / "new")
    assert new.info == source.info
    written = {p.relative_to(tmp_path / "new") for p in (tmp_path / "new").rglob("*.*")}
    assert written == {p.relative_to(FIXTURE) for p in FIXTURE.rglob("*.*")}
    for name in FILES:
        expected, table = pl.read_parquet(FIXTURE / name), pl.read_parquet(tmp_path / "new" / name)
        assert list(table.schema.items()) == list(expected.schema.items())
        own = [c for c in expected.columns if "stats/" not in c and "images." not in c]
        assert table.select(own).equals(expected.select(own))
        is_path = "data" in name
        if is_path:
            paths = pl.col("^observation.images.*$").struct.field("path").name.keep()
            assert table.select(paths).equals(expected.select(paths))


def test_pandas_finds_the_tasks_index(tmp_path) -> None:
    """LeRobot reads tasks.parquet with pandas, which loses the index if ARROW:schema exists."""
    _rewrite_fixture(tmp_path / "new")
    metadata = pl.read_parquet_metadata(tmp_path / "new" / "meta" / "tasks.parquet")
    assert "ARROW:schema" not in metadata
    assert json.loads(metadata["pandas"])["index_columns"] == ["__index_level_0__"]


def test_statistics_are_exact(tmp_path) -> None:
    source = _rewrite_fixture(tmp_path / "new")
    stats = json.loads((tmp_path / "new" / "meta" / "stats.json").read_text())
    theirs = json.loads((FIXTURE / "meta" / "stats.json").read_text())
    assert {key: set(value) for key, value in stats.items()} == {
        key: set(value) for key, value in theirs.items()
    }
    for key in ("min", "max", "mean", "std", "count"):
        np.testing.assert_allclose(stats["action"][key], theirs["action"][key], rtol=1e-6)
    values = source.columns["action"].astype(float)
    np.testing.assert_allclose(stats["action"]["q99"], np.quantile(values, 0.99, axis=0))
    images = np.stack([source.image(i, "observation.images.top") for i in range(110)]) / 255
    top = stats["observation.images.top"]
    assert np.shape(top["mean"]) == (3, 1, 1)
    for name, function in {
        "mean": np.mean,
        "std": np.std,
        "max": np.max,
        "q10": lambda x, axis: np.quantile(x, 0.1, axis=axis),
        "q01": lambda x, axis: np.quantile(x, 0.01, axis=axis),
    }.items():
        np.testing.assert_allclose(np.ravel(top[name]), function(images, axis=(0, 1, 2)))


def test_interrupted_write_leaves_no_dataset(tmp_path) -> None:
    def interrupted() -> None:
        with lerobot_writer.Writer(tmp_path / "above/new", 20) as writer:
            _add_episode(writer, 3, 0, "touch")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    killed = lerobot_writer.Writer(tmp_path / "new", 20)
    _add_episode(killed, 3, 0, "touch")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"another process works in .*new\.partial: wait for it"):
        lerobot_writer.Writer(tmp_path / "new", 20)
    del killed
    with lerobot_writer.Writer(tmp_path / "new", 20) as writer:
        _add_episode(writer, 4, 0, "touch")
    assert len(reader.Dataset(tmp_path / "new")) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["data", "meta"]


@pytest.mark.parametrize("encoding", [None, video_writer.Encoding("h264")])
@pytest.mark.parametrize("size", [100, 5000, 10_000])
def test_a_full_disk_leaves_no_dataset(tmp_path, small_disk, size, encoding) -> None:
    """It is full while images, or else the tables, are written."""

    def write() -> None:
        with lerobot_writer.Writer(tmp_path / "above/new", 20, encoding=encoding) as writer:
            _add_episode(writer, 60, 0, "touch")

    with small_disk(size), pytest.raises(OSError, match=r"above/new cannot be written \(File too"):
        write()
    assert list(tmp_path.iterdir()) == []
    write()


def test_large_datasets_are_split_into_files(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lerobot_writer, "DATA_FILE_MB", 0.004)
    with lerobot_writer.Writer(tmp_path / "new", 20) as writer:
        episodes = [_add_episode(writer, 5, seed, "touch") for seed in range(4)]
    dataset = reader.Dataset(tmp_path / "new")
    assert len(list((tmp_path / "new" / "data").rglob("*.parquet"))) > 1
    for i in range(20):
        expected = episodes[i // 5]["images"]["base"][i % 5]
        np.testing.assert_array_equal(dataset[i]["observation.images.base"], expected)


def test_bad_episodes_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="no episodes were added"):
        lerobot_writer.Writer(tmp_path / "none", 20).finish()
    writer = lerobot_writer.Writer(tmp_path / "new", 20, names={"observation.state": ["x", "y"]})
    images = {"base": np.zeros((3, 4, 4, 3), np.uint8)}
    with pytest.raises(ValueError, match=r"episode 0 needs the same, nonzero number of frames"):
        writer.add_episode(images, np.zeros((2, 2)), np.zeros((3, 2)), "touch")
    with pytest.raises(ValueError, match="episode 0 has an empty task"):
        writer.add_episode(images, np.zeros((3, 2)), np.zeros((3, 2)), " ")
    with pytest.raises(ValueError, match=r"must be uint8 \(T, h, w, 3\), got float64"):
        writer.add_episode({"base": images["base"] / 1.0}, *np.zeros((2, 3, 2)), "touch")
    action = np.array([[0.0, 1], [np.nan, 1], [0, 1]])
    with pytest.raises(ValueError, match="action of episode 0, frame 1 is not finite"):
        writer.add_episode(images, np.zeros((3, 2)), action, "touch")
    with pytest.raises(ValueError, match=r"has 3 dimensions but names \['x', 'y'\]"):
        writer.add_episode(images, np.zeros((3, 3)), np.zeros((3, 2)), "touch")
    writer.add_episode(images, np.zeros((3, 2)), np.zeros((3, 2)), "touch")
    with pytest.raises(ValueError, match="episode 1 has features"):
        writer.add_episode(images, np.zeros((3, 2)), np.zeros((3, 5)), "touch")
    writer.finish()
    with pytest.raises(
        FileExistsError, match=r"exists and is never overwritten, .*choose another folder"
    ):
        lerobot_writer.Writer(tmp_path / "new", 20)


def test_a_video_of_frames_at_one_time_is_refused(tmp_path) -> None:
    """As float32 keeps the seconds since 1970: in steps of two minutes."""
    encoding = video_writer.Encoding("h264", crf=10)
    writer = lerobot_writer.Writer(tmp_path / "new", 20, encoding=encoding)
    seconds = np.array([0, 0.05, 0.05])
    images = {"base": iter(np.zeros((3, 16, 16, 3), np.uint8))}
    with pytest.raises(ValueError, match=r"base of episode 0, frame 2: recorded at 0\.0500 s, the"):
        writer.add(images, {"action": np.zeros((3, 2))}, ["go"] * 3, seconds=seconds)


def test_large_videos_are_split_into_files_between_episodes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lerobot_writer, "VIDEO_FILE_MB", 0.001)
    encoding = video_writer.Encoding("h264", crf=10)
    with lerobot_writer.Writer(tmp_path / "new", 20, encoding=encoding) as writer:
        episodes = [_add_episode(writer, 30, seed, "touch") for seed in range(4)]
    dataset = reader.Dataset(tmp_path / "new")
    assert dataset.features["observation.images.base"]["dtype"] == "video"
    files = sorted((tmp_path / "new" / "videos" / "observation.images.base").rglob("*.mp4"))
    assert 1 < len(files) <= 4
    for i in (0, 29, 30, 75, 119):
        # Noise compresses badly; noise of another frame would not correlate at all.
        expected = episodes[i // 30]["images"]["base"][i % 30].astype(float).mean(-1)
        found = dataset.image(i, "observation.images.base").astype(float).mean(-1)
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.7, f"frame {i}"


def test_a_video_is_copied_once(tmp_path) -> None:
    film = FIXTURE.parent / "pusht_v21_video" / "videos" / "chunk-000"
    film = film / "observation.images.top" / "episode_000001.mp4"
    image, numbers = np.zeros((1, 96, 96, 3), np.uint8), np.arange(25.0)[:, None]
    with lerobot_writer.Writer(tmp_path / "new", 10) as writer:
        for _ in range(2):
            images = {"top": lerobot_writer.Film(film, sample=image)}
            writer.add(images, {"action": numbers}, ["go", "stop"] * 12 + ["go"])
    (copied,) = (tmp_path / "new" / "videos" / "top").rglob("*.mp4")
    assert copied.read_bytes() == film.read_bytes()
    dataset = reader.Dataset(tmp_path / "new")
    np.testing.assert_array_equal(dataset.image(7, "top"), dataset.image(32, "top"))
    assert (dataset.task(1), dataset.task(24)) == ("stop", "go")
    episodes = pl.read_parquet(tmp_path / "new" / FILES[1])
    assert episodes["tasks"].to_list() == [["go", "stop"]] * 2
    assert dataset.columns["action"].dtype == np.float64
