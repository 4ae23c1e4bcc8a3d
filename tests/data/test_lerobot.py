"""Frames and chunks equal LeRobot's own reader bit for bit; every defect of a dataset is named."""

import concurrent.futures
import pathlib
import pickle
import shutil

import numpy as np
import polars as pl
import pusht
import pytest

from shallow_pi.data import fit
from shallow_pi.data.lerobot import images, reader

MULTI = pusht.FIXTURES / "multi_v30_h264"
REFERENCES = [
    pytest.param(pusht.IMAGE, "reference_v30_image.npz", id="image"),
    pytest.param(pusht.VIDEO, "reference_v30_video.npz", id="video"),
    pytest.param(pusht.OLD, "reference_v21_video.npz", id="v2.1"),
]


@pytest.mark.parametrize(("path", "reference"), REFERENCES)
def test_frames_equal_lerobots_in_any_order_from_any_thread(path, reference) -> None:
    dataset, expected = reader.Dataset(path), np.load(pusht.FIXTURES / reference)
    top, wrist = expected["top"], expected["wrist"]
    assert len(dataset) == len(top) == 110

    def equal(i: int) -> bool:
        frame = dataset[i]
        same = np.array_equal(frame["observation.images.top"], top[i])
        return same and np.array_equal(frame["observation.images.wrist"], wrist[i])

    shuffled = np.random.default_rng(0).permutation(len(dataset)).tolist()
    assert all(map(equal, range(len(dataset))))
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert all(pool.map(equal, shuffled))


@pytest.mark.parametrize(("path", "reference"), REFERENCES)
def test_chunks_equal_lerobots(path, reference) -> None:
    dataset, expected = reader.Dataset(path), np.load(pusht.FIXTURES / reference)
    actions, pad = zip(*(dataset.chunk(i, 8) for i in range(len(dataset))), strict=True)
    np.testing.assert_array_equal(np.stack(actions), expected["action"])
    np.testing.assert_array_equal(np.stack(pad), expected["pad"])
    assert actions[0].dtype == np.float32


def test_frame_carries_its_task_and_bookkeeping() -> None:
    dataset = reader.Dataset(pusht.IMAGE)
    assert dataset[0]["task"] == "push the T block onto the target"
    assert dataset[20]["task"] == "move the T away"
    assert (dataset[20]["episode_index"], dataset[20]["frame_index"]) == (1, 0)
    assert dataset[21]["timestamp"] == np.float32(0.1)
    assert (dataset.num_episodes, dataset.fps) == (4, 10)
    with pytest.raises(IndexError, match="frame 110 of a dataset of 110"):
        dataset[110]


def test_read_decodes_only_the_cameras_asked_for() -> None:
    frame = reader.Dataset(pusht.IMAGE).read(3, ["observation.images.wrist"])
    assert "observation.images.wrist" in frame
    assert "observation.images.top" not in frame
    with pytest.raises(ValueError, match="has no camera 'front'"):
        reader.Dataset(pusht.IMAGE).read(3, ["front"])


@pytest.mark.parametrize(
    "path", [pusht.IMAGE, pusht.VIDEO, pusht.OLD], ids=["image", "video", "v2.1"]
)
def test_dataset_can_be_sent_to_another_process(path) -> None:
    dataset = reader.Dataset(path)
    before = dataset[50]
    after = pickle.loads(pickle.dumps(dataset))[50]
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


def test_empty_dataset_raises(tmp_path) -> None:
    copy = shutil.copytree(pusht.OLD, tmp_path / "old")
    (copy / "meta" / "episodes.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        reader.Dataset(copy)


def test_a_file_that_is_missing_is_named_with_its_episodes(copy) -> None:
    shutil.rmtree(copy / "data")
    with pytest.raises(FileNotFoundError, match=r"episodes 0 to 3 .*file-000\.parquet is missing"):
        reader.Dataset(copy)


def test_totals_that_do_not_add_up_are_told(copy, capsys) -> None:
    pusht.edit_info(copy, total_frames=200)
    assert len(reader.Dataset(copy)) == 110
    assert "info.json says 200 frames, its episodes have 110" in capsys.readouterr().err


def test_other_versions_and_absent_datasets_raise(copy, tmp_path) -> None:
    pusht.edit_info(copy, fps=None)
    with pytest.raises(ValueError, match=r"info\.json has no 'fps'"):
        reader.Dataset(copy)
    pusht.edit_info(copy, codebase_version="v1.6")
    with pytest.raises(ValueError, match=r"codebase_version is 'v1\.6', expected one of v2\.0, v2"):
        reader.Dataset(copy)
    with pytest.raises(FileNotFoundError, match="no LeRobot dataset at"):
        reader.Dataset(tmp_path / "absent")


def test_corrupt_files_name_file_episode_and_frame(copy, tmp_path) -> None:
    junk = pl.struct(bytes=pl.lit(b"junk"), path=pl.lit("x")).alias("observation.images.top")
    pusht.edit_data(copy, junk)
    with pytest.raises(
        ValueError,
        match=r"images.top of episode 1, frame 2: cannot decode it from .*file-000\.parquet",
    ):
        reader.Dataset(copy)[22]
    (copy / "data" / "chunk-000" / "file-000.parquet").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"cannot read .* from .*file-000\.parquet"):
        reader.Dataset(copy)
    video = shutil.copytree(pusht.VIDEO, tmp_path / "video")
    file = next((video / "videos" / "observation.images.top").rglob("*.mp4"))
    dataset = reader.Dataset(video)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"images.top of episode 3, frame 34: .*file-000\.mp4"):
        dataset[109]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"episode 0, frame 0: video file .* is missing"):
        reader.Dataset(video)[0]


def test_version_2_0_is_read_like_2_1(tmp_path) -> None:
    """The two differ in where their statistics lie, which nothing reads."""
    copy = shutil.copytree(pusht.OLD, tmp_path / "old")
    pusht.edit_info(copy, codebase_version="v2.0")
    (copy / "meta" / "episodes_stats.jsonl").unlink()
    dataset = reader.Dataset(copy)
    assert (len(dataset), dataset.num_episodes) == (110, 4)
    assert dataset[20]["task"] == "move the T away"
    fit.check(dataset, pusht.ROBOT)


def test_many_episodes_in_many_files_h264() -> None:
    """Six episodes over five data files in three chunks, one video; frames count up in it."""
    dataset = reader.Dataset(MULTI)
    assert dataset.num_episodes == 6
    frames = dataset.columns["frame_index"]
    np.testing.assert_array_equal(dataset.columns["index"], np.arange(len(dataset)))
    starts = np.flatnonzero(frames == 0)
    assert len(starts) == 6
    decoded = [dataset.image(i, dataset.cameras[0]) for i in range(len(dataset))]
    assert {image.shape for image in decoded} == {decoded[0].shape}
    for i in reversed(range(len(dataset))):
        np.testing.assert_array_equal(dataset.image(i, dataset.cameras[0]), decoded[i])


@pytest.mark.parametrize(
    "path", [pusht.IMAGE, pusht.VIDEO, pusht.OLD], ids=["image", "video", "v2.1"]
)
def test_chosen_episodes_are_those_of_the_whole(path, tmp_path) -> None:
    whole, chosen = reader.Dataset(path), reader.Dataset(path, episodes=[3, 1])
    assert (chosen.episodes, len(chosen)) == ([1, 3], 60)
    for i, original in ((0, 20), (24, 44), (25, 75), (59, 109)):
        for key, value in whole[original].items():
            np.testing.assert_array_equal(chosen[i][key], value)
        np.testing.assert_array_equal(chosen.chunk(i, 8)[0], whole.chunk(original, 8)[0])
    assert len(pickle.loads(pickle.dumps(chosen))) == 60
    with pytest.raises(ValueError, match=r"no episodes \[4, 9\] in dataset .* 4, 0 to 3"):
        reader.Dataset(path, episodes=[1, 4, 9])
    with pytest.raises(ValueError, match="no episodes were chosen"):
        reader.Dataset(path, episodes=[])


def test_files_of_other_episodes_need_not_be_there(tmp_path) -> None:
    copy = shutil.copytree(pusht.OLD, tmp_path / "old")
    for file in copy.rglob("episode_000002.*"):
        file.unlink()
    dataset = reader.Dataset(copy, episodes=[0, 3])
    assert dataset[-1 + len(dataset)]["episode_index"] == 3
    assert dataset.layout.files([0, 3], ["observation.images.top"]) == [
        "data/chunk-000/episode_000000.parquet",
        "data/chunk-000/episode_000003.parquet",
        "videos/chunk-000/observation.images.top/episode_000000.mp4",
        "videos/chunk-000/observation.images.top/episode_000003.mp4",
    ]
    with pytest.raises(FileNotFoundError, match=r"^episode 2 of .*episode_000002\.parquet is miss"):
        reader.Dataset(copy)


def test_bad_episodes_are_left_out_counted_and_named(tmp_path) -> None:
    copy = shutil.copytree(pusht.OLD, tmp_path / "old")
    data, top = copy / "data" / "chunk-000", copy / "videos" / "chunk-000"
    (data / "episode_000000.parquet").write_bytes(b"junk")
    file = top / "observation.images.wrist" / "episode_000001.mp4"
    file.write_bytes(file.read_bytes()[:2000])
    table = pl.read_parquet(data / "episode_000003.parquet")
    table.head(30).write_parquet(data / "episode_000003.parquet")
    with pytest.raises(ValueError, match=r"episode 0 of dataset .*cannot read"):
        reader.Dataset(copy)
    with pytest.raises(ValueError, match=r"has 30 frames of episode 3, the meta files say 35"):
        reader.Dataset(copy, episodes=[3])
    dataset = reader.Dataset(copy, skip_bad_episodes=True)
    assert dataset.episodes == [2]
    assert sorted(dataset.skipped) == [0, 1, 3]
    assert "episode_000001.mp4" in dataset.skipped[1]
    assert "episode 1, frame" in dataset.skipped[1]
    whole = reader.Dataset(pusht.OLD)
    np.testing.assert_array_equal(dataset[7]["action"], whole[52]["action"])
    assert len(pickle.loads(pickle.dumps(dataset))) == 30
    shutil.rmtree(copy / "videos")
    with pytest.raises(ValueError, match=r"no episode of dataset .* can be read: "):
        reader.Dataset(copy, skip_bad_episodes=True)


def test_an_episode_that_is_not_finite_can_be_left_out(copy) -> None:
    bad = pl.when(pl.col("index") == 27).then(float("nan")).otherwise(1.0).cast(pl.Float32)
    pusht.edit_data(copy, pl.concat_arr(bad, bad).alias("action"))
    dataset = reader.Dataset(copy, skip_bad_episodes=True)
    assert dataset.skipped == {1: "'action' is not finite in episode 1"}
    fit.check(dataset, pusht.ROBOT)


def test_missing_meta_files_are_named(tmp_path) -> None:
    old = shutil.copytree(pusht.OLD, tmp_path / "old")
    (old / "meta" / "episodes.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"episodes\.jsonl is missing"):
        reader.Dataset(old)
    new = shutil.copytree(pusht.IMAGE, tmp_path / "new")
    shutil.rmtree(new / "meta" / "episodes")
    with pytest.raises(FileNotFoundError, match=r"has no meta/episodes"):
        reader.Dataset(new)


def test_a_task_without_text_is_named(tmp_path) -> None:
    old = shutil.copytree(pusht.OLD, tmp_path / "old")
    file = old / "meta" / "tasks.jsonl"
    file.write_text(file.read_text().splitlines()[0])
    with pytest.raises(
        ValueError, match=r"episode 1, frame 0 .* has task_index 1, its meta files have \[0\]"
    ):
        reader.Dataset(old)[20]


def test_episodes_are_split_by_share_and_seed() -> None:
    train, held_out = reader.split(range(10), 0.2, seed=1)
    assert sorted(train + held_out) == list(range(10))
    assert len(held_out) == 2
    assert reader.split(range(10), 0.2, seed=1) == (train, held_out)
    assert reader.split(range(10), 0.2, seed=2) != (train, held_out)
    assert len(reader.split(range(10), 0.01)[1]) == 1, "at least one"
    for episodes, share in ((range(1), 0.5), (range(10), 0.99), (range(10), 0.0), ([], 0.5)):
        with pytest.raises(ValueError, match=r"cannot hold out .* at least one episode on each"):
            reader.split(episodes, share)


def test_memory_for_encoded_images_is_limited(monkeypatch) -> None:
    dataset, expected = reader.Dataset(pusht.IMAGE), reader.Dataset(pusht.IMAGE)
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 1)
    for camera in (*dataset.cameras, *dataset.cameras):
        np.testing.assert_array_equal(dataset.image(5, camera), expected.image(5, camera))
        assert [key for _, key in dataset._images._columns] == [camera]


@pytest.mark.parametrize("name", ["run [12]", "st*r?", "折り ü", "a:b", "x{y}%20", "~home", "k=v"])
def test_a_folder_may_have_any_name(name, tmp_path, monkeypatch) -> None:
    """Brackets are a pattern to polars, and `a:` a protocol to FFmpeg."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pusht.IMAGE, tmp_path / "run 1")
    for source in (pusht.IMAGE, pusht.OLD):
        folder = shutil.copytree(source, tmp_path / name / "set")
        expected = reader.Dataset(source)
        pusht.edit_data(tmp_path / "run 1", pl.lit(7).alias("task_index"))
        for path in (folder, f"./{name}/set/", pathlib.Path(name, "set")):
            dataset = reader.Dataset(path)
            assert dataset.task(0) == expected.task(0)
            camera = dataset.cameras[0]
            np.testing.assert_array_equal(dataset.image(3, camera), expected.image(3, camera))
        shutil.rmtree(folder)
