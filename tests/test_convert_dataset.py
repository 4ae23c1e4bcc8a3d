"""An old dataset comes out as v3.0, its frames the same or close, readable again."""

import io
import json
import pathlib
import shutil

import numpy as np
import polars as pl
import pytest
from PIL import Image

from shallow_pi.commands import convert_dataset
from shallow_pi.data.lerobot import reader

ROOT = pathlib.Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "lerobot"
OLD = FIXTURES / "pusht_v21_video"
TOP = "observation.images.top"


@pytest.fixture
def convert(tmp_path):
    """Runs the command on a source; gives the dataset it made."""

    def call(source, *arguments):
        convert_dataset.main([str(source), str(tmp_path / "new"), *arguments])
        return reader.Dataset(tmp_path / "new")

    return call


def _same_numbers(found, source):
    assert found.info["codebase_version"] == "v3.0"
    assert (found.fps, len(found), found.episodes) == (source.fps, len(source), source.episodes)
    for key in set(source.columns) - {"task_index", "language_events"}:
        np.testing.assert_array_equal(found.columns[key], source.columns[key])
        assert found.columns[key].dtype == source.columns[key].dtype
    assert [found.task(i) for i in range(110)] == [source.task(i) for i in range(110)]


def test_an_old_dataset_keeps_every_bit(convert):
    found, source = convert(OLD), reader.Dataset(OLD)
    _same_numbers(found, source)
    for camera in source.cameras:
        for i in (0, 19, 20, 57, 109):
            np.testing.assert_array_equal(found.image(i, camera), source.image(i, camera))
        ours, theirs = found.features[camera], source.features[camera]
        assert (ours["dtype"], ours["shape"]) == ("video", theirs["shape"])
        assert ours["info"] == theirs["info"]
    assert found.features["action"] == source.features["action"]
    assert len(list((found.path / "videos").rglob("*.mp4"))) == 8
    stats = json.loads((found.path / "meta" / "stats.json").read_text())
    actions = source.columns["action"].astype(float)
    np.testing.assert_allclose(stats["action"]["q99"], np.quantile(actions, 0.99, axis=0))
    assert stats["observation.images.top"]["count"] == [80]


@pytest.mark.parametrize("codec", ["av1", "h264"])
def test_images_can_be_encoded_anew(convert, codec):
    source = reader.Dataset(FIXTURES / "pusht_v30_image")
    found = convert(FIXTURES / "pusht_v30_image", "--images", codec, "--crf", "12")
    _same_numbers(found, source)
    for camera in source.cameras:
        assert found.features[camera]["info"]["video.codec"] == codec
        for i in (109, 0, 19, 20, 57):
            close = found.image(i, camera).astype(int) - source.image(i, camera)
            assert np.abs(close).mean() < 3
    assert len(list((found.path / "videos").rglob("*.mp4"))) == 2
    row = found.layout.rows[1]
    assert row["videos/observation.images.top/from_timestamp"] == 2.0
    assert row["videos/observation.images.top/to_timestamp"] == 4.5


def test_video_can_become_images(convert):
    found, source = convert(OLD, "--images", "png"), reader.Dataset(OLD)
    _same_numbers(found, source)
    for i in (0, 57, 109):
        np.testing.assert_array_equal(
            found.image(i, source.cameras[0]), source.image(i, source.cameras[0])
        )
    assert found.features[source.cameras[0]]["dtype"] == "image"


@pytest.mark.parametrize("name", ["pusht_v30_image", "pusht_v30_video"])
def test_the_cameras_that_are_named_are_kept_alone(convert, tmp_path, capsys, name):
    source = reader.Dataset(shutil.copytree(FIXTURES / name, tmp_path / "source"))
    for video in source.path.glob(f"videos/{TOP}/**/*.mp4"):
        video.unlink()  # As one that is not fetched.
    wrist = next(camera for camera in source.cameras if camera != TOP)
    found = convert(source.path, "--cameras", wrist)
    assert f"Cameras: {wrist}, without {TOP}" in capsys.readouterr().err
    assert found.cameras == (wrist,)
    assert list(found.features) == [key for key in source.features if key != TOP]
    _same_numbers(found, source)
    np.testing.assert_array_equal(found.image(57, wrist), source.image(57, wrist))
    assert not [path for path in found.path.rglob("*") if TOP in path.name]


def test_a_camera_that_is_not_there_is_named(convert, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        convert(OLD, "--cameras", "observation.images.tip")
    message = f"--cameras observation.images.tip: the cameras of {OLD} are {TOP}, "
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_failed_conversion_is_reported_and_leaves_nothing(convert, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        convert(tmp_path / "absent")
    assert "no LeRobot dataset at" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    convert(OLD)
    with pytest.raises(SystemExit, match="1"):
        convert(OLD)
    assert "exists and is never overwritten" in capsys.readouterr().err


KINDS = {
    "next.reward": ([0.5, float("nan")], {"dtype": "float32", "shape": [1], "names": None}),
    "is_first": ([True, False], {"dtype": "bool", "shape": [1], "names": None}),
    "language_instruction_2": (["pick", "put ü"], {"dtype": "string", "shape": [1], "names": None}),
    # As lerobot-annotate writes it.
    "language_events": (
        [[], [{"role": "user", "content": "go", "calls": None}]],
        {"dtype": "language", "shape": [1], "names": None},
    ),
    "action.chunk": (
        [[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]] * 2,
        {"dtype": "float64", "shape": [3, 2], "names": ["step", "joint"], "unit": "rad"},
    ),
}


@pytest.fixture
def rich(tmp_path):
    """A dataset with columns, features and meta files of every kind."""
    folder = shutil.copytree(FIXTURES / "pusht_v30_image", tmp_path / "rich")
    file = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pl.read_parquet(file)
    added = [pl.Series(key, value * 55) for key, (value, _) in KINDS.items()]
    table.with_columns(*added, pl.lit(1).alias("__index_level_0__")).write_parquet(file)
    info = json.loads((folder / "meta" / "info.json").read_text())
    info["features"] |= {key: feature for key, (_, feature) in KINDS.items()}
    info["features"]["action"]["names"] = {"motors": ["x", "y"]}
    info |= {"splits": {"train": "0:3", "test": "3:4"}, "licence": "CC-BY-4.0 ©", "total_videos": 0}
    (folder / "meta" / "info.json").write_text(json.dumps(info))
    (folder / "meta" / "modality.json").write_text("{}")
    (folder / "meta" / "lang").mkdir()
    (folder / "meta" / "lang" / "plan.json").write_text("[]")
    (folder / "calibration").mkdir()
    episodes = folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    operators = pl.Series("operator", ["ann", None, "bo", "ann"])
    pl.read_parquet(episodes).with_columns(operators).write_parquet(episodes)
    (folder / "README.md").write_text("card")
    return folder


def test_every_column_feature_and_entry_is_kept(convert, rich, capsys):
    found, source = convert(rich), reader.Dataset(rich)
    told = capsys.readouterr().err
    assert "columns ['__index_level_0__'] of" in told
    assert "next.reward is not finite everywhere: it gets no statistics" in told
    _same_numbers(found, source)
    assert found.features == source.features
    assert list(found.features) == list(source.features)
    assert found.info["splits"] == {"train": "0:3", "test": "3:4"}
    assert found.info["licence"] == "CC-BY-4.0 ©"
    assert "total_videos" not in found.info
    assert "['calibration'] of" in told
    for name in ("README.md", "meta/modality.json", "meta/lang/plan.json"):
        assert (found.path / name).read_text() == (rich / name).read_text()
    file = pathlib.Path("data", "chunk-000", "file-000.parquet")
    before, after = (pl.read_parquet(folder / file) for folder in (rich, found.path))
    for key in KINDS:
        assert str(after[key].to_list()) == str(before[key].to_list()), "NaN is not itself"
    episodes = found.path / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    assert pl.read_parquet(episodes)["operator"].to_list() == ["ann", None, "bo", "ann"]
    camera = source.cameras[0]
    assert after[camera].struct["bytes"].equals(before[camera].struct["bytes"])
    stats = json.loads((found.path / "meta" / "stats.json").read_text())
    assert np.shape(stats["action.chunk"]["mean"]) == (3, 2)
    texts = {"language_instruction_2", "language_events"}
    assert set(KINDS) - set(stats) == {"next.reward", *texts}
    described = json.loads(pl.read_parquet_metadata(found.path / file)["huggingface"])
    event = described["info"]["features"]["language_events"]["feature"]
    assert event["role"] == {"dtype": "string", "_type": "Value"}


def test_entries_of_episodes_of_several_types_are_kept_as_json(convert, tmp_path, capsys):
    old = shutil.copytree(OLD, tmp_path / "old")
    entries = [
        {"success": True, "skills": [], "meta": {}, "speed": 1},
        {"success": "no", "skills": [{"start": 1}], "meta": {}, "speed": 1.5},
        {"skills": [{"name": "lift"}], "meta": {}, "speed": None},
        {},
    ]
    file = old / "meta" / "episodes.jsonl"
    lines = zip(file.read_text().splitlines(), entries, strict=True)
    file.write_text("\n".join(json.dumps({**json.loads(line), **more}) for line, more in lines))
    found = convert(old)
    assert "'success' of the episodes has values of several types" in capsys.readouterr().err
    table = pl.read_parquet(found.path / "meta" / "episodes" / "chunk-000" / "file-000.parquet")
    assert table["success"].to_list() == ["true", '"no"', None, None]
    assert table["speed"].to_list() == [1, 1.5, None, None]
    assert table["meta"].to_list()[:1] == ["{}"]
    assert table["skills"].to_list()[1:3] == [
        [{"start": 1, "name": None}],
        [{"start": None, "name": "lift"}],
    ]


def test_more_about_tasks_and_unknown_shapes_do_not_stop_a_conversion(convert, tmp_path, capsys):
    old = shutil.copytree(OLD, tmp_path / "old")
    file = old / "meta" / "tasks.jsonl"
    file.write_text(file.read_text().replace("}", ', "category": "push"}', 1))
    info = json.loads((old / "meta" / "info.json").read_text())
    info["features"]["action"]["shape"] = None
    del info["features"]["task_index"]["shape"]
    (old / "meta" / "info.json").write_text(json.dumps(info))
    found = convert(old)
    assert f"['category'] of the tasks of {old} are left out" in capsys.readouterr().err
    assert found.features["action"]["shape"] == [2]
    _same_numbers(found, reader.Dataset(OLD))


def test_tasks_keep_their_numbers_and_episodes_left_out_are_told(convert, tmp_path, capsys):
    old = shutil.copytree(OLD, tmp_path / "old")
    (old / "data" / "chunk-000" / "episode_000000.parquet").write_bytes(b"junk")
    tasks = (old / "meta" / "tasks.jsonl").read_text()
    (old / "meta" / "tasks.jsonl").write_text(tasks + '{"task_index": 2, "task": "unused"}\n')
    with pytest.raises(SystemExit, match="1"):
        convert(old)
    assert "; --skip-bad-episodes leaves such episodes out\n" in capsys.readouterr().err
    found = convert(old, "--skip-bad-episodes")
    whole = reader.Dataset(OLD)
    assert found.tasks == {**whole.tasks, 2: "unused"}
    assert found.episodes == [0, 1, 2]
    np.testing.assert_array_equal(found.columns["action"], whole.columns["action"][20:])
    assert [found.task(i) for i in range(90)] == [whole.task(i) for i in range(20, 110)]
    told = capsys.readouterr().err
    assert "3 of 4 episodes of" in told
    assert "renumbered from 0" in told


def test_tasks_whose_number_changes_are_told(convert, tmp_path, capsys):
    """LeRobot takes a number for a row of the table, so that numbers with a gap cannot stay."""
    old = shutil.copytree(OLD, tmp_path / "old")
    tasks = (old / "meta" / "tasks.jsonl").read_text()
    (old / "meta" / "tasks.jsonl").write_text(tasks + '{"task_index": 7, "task": "unused"}\n')
    assert convert(old).tasks == {**reader.Dataset(OLD).tasks, 2: "unused"}
    assert "are renumbered (7: 2): other columns that number" in capsys.readouterr().err


def test_a_dataset_of_version_3_is_copied_film_by_film(convert):
    source = reader.Dataset(FIXTURES / "pusht_v30_video")
    found = convert(source.path)
    _same_numbers(found, source)
    assert len(list((found.path / "videos").rglob("*.mp4"))) == 2
    for i in (0, 57, 109):
        np.testing.assert_array_equal(
            found.image(i, source.cameras[1]), source.image(i, source.cameras[1])
        )


@pytest.mark.parametrize("images", ["copy", "png", "h264"])
def test_recorded_times_are_kept(convert, tmp_path, images):
    """Times of a recording with its start cut off, and of one with a slow clock."""
    old = shutil.copytree(OLD, tmp_path / "old")
    for episode, times in ((1, 0.5 + np.arange(20) / 10), (2, np.arange(30) / 10 * 1.005)):
        file = old / "data" / "chunk-000" / f"episode_{episode:06d}.parquet"
        table = pl.read_parquet(file).head(len(times))
        table.with_columns(pl.Series("timestamp", times, pl.Float32)).write_parquet(file)
    lines = (old / "meta" / "episodes.jsonl").read_text()
    lines = lines.replace('"length": 25', '"length": 20, "success": true')
    (old / "meta" / "episodes.jsonl").write_text(lines)
    info = json.loads((old / "meta" / "info.json").read_text()) | {"total_frames": 105}
    (old / "meta" / "info.json").write_text(json.dumps(info))
    source, found = reader.Dataset(old), convert(old, "--images", images)
    np.testing.assert_array_equal(found.columns["timestamp"], source.columns["timestamp"])
    episodes = found.path / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    assert pl.read_parquet(episodes)["success"].to_list() == [None, True, None, None]
    for i in (0, 19, 20, 39, 40, 55, 69, 70, 104):
        away = found.image(i, TOP).astype(int) - source.image(i, TOP)
        assert np.abs(away).mean() < (3 if images == "h264" else 1e-9), f"frame {i}"


def test_depth_is_copied_whatever_becomes_of_the_rest(convert, tmp_path, capsys):
    folder = shutil.copytree(FIXTURES / "pusht_v30_image", tmp_path / "depth")
    file = folder / "data" / "chunk-000" / "file-000.parquet"
    depth = np.linspace(300, 3000, 64).reshape(8, 8).astype(np.uint16)
    data = io.BytesIO()
    Image.fromarray(depth).save(data, "PNG")
    column = pl.Series(TOP, [{"bytes": data.getvalue(), "path": "x.png"}] * 110)
    pl.read_parquet(file).with_columns(column).write_parquet(file)
    found = convert(folder, "--images", "h264")
    assert [found.features[camera]["dtype"] for camera in found.cameras] == ["image", "video"]
    np.testing.assert_array_equal(found.image(3, TOP), depth[..., None])
    told = capsys.readouterr().err
    assert f"{TOP} of {folder} records depth (its images have one channel" in told
    assert "are encoded as h264 (crf 30), which loses detail" in told
    assert TOP not in json.loads((found.path / "meta" / "stats.json").read_text())


def test_nothing_that_is_there_is_overwritten(tmp_path, capsys):
    (tmp_path / "new").symlink_to(tmp_path / "gone")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "mine.txt").write_text("kept")
    (tmp_path / "another.partial" / "meta").mkdir(parents=True)
    for target, reason in (
        ("new", "is a link to nothing (is its disk mounted?), expected the name of a new folder"),
        ("other", "is in the way, and is not"),
    ):
        with pytest.raises(SystemExit, match="1"):
            convert_dataset.main([str(OLD), str(tmp_path / target)])
        assert reason in capsys.readouterr().err
    assert (tmp_path / "other.partial" / "mine.txt").read_text() == "kept"
    convert_dataset.main([str(OLD), str(tmp_path / "another")])
    assert not (tmp_path / "another.partial").exists(), "left by an interrupted run"


def test_images_of_several_sizes_are_copied_but_not_encoded(convert, tmp_path, capsys):
    folder = shutil.copytree(FIXTURES / "pusht_v30_image", tmp_path / "sizes")
    file = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pl.read_parquet(file)
    data = io.BytesIO()
    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(data, "JPEG")
    column = table[TOP].to_list()
    column[2] = {"bytes": data.getvalue(), "path": None}
    table.with_columns(pl.Series(TOP, column, table[TOP].dtype)).write_parquet(file)
    with pytest.raises(SystemExit, match="1"):
        convert(folder, "--images", "png")
    assert f"{TOP} of episode 0, frame 2 is 32 by 64, before" in capsys.readouterr().err
    found = convert(folder)
    assert found.image(2, TOP).shape == (32, 64, 3)
    stored = pl.read_parquet(found.path / "data" / "chunk-000" / "file-000.parquet")[TOP]
    assert stored[2] == {"bytes": data.getvalue(), "path": "frame-000002.jpg"}


def test_settings_of_video_are_told_to_be_idle_where_none_is_encoded(convert, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert("absent", "--images", "png", "--group", "4")
    assert "--group 4 has no effect: --images png encodes no video" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
