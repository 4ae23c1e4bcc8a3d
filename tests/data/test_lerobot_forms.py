"""One dataset in the forms that pandas, datasets, pyarrow and openpi's converters write it in."""

import io
import json
import pathlib
import pickle
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from shallow_pi.data.lerobot import columns, files, layout, reader

LENGTHS = (3, 4)
STATE = np.arange(28, dtype=np.float32).reshape(7, 4) / 7
BOOK = {
    key: {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
    for key in columns.BOOKKEEPING
}
FEATURES = {
    "observation.state": {"dtype": "float32", "shape": [4], "names": ["state"]},
    "grip": {"dtype": "float32", "shape": [1], "names": None},
    "observation.images.top": {"dtype": "image", "shape": [4, 4, 3], "names": None},
    **BOOK,
}


def _frames(episode: int) -> pl.DataFrame:
    """One episode as LeRobot writes it."""
    start, length = sum(LENGTHS[:episode]), LENGTHS[episode]
    grey = [np.full((4, 4, 3), 10 * (start + i), np.uint8) for i in range(length)]
    encoded = pl.DataFrame({"bytes": list(map(_png, grey)), "path": ["x.png"] * length})
    state = STATE[start : start + length]
    return pl.DataFrame(
        [
            pl.Series("observation.state", state),
            pl.Series("grip", state[:, 0]),
            encoded.to_struct("observation.images.top"),
            pl.Series("timestamp", np.arange(length, dtype=np.float32) / 10),
            pl.Series("frame_index", np.arange(length)),
            pl.Series("episode_index", np.full(length, episode)),
            pl.Series("index", np.arange(length) + start),
            pl.Series("task_index", np.full(length, episode)),
        ]
    )


def _png(image: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG")
    return data.getvalue()


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write(root: pathlib.Path, frames: Sequence[pl.DataFrame], **changes: Any) -> pathlib.Path:
    """A version 2.1 dataset; `changes` are of info.json, None removes a key."""
    (root / "meta").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    for episode, table in enumerate(frames):
        table.write_parquet(root / "data" / "chunk-000" / f"episode_{episode:06d}.parquet")
    rows = [{"episode_index": n, "tasks": ["go"], "length": len(t)} for n, t in enumerate(frames)]
    (root / "meta" / "episodes.jsonl").write_text(_lines(rows))
    tasks = [{"task_index": n, "task": text} for n, text in enumerate(("open it", "close it"))]
    (root / "meta" / "tasks.jsonl").write_text(_lines(tasks))
    info = {
        "codebase_version": "v2.1",
        "fps": 10,
        "total_episodes": 2,
        "total_frames": 7,
        "chunks_size": 1000,
        "splits": {"train": "0:2"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "features": FEATURES,
        **changes,
    }
    info = {key: value for key, value in info.items() if value is not None}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    return root


def _check(dataset: reader.Dataset) -> None:
    """The dataset holds what LeRobot's own form of it holds."""
    assert (len(dataset), dataset.episodes, dataset.fps) == (7, [0, 1], 10)
    for key, expected in (("observation.state", STATE), ("grip", STATE[:, :1])):
        np.testing.assert_array_equal(dataset.columns[key], expected)
        assert dataset.columns[key].dtype == np.float32
    assert [dataset.task(i) for i in (0, 6)] == ["open it", "close it"]
    assert [dataset.image(i, "observation.images.top")[0, 0, 0] for i in range(7)] == [
        *range(0, 70, 10)
    ]


@pytest.fixture
def frames() -> list[pl.DataFrame]:
    return [_frames(0), _frames(1)]


STATE_COLUMN = pl.col("observation.state")
FORMS = {
    "a variable list": [STATE_COLUMN.arr.to_list()],
    "doubles": [STATE_COLUMN.cast(pl.Array(pl.Float64, 4)), pl.col("grip").cast(pl.Float64)],
    "lists of one": [pl.concat_list("grip").alias("grip"), pl.concat_list("frame_index")],
    "nested once more": [pl.concat_list(STATE_COLUMN.arr.to_list())],
    "indices as doubles": [pl.col(*BOOK).cast(pl.Float64)],
    "narrow indices": [
        pl.col("frame_index").cast(pl.UInt8),
        pl.col("episode_index", "task_index").cast(pl.Int32),
    ],
    "bytes alone": [pl.col("observation.images.top").struct.field("bytes")],
    "columns in another order": [pl.col(sorted([*FEATURES], reverse=True))],
    "more columns": [pl.lit("x").alias("note"), pl.lit([[1], [2, 3]]).alias("ragged")],
    "no index": [pl.exclude("index")],
}


@pytest.mark.parametrize("which", ["both files", "one file"])
@pytest.mark.parametrize("form", FORMS)
def test_a_dataset_is_the_same_in_every_form(tmp_path, frames, form, which) -> None:
    changed = [table.select(*FORMS[form]) for table in frames]
    if set(changed[0].columns) != set(FEATURES) and form != "no index":
        changed = [table.with_columns(*FORMS[form]) for table in frames]
    if which == "one file":
        changed[0] = frames[0]
    _check(reader.Dataset(_write(tmp_path / "set", changed)))


@pytest.mark.skipif(not hasattr(pl, "Extension"), reason="polars reads these as their storage")
def test_extension_types_are_read_as_what_they_store(tmp_path, frames) -> None:
    array = pl.Extension("datasets.features.features.Array2DExtensionType", pl.List(pl.Float32))
    stored = [
        t.with_columns(STATE_COLUMN.arr.to_list().ext.to(array).alias("observation.state"))
        for t in frames
    ]
    _check(reader.Dataset(_write(tmp_path / "set", stored)))


def test_files_of_the_same_types_are_read_in_one_call(tmp_path, frames) -> None:
    root = _write(tmp_path / "set", frames)
    paths = sorted((root / "data").rglob("*.parquet"))
    table = files.read_alike(paths, ["observation.state", "index"])
    assert table is not None
    np.testing.assert_array_equal(table["observation.state"].to_numpy(), STATE)
    frames[1].drop("index").write_parquet(paths[1])
    assert files.read_alike(paths, ["observation.state", "index"]) is None


def test_version_2_files_need_no_indices_of_episode_and_frame(tmp_path, frames) -> None:
    less = [table.drop("episode_index", "frame_index", "timestamp") for table in frames]
    _check(reader.Dataset(_write(tmp_path / "set", less)))


@pytest.mark.parametrize(
    "changes",
    [
        {"chunks_size": None, "splits": None, "total_frames": None, "data_path": None},
        {"codebase_version": "2.1", "fps": 10.0, "total_episodes": 99},
        {"codebase_version": "v2.1.0"},
        {"fps": "10", "chunks_size": "1000", "total_frames": None},
        {"data_path": "data\\chunk-000\\episode_{episode_index:06d}.parquet", "chunks_size": 1e3},
        {"features": {key: {**f, "names": [["a", "b"]]} for key, f in FEATURES.items()}},
        {"features": {key: {**f, "names": {"motors": ["a"]}} for key, f in FEATURES.items()}},
        {"features": {key: f for key, f in FEATURES.items() if key not in BOOK}},
        {"features": {k: {**f, "shape": 4} if "state" in k else f for k, f in FEATURES.items()}},
    ],
    ids=[
        "without",
        "spelled",
        "with a patch",
        "text",
        "of Windows",
        "nested names",
        "dict names",
        "no bookkeeping",
        "plain shape",
    ],
)
def test_optional_metadata_may_be_absent_or_of_another_form(tmp_path, frames, changes) -> None:
    _check(reader.Dataset(_write(tmp_path / "set", frames, **changes)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("separator", ["\r\n", "\n\n", "\u2028", "\r", " "])
def test_json_lines_of_any_editor_are_read(tmp_path, frames, encoding, separator) -> None:
    root = _write(tmp_path / "set", frames)
    texts = ["open\u2028it", "close\x85it\u2029"]
    for name, rows in (
        ("tasks", [{"task_index": n, "task": text} for n, text in enumerate(texts)]),
        ("episodes", [{"episode_index": n, "length": length} for n, length in enumerate(LENGTHS)]),
    ):
        text = separator.join(json.dumps(row, ensure_ascii=False) for row in rows) + separator
        (root / "meta" / f"{name}.jsonl").write_bytes(text.encode(encoding))
    info = root / "meta" / "info.json"
    info.write_bytes(info.read_text().encode(encoding))
    dataset = reader.Dataset(root)
    assert [dataset.task(0), dataset.task(6)] == texts


@pytest.mark.parametrize(
    "table",
    [
        {"task_index": [0, 1], "__index_level_0__": ["open it", "close it"]},
        {"task": ["open it", "close it"], "task_index": [0, 1]},
        {"task_index": [1.0, 0.0], "task": ["close it", "open it"], "kind": ["a", "b"]},
        {"kind": ["a", "b"], "task_index": [0, 1], "__index_level_0__": ["open it", "close it"]},
        {"task_index": [0, 1], "instruction": ["open it", "close it"]},
        {"task_index": [0, 1], "task": pl.Series(["open it", "close it"], dtype=pl.Categorical)},
        {"task_index": [0, 1], "task": [b"open it", b"close it"]},
    ],
    ids=["index", "task", "doubles", "index of two", "one text", "categories", "bytes"],
)
def test_tasks_are_found_in_any_table(tmp_path, frames, table) -> None:
    root = _write(tmp_path / "set", frames)
    (root / "meta" / "tasks.jsonl").unlink()
    pl.DataFrame(table).write_parquet(root / "meta" / "tasks.parquet")
    _check(reader.Dataset(root))


def test_the_index_of_pandas_is_the_task_before_any_other_text(tmp_path, frames) -> None:
    root = _write(tmp_path / "set", frames)
    (root / "meta" / "tasks.jsonl").unlink()
    table = pl.DataFrame(
        {"task": ["short", "short"], "task_index": [0, 1], "words": ["open it", "close it"]}
    )
    note = json.dumps({"index_columns": ["words"], "columns": []})
    table.write_parquet(root / "meta" / "tasks.parquet", metadata={"pandas": note})
    _check(reader.Dataset(root))


def test_a_table_without_a_text_that_could_be_the_task_is_named(tmp_path, frames) -> None:
    root = _write(tmp_path / "set", frames)
    (root / "meta" / "tasks.jsonl").unlink()
    for table, message in (
        ({"task_index": [0, 1]}, r"tasks\.parquet has 0 columns of text \[\]"),
        ({"a": ["x"], "b": ["y"], "task_index": [0]}, r"has 2 columns of text \['a', 'b'\]"),
    ):
        pl.DataFrame(table).write_parquet(root / "meta" / "tasks.parquet")
        with pytest.raises(ValueError, match=message):
            reader.Dataset(root)


def test_meta_files_of_many_episodes_are_read_in_seconds(tmp_path, frames) -> None:
    root = _write(tmp_path / "set", frames)
    rows = [{"episode_index": n, "tasks": ["go"], "length": 280} for n in range(40_000)]
    (root / "meta" / "episodes.jsonl").write_text(_lines(rows))
    start = time.process_time()
    assert len(layout.read(root).lengths) == 40_000
    assert time.process_time() - start < 5, "time must not grow with the square"


def test_version_3_tables_may_hold_doubles_other_orders_and_widths(tmp_path, frames) -> None:
    """As LeRobot's own tools write them after a merge through pandas."""
    root = _write(tmp_path / "set", frames, codebase_version="v3.0", data_path=None)
    pl.concat(frames).write_parquet(root / "data" / "chunk-000" / "file-000.parquet")
    for n, (length, kind) in enumerate(zip(LENGTHS, (pl.Float64, pl.Int16), strict=True)):
        row = {"length": length, "data/file_index": 0, "episode_index": n, "data/chunk_index": 0}
        table = pl.DataFrame(row).cast(kind).with_columns(pl.lit([["go"]]).alias("tasks"))
        path = root / "meta" / "episodes" / "chunk-000" / f"file-{n:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.select(table.columns[:: 1 - 2 * n]).write_parquet(path)
    # Written by macOS beside a file that it copies.
    (path.parent / "._file-000.parquet").write_bytes(b"\0\5\x16\7")
    _check(reader.Dataset(root))
    assert layout.read(root).lengths == {0: 3, 1: 4}


@pytest.mark.parametrize("named", [(0, 0), (1, 0), (9, 1), (None, 1)])
def test_an_episode_is_found_in_another_file_than_named(tmp_path, frames, capsys, named) -> None:
    """LeRobot's converter and its merges place episodes in files before, after and beyond."""
    root = _write(tmp_path / "set", frames, codebase_version="v3.0", data_path=None)
    for number, table in enumerate(frames):
        table.write_parquet(root / "data" / "chunk-000" / f"file-{number:03d}.parquet")
    path = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    path.parent.mkdir(parents=True)
    row = {"episode_index": [0, 1], "length": LENGTHS, "data/chunk_index": 0}
    pl.DataFrame({**row, "data/file_index": named}).write_parquet(path)
    dataset = reader.Dataset(root)
    _check(dataset)
    _check(pickle.loads(pickle.dumps(dataset)))
    assert capsys.readouterr().err.count("meta/episodes places episode") == 1
    (root / "data" / "chunk-000" / "file-001.parquet").unlink()
    if named[1] == 0:
        with pytest.raises(ValueError, match=r"0\.parquet has 0 frames of episode 1, .*\[0\]"):
            reader.Dataset(root)
    else:
        with pytest.raises(FileNotFoundError, match=r"file-001\.parquet is missing"):
            reader.Dataset(root)


def test_a_start_in_the_video_that_is_no_number_is_named(tmp_path, frames) -> None:
    root = _write(tmp_path / "set", frames, codebase_version="v3.0")
    path = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    path.parent.mkdir(parents=True)
    row = {"episode_index": [0], "length": 3, "videos/top/from_timestamp": "0:00"}
    pl.DataFrame(row).write_parquet(path)
    with pytest.raises(ValueError, match=r"timestamp of episode 0 of .* is '0:00', expected seco"):
        layout.read(root)


def test_version_3_may_have_a_data_file_for_each_episode(tmp_path, frames) -> None:
    root = _write(tmp_path / "set", frames, codebase_version="v3.0")
    path = root / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    path.parent.mkdir(parents=True)
    pl.DataFrame({"episode_index": [0, 1], "length": LENGTHS}).write_parquet(path)
    _check(reader.Dataset(root))


def test_a_version_that_the_files_are_not_of_is_named(tmp_path, frames) -> None:
    root = _write(tmp_path / "set", frames, codebase_version="v3.0")
    with pytest.raises(FileNotFoundError, match=r"is codebase_version of info\.json v2\.1\?"):
        layout.read(root)
    info = root / "meta" / "info.json"
    info.write_text(info.read_text().replace("v3.0", "v2.1"))
    (root / "meta" / "episodes.jsonl").unlink()
    (root / "meta" / "episodes").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is codebase_version of info\.json v3\.0\?"):
        layout.read(root)


@pytest.mark.parametrize("together", [True, False])
def test_an_episode_may_start_at_a_later_frame(tmp_path, frames, together) -> None:
    """As one whose first rows were cut out."""
    cut = [table.with_columns(pl.col("frame_index") + 5) for table in frames[: 1 + together]]
    dataset = reader.Dataset(_write(tmp_path / "set", [*cut, *frames[len(cut) :]]))
    _check(dataset)
    assert dataset.columns["frame_index"].tolist() == [0, 1, 2, 0, 1, 2, 3]


def test_frames_that_lack_some_between_are_named(tmp_path, frames) -> None:
    frames[1] = frames[1].with_columns(frame_index=pl.Series([0, 1, 5, 6]))
    root = _write(tmp_path / "set", frames)
    with pytest.raises(ValueError, match=r"01\.parquet: frame 5 of episode 1 follows frame 1; fra"):
        reader.Dataset(root)


def test_a_camera_in_another_form_than_declared_is_named(tmp_path, frames) -> None:
    key = "observation.images.top"
    features = {**FEATURES, key: {**FEATURES[key], "dtype": "video"}}
    root = _write(tmp_path / "set", frames, features=features)
    with pytest.raises(ValueError, match=r"is declared as video, but its .*: declare it as image"):
        reader.Dataset(root, cameras=[key])
    less = _write(tmp_path / "less", [table.drop(key) for table in frames])
    with pytest.raises(ValueError, match=r"no such column, and there are no videos of it$"):
        reader.Dataset(less, cameras=[key])
    video = less / "videos" / "chunk-000" / key / "episode_000000.mp4"
    video.parent.mkdir(parents=True)
    video.touch()
    with pytest.raises(ValueError, match=r"has no such column: declare it as video in meta/info"):
        reader.Dataset(less, cameras=[key])


def test_a_column_of_info_json_alone_is_left_out_of_a_frame(tmp_path, frames) -> None:
    root = _write(tmp_path / "set", [table.drop("index") for table in frames])
    dataset = reader.Dataset(root)
    assert set(dataset[0]) == {*FEATURES, "task"} - {"index"}
    with pytest.raises(ValueError, match=r"episode_000000\.parquet has no column \['index'\]"):
        dataset.columns["index"]


def test_the_folder_that_was_meant_is_guessed(tmp_path, frames) -> None:
    root = _write(tmp_path / "sets" / "one", frames)
    (tmp_path / "one.zip").write_bytes(b"PK")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "episode_0.hdf5").touch()
    (tmp_path / "begun" / "meta").mkdir(parents=True)
    (tmp_path / "linked").symlink_to("/mnt/disk/sets")
    for path, hint in (
        (root.with_name("ones"), "did you mean 'one'?"),
        (tmp_path / "linked" / "one", "linked is a link to /mnt/disk/sets, which is absent: is"),
        (r"D:\robots\one", "under WSL, Windows' disks are in /mnt: /mnt/d/robots/one"),
        (root.parent, f"did you mean {root}?"),
        (root / "meta", f"did you mean {root}?"),
        (tmp_path / "one.zip", "it is a file, a dataset is a folder: unpack it, or convert it"),
        (tmp_path / "raw", "it holds episode_0.hdf5: convert what is not in LeRobot's format"),
        (tmp_path, f"did you mean {root}?"),
        (tmp_path / "begun", "was writing it interrupted"),
    ):
        with pytest.raises(FileNotFoundError, match=re.escape(hint)):
            layout.read(path)


def test_columns_are_read_when_asked_for_and_kept(tmp_path, frames) -> None:
    features = FEATURES | {
        "pose": {"dtype": "float64", "shape": [2, 3], "names": None},
        "subtask": {"dtype": "string", "shape": [1], "names": None},
        "is_first": {"dtype": "bool", "shape": [1], "names": None},
    }
    more = [
        t.with_columns(
            pl.Series("pose", [[[0, 1, 2], [3, 4, 5]]] * len(t)),
            pl.lit("lift", pl.Categorical).alias("subtask"),
            (pl.col("frame_index") == 0).cast(pl.UInt8).alias("is_first"),
        )
        for t in frames
    ]
    dataset = reader.Dataset(_write(tmp_path / "set", more, features=features), keys=["grip"])
    assert set(dataset.columns.loaded) == {"episode_index", "frame_index", "grip"}
    np.testing.assert_array_equal(dataset.columns["pose"][4], [[0, 1, 2], [3, 4, 5]])
    assert dataset.columns["subtask"].tolist() == ["lift"] * 7
    assert dataset.columns["is_first"][:, 0].tolist() == [True, False, False, True] + [False] * 3
    part = dataset.select([1])
    np.testing.assert_array_equal(part.columns["observation.state"], STATE[3:])
    np.testing.assert_array_equal(part.columns["pose"], dataset.columns["pose"][3:])
    assert set(dataset[0]) == {*features, "task"}


BAD_VALUES = {
    "observation.state": [
        (pl.lit([1.0, 2.0]), "has shape (4,) in info.json, the file holds (2,)"),
        (pl.lit("text"), "is stored as String, expected float32"),
        (
            pl.when(pl.col("frame_index") == 2)
            .then(pl.lit([1.0]))
            .otherwise(STATE_COLUMN.cast(pl.Array(pl.Float64, 4)).arr.to_list()),
            "frame 2: 'observation.state' has 1 values, other frames 4",
        ),
        (
            pl.when(pl.col("frame_index") != 1).then(STATE_COLUMN.arr.to_list()),
            "frame 1: 'observation.state' has no value, other frames 4",
        ),
    ],
    "task_index": [
        (pl.lit(0.5), "frame 0: 'task_index' is 0.5, expected int64"),
        (pl.lit(None, pl.Int64), "frame 0: 'task_index' has no value"),
        (pl.lit(float("nan")), "frame 0: 'task_index' is nan, expected int64"),
    ],
}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [(key, value, message) for key, rows in BAD_VALUES.items() for value, message in rows],
)
def test_a_value_that_does_not_fit_is_named(tmp_path, frames, key, value, message) -> None:
    frames[1] = frames[1].with_columns(value.alias(key))
    root = _write(tmp_path / "set", frames)
    for ask in (
        lambda: reader.Dataset(root, keys=[key]),
        lambda: reader.Dataset(root).columns[key],
    ):
        with pytest.raises(ValueError, match=r"episode_000001\.parquet, episode 1") as error:
            ask()
        assert message in str(error.value)
    assert reader.Dataset(root, keys=["grip"]).columns["grip"].shape == (7, 1)
    assert reader.Dataset(root, keys=[key], skip_bad_episodes=True).episodes == [0]


DAMAGE = {
    "data/chunk-000/episode_000001.parquet": [
        (b"", "cannot read"),
        (b"PAR1junkPAR1", "cannot read"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "run `git lfs pull`"),
    ],
    "meta/info.json": [
        (b"{", r"info.json is not JSON"),
        (b"[]", r"info.json holds \[\], expected an object"),
        (b'{"codebase_version": "v3.0.1"}', "codebase_version is 'v3.0.1', expected one of v2.0"),
        (b"\xff\xfa{}", "is not UTF-8 text: byte 0 is 0xff"),
        (b'{"codebase_version": "v2.1", "fps": 0, "features": {}}', "fps is 0, expected a posi"),
        (b'{"codebase_version": "v2.1", "fps": "x", "features": {}}', "fps is 'x', expected a p"),
        (b'{"codebase_version": "v2.1", "fps": 9, "features": [1]}', r"features is \[1\], expec"),
        (b'{"codebase_version": "v2.1", "fps": 9, "features": {"a": 1}}', "'a' needs a 'dtype', g"),
        (b'{"codebase_version":"v2.1","fps":9,"features":{},"data_path":{}}', "data_path is {}, e"),
        (
            b'{"codebase_version":"v2.1","fps":9,"features":{"a":{"dtype":"int8","shape":"x"}}}',
            "shape of 'a' in .* is 'x', expected a whole number",
        ),
    ],
    "meta/episodes.jsonl": [
        (b'{"episode_index": 0, "length": 3}\n{cut', r"episodes.jsonl, line 2 is not JSON"),
        (b"[1]", r"episodes.jsonl, line 1: expected an object with .*'length'"),
        (b'{"episode_index": 0}', r"line 1: expected an object with \['episode_index', 'length'\]"),
        (b'{"episode_index": 0, "length": "x"}', "length of episode 0 .* is 'x', expected a who"),
        (b'{"episode_index":0,"length":3}{"episode_index":0,"length":4}', "has episode 0 twice"),
    ],
    "meta/tasks.jsonl": [
        (b'{"task_index": 0, "task": 5}', "is no text"),
        (b"{", "is not JSON"),
        (
            b'{"task_index": 0, "task": "a"}{"task_index": 0, "task": "b"}',
            "has task 0 twice, 'a' and 'b': renumber the tasks",
        ),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, content, message) for name, rows in DAMAGE.items() for content, message in rows],
)
def test_damage_is_reported_by_file_and_place(tmp_path, frames, name, content, message) -> None:
    root = _write(tmp_path / "set", frames)
    (root / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        reader.Dataset(root, keys=["observation.state"])
    assert str(root) in str(error.value)
    assert name in str(error.value)


def test_a_pattern_of_other_fields_is_named(tmp_path, frames) -> None:
    root = _write(tmp_path / "set", frames, data_path="data/{chunk}.parquet")
    with pytest.raises(ValueError, match=r"data_path is 'data/\{chunk\}.parquet', expected a patt"):
        reader.Dataset(root)


def test_a_file_cut_at_any_length_is_named(tmp_path, frames) -> None:
    root = _write(tmp_path / "set", frames)
    file = root / "data" / "chunk-000" / "episode_000001.parquet"
    whole = file.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        file.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match=r"episode 1 of .*: cannot read .*fetch it again"):
            reader.Dataset(root, keys=["observation.state"])


@pytest.mark.parametrize("name", ["data/chunk-000/episode_000001.parquet", "meta/tasks.jsonl"])
def test_a_folder_in_place_of_a_file_is_named(tmp_path, frames, name) -> None:
    root = _write(tmp_path / "set", frames)
    (root / name).unlink()
    (root / name).mkdir()
    with pytest.raises(ValueError, match=f"cannot read ({root}/)?{name}"):
        reader.Dataset(root)
