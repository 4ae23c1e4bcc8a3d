"""Frames and chunks equal LeRobot's own reader bit for bit; every defect of a dataset is named."""

import concurrent.futures
import dataclasses
import json
import pathlib
import pickle
import shutil

import numpy as np
import polars as pl
import pytest

from shallow_pi.data import lerobot, robots

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "lerobot"
IMAGE, VIDEO = FIXTURES / "pusht_v30_image", FIXTURES / "pusht_v30_video"
REFERENCES = [(IMAGE, "reference_v30_image.npz"), (VIDEO, "reference_v30_video.npz")]

PUSHT = robots.Robot(
    name="pusht",
    cameras={
        "base_0_rgb": "observation.images.top",
        "left_wrist_0_rgb": "observation.images.wrist",
    },
    state_dim=2,
    action_dim=2,
    fps=10,
)


@pytest.fixture
def copy(tmp_path) -> pathlib.Path:
    return shutil.copytree(IMAGE, tmp_path / "dataset")


def _edit_info(path: pathlib.Path, **changes) -> None:
    file = path / "meta" / "info.json"
    info = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in info.items() if v is not None}))


def _edit_data(path: pathlib.Path, *columns: pl.Expr | pl.Series) -> None:
    file = path / "data" / "chunk-000" / "file-000.parquet"
    pl.read_parquet(file).with_columns(*columns).write_parquet(file)


@pytest.mark.parametrize(("path", "reference"), REFERENCES, ids=["image", "video"])
def test_frames_equal_lerobots_in_any_order_from_any_thread(path, reference) -> None:
    dataset, expected = lerobot.Dataset(path), np.load(FIXTURES / reference)
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


@pytest.mark.parametrize(("path", "reference"), REFERENCES, ids=["image", "video"])
def test_chunks_equal_lerobots(path, reference) -> None:
    dataset, expected = lerobot.Dataset(path), np.load(FIXTURES / reference)
    actions, pad = zip(*(dataset.chunk(i, 8) for i in range(len(dataset))), strict=True)
    np.testing.assert_array_equal(np.stack(actions), expected["action"])
    np.testing.assert_array_equal(np.stack(pad), expected["pad"])
    assert actions[0].dtype == np.float32


def test_frame_carries_its_task_and_bookkeeping() -> None:
    dataset = lerobot.Dataset(IMAGE)
    assert dataset[0]["task"] == "push the T block onto the target"
    assert dataset[20]["task"] == "move the T away"
    assert (dataset[20]["episode_index"], dataset[20]["frame_index"]) == (1, 0)
    assert dataset[21]["timestamp"] == np.float32(0.1)
    assert (dataset.num_episodes, dataset.fps) == (4, 10)
    with pytest.raises(IndexError, match="frame 110 of a dataset of 110"):
        dataset[110]


def test_read_decodes_only_the_cameras_asked_for() -> None:
    frame = lerobot.Dataset(IMAGE).read(3, ["observation.images.wrist"])
    assert "observation.images.wrist" in frame
    assert "observation.images.top" not in frame
    with pytest.raises(ValueError, match="has no camera 'front'"):
        lerobot.Dataset(IMAGE).read(3, ["front"])


@pytest.mark.parametrize("path", [IMAGE, VIDEO], ids=["image", "video"])
def test_dataset_can_be_sent_to_another_process(path) -> None:
    dataset = lerobot.Dataset(path)
    before = dataset[50]
    after = pickle.loads(pickle.dumps(dataset))[50]
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)


def test_norm_stats_are_those_of_the_columns() -> None:
    dataset = lerobot.Dataset(VIDEO)
    stats = dataset.norm_stats(PUSHT, horizon=1)
    np.testing.assert_allclose(stats["actions"].mean, dataset.columns["action"].mean(0), rtol=1e-5)
    expected = np.quantile(dataset.columns["observation.state"].astype(float), 0.99, axis=0)
    np.testing.assert_array_equal(stats["state"].q99, expected)


def test_norm_stats_of_delta_actions_are_those_of_what_the_model_sees() -> None:
    dataset = lerobot.Dataset(VIDEO)
    robot = dataclasses.replace(PUSHT, delta=(True, False))
    seen = np.concatenate([dataset.chunk(i, 4)[0] for i in range(len(dataset))])
    seen = seen.reshape(-1, 4, 2).astype(float)
    seen[:, :, 0] -= dataset.columns["observation.state"][:, None, 0]
    stats = dataset.norm_stats(robot, horizon=4)["actions"]
    np.testing.assert_allclose(stats.std, seen.reshape(-1, 2).std(0), rtol=1e-5)


def test_fixture_passes_validation() -> None:
    lerobot.Dataset(IMAGE).validate(PUSHT)
    lerobot.Dataset(VIDEO).validate(PUSHT)


def test_missing_camera_state_and_fps_are_named(copy) -> None:
    dataset = lerobot.Dataset(copy)
    other = dict(PUSHT.cameras, right_wrist_0_rgb="observation.images.side")
    with pytest.raises(ValueError, match=r"lacks camera 'observation.images.side' .*images.top'"):
        dataset.validate(robots.Robot("pusht", other, 2, 2, 10))
    with pytest.raises(ValueError, match=r"lacks 'joints'; it has \['action', 'observation.st"):
        dataset.validate(robots.Robot("pusht", PUSHT.cameras, 2, 2, 10, state_key="joints"))
    with pytest.raises(ValueError, match=r"'action' .* has shape \(2,\), robot pusht .* \(3,\)"):
        dataset.validate(robots.Robot("pusht", PUSHT.cameras, 2, 3, 10))
    with pytest.raises(ValueError, match="recorded at 10 fps, robot pusht runs at 50"):
        dataset.validate(robots.Robot("pusht", PUSHT.cameras, 2, 2, 50))
    _edit_info(copy, fps=None)
    with pytest.raises(ValueError, match=r"info\.json has no 'fps'"):
        lerobot.Dataset(copy)


def test_nan_names_episode_and_frame(copy) -> None:
    bad = pl.when(pl.col("index") == 27).then(float("nan")).otherwise(1.0).cast(pl.Float32)
    _edit_data(copy, pl.concat_arr(bad, bad).alias("observation.state"))
    with pytest.raises(ValueError, match=r"'observation.state' .* in episode 1, frame 7: \[nan"):
        lerobot.Dataset(copy).validate(PUSHT)


def test_empty_dataset_raises(copy) -> None:
    _edit_info(copy, total_frames=0)
    with pytest.raises(ValueError, match="is empty"):
        lerobot.Dataset(copy)
    _edit_info(copy, total_frames=110)
    shutil.rmtree(copy / "data")
    with pytest.raises(ValueError, match="is empty"):
        lerobot.Dataset(copy)


def test_other_versions_and_absent_datasets_raise(copy, tmp_path) -> None:
    _edit_info(copy, codebase_version="v1.6")
    with pytest.raises(ValueError, match=r"has LeRobot format v1\.6, expected v3\.0"):
        lerobot.Dataset(copy)
    with pytest.raises(FileNotFoundError, match="no LeRobot dataset at"):
        lerobot.Dataset(tmp_path / "absent")


def test_frames_that_do_not_add_up_raise(copy) -> None:
    _edit_info(copy, total_frames=200)
    with pytest.raises(ValueError, match=r"has 110 frames in 1 data files but info\.json says 200"):
        lerobot.Dataset(copy)


def test_corrupt_files_name_file_episode_and_frame(copy, tmp_path) -> None:
    junk = pl.struct(bytes=pl.lit(b"junk"), path=pl.lit("x")).alias("observation.images.top")
    _edit_data(copy, junk)
    with pytest.raises(
        ValueError, match=r"images.top of episode 1, frame 2 in .*file-000\.parquet"
    ):
        lerobot.Dataset(copy)[22]
    (copy / "data" / "chunk-000" / "file-000.parquet").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"cannot read .* from .*file-000\.parquet"):
        lerobot.Dataset(copy)
    video = shutil.copytree(VIDEO, tmp_path / "video")
    file = next((video / "videos" / "observation.images.top").rglob("*.mp4"))
    dataset = lerobot.Dataset(video)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"images.top of episode 3, frame 34: .*file-000\.mp4"):
        dataset[109]
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"episode 0, frame 0: video file .* is missing"):
        dataset[0]
