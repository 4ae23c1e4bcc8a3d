"""Datasets exactly as openpi's converters write them open, are inspected, converted and batched."""

import io
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

from shallow_pi.data import data_config, inspection, loader, opening
from shallow_pi.data.lerobot import columns, convert, reader
from shallow_pi.data.robots import robot as robots
from shallow_pi.data.robots import tokenizer

Feature = dict[str, Any]
LENGTHS = (6, 5, 7)
ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
MOTORS = [f"{side}_{name}" for side in ("right", "left") for name in ARM]


def _vector(size: int, names: list[Any]) -> Feature:
    return {"dtype": "float32", "shape": [size], "names": names}


def _image(height: int, width: int, *, channels_first: bool = False) -> Feature:
    if channels_first:
        shape, names = [3, height, width], ["channels", "height", "width"]
    else:
        shape, names = [height, width, 3], ["height", "width", "channel"]
    return {"dtype": "image", "shape": shape, "names": names}


# convert_libero_data_to_lerobot.py, which wrote physical-intelligence/libero; sides divided by 8.
LIBERO = {
    "image": _image(32, 32),
    "wrist_image": _image(32, 32),
    "state": _vector(8, ["state"]),
    "actions": _vector(7, ["actions"]),
}
# convert_aloha_data_to_lerobot.py: all four cameras, velocities and efforts where recorded.
ALOHA = {
    **{
        key: _vector(14, [MOTORS])
        for key in ("observation.state", "action", "observation.velocity", "observation.effort")
    },
    **{
        f"observation.images.cam_{name}": _image(60, 80, channels_first=True)
        for name in ("high", "low", "left_wrist", "right_wrist")
    },
}
# convert_droid_data_to_lerobot.py: the gripper is a vector of one, stored as a plain number.
DROID = {
    "exterior_image_1_left": _image(22, 40),
    "exterior_image_2_left": _image(22, 40),
    "wrist_image_left": _image(22, 40),
    "joint_position": _vector(7, ["joint_position"]),
    "gripper_position": _vector(1, ["gripper_position"]),
    "actions": _vector(8, ["actions"]),
}
SETS = {
    "libero": (LIBERO, 10, "panda", []),
    "aloha": (
        ALOHA,
        50,
        "aloha",
        ["observation.effort", "observation.images.cam_low", "observation.velocity"],
    ),
    "droid": (DROID, 15, "panda", ["exterior_image_2_left"]),
}
BOOK = {
    key: {"dtype": "float32" if key == "timestamp" else "int64", "shape": [1], "names": None}
    for key in columns.BOOKKEEPING
}


def _png(height: int, width: int, grey: int) -> bytes:
    data = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), grey, np.uint8)).save(data, "PNG")
    return data.getvalue()


def _record(
    root: pathlib.Path, features: Mapping[str, Feature], fps: int, robot_type: str
) -> dict[str, np.ndarray]:
    """Write LeRobot's format v2.0 as its pinned version in openpi does; gives the vectors."""
    rng, start, total = np.random.default_rng(0), 0, sum(LENGTHS)
    vectors = {
        key: rng.uniform(0.1, 0.9, (total, f["shape"][0])).astype(np.float32)
        for key, f in features.items()
        if f["dtype"] == "float32"
    }
    (root / "meta").mkdir(parents=True)
    (root / "data" / "chunk-000").mkdir(parents=True)
    prompts = ["put the bowl on the plate", "close the drawer"]
    for episode, length in enumerate(LENGTHS):
        series = []
        for key, feature in features.items():
            if feature["dtype"] == "image":
                first = feature["names"][0] == "channels"
                height, width = feature["shape"][1:] if first else feature["shape"][:2]
                encoded = [_png(height, width, 10 * (start + i)) for i in range(length)]
                names = [f"frame_{i:06d}.png" for i in range(length)]
                series.append(pl.DataFrame({"bytes": encoded, "path": names}).to_struct(key))
            else:
                own = vectors[key][start : start + length]
                series.append(pl.Series(key, own[:, 0] if own.shape[1] == 1 else own))
        index = np.arange(length)
        book = {
            "timestamp": (index / fps).astype(np.float32),
            "frame_index": index,
            "episode_index": np.full(length, episode),
            "index": index + start,
            "task_index": np.full(length, episode % 2),
        }
        series += [pl.Series(key, value) for key, value in book.items()]
        file = root / "data" / "chunk-000" / f"episode_{episode:06d}.parquet"
        pl.DataFrame(series).write_parquet(file)
        start += length
    info = {
        "codebase_version": "v2.0",
        "robot_type": robot_type,
        "total_episodes": len(LENGTHS),
        "total_frames": total,
        "total_tasks": 2,
        "total_videos": 0,
        "total_chunks": 1,
        "chunks_size": 1000,
        "fps": fps,
        "splits": {"train": f"0:{len(LENGTHS)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/"
        "episode_{episode_index:06d}.mp4",
        "features": {**features, **BOOK},
    }
    (root / "meta" / "info.json").write_text(json.dumps(info, indent=4))
    (root / "meta" / "stats.json").write_text("{}")
    episodes = [
        {"episode_index": n, "tasks": [prompts[n % 2]], "length": length}
        for n, length in enumerate(LENGTHS)
    ]
    tasks = [{"task_index": n, "task": text} for n, text in enumerate(prompts)]
    for name, rows in (("episodes", episodes), ("tasks", tasks)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "meta" / f"{name}.jsonl").write_text(lines)
    return vectors


@pytest.fixture(scope="module", params=SETS)
def recorded(request, tmp_path_factory):
    """The robot's name, the dataset, and its vectors."""
    folder = tmp_path_factory.mktemp(request.param) / "set"
    features, fps, robot_type, _ = SETS[request.param]
    return request.param, folder, _record(folder, features, fps, robot_type)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.model"
    tokenizer.train(["put the bowl on the plate", "close the drawer"], path, vocab_size=320)
    return path


def test_a_set_of_openpis_converters_becomes_batches(recorded, words, tiny_config, capsys) -> None:
    name, folder, vectors = recorded
    robot = robots.find(name)
    model = tiny_config(
        vocab_size=320, max_token_len=24, action_dim=16, cameras=tuple(robot.cameras)
    )
    config = data_config.DataConfig(
        path=str(folder), robot=name, tokenizer=str(words), held_out=0.3, asset_id=name
    )
    found = opening.open_data(config, model, None)
    assert len(found.train) + len(found.held_out) == sum(LENGTHS)
    unused = SETS[name][3]
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert [line.rpartition(": ")[2] for line in told] == [", ".join(unused)] * bool(unused)
    samples = inspection.draw(found.train, found.assets, 4)
    assert set(inspection.prompts(samples)) <= {
        "put the bowl on the plate",
        "close the drawer",
    }
    batch = next(loader.Loader(found.train, 4, num_threads=0))
    assert batch.actions.shape == (4, 5, 16)
    assert np.abs(batch.observation.state[:, : robot.state_dim]).max() < 5
    dataset = reader.Dataset(folder)
    state = np.concatenate([vectors[key] for key in robot.state_keys], axis=1)
    np.testing.assert_array_equal(robot.state(dataset.columns), state)
    camera = robot.cameras["base_0_rgb"]
    assert [dataset.image(i, camera)[0, 0, 0] for i in (0, 17)] == [0, 170]


def test_a_set_of_openpis_converters_converts_to_version_3(recorded, tmp_path) -> None:
    name, folder, vectors = recorded
    new = reader.Dataset(convert.convert(reader.Dataset(folder), tmp_path / "new", "copy"))
    assert new.layout.version == "v3.0"
    for key, expected in vectors.items():
        np.testing.assert_array_equal(new.columns[key], expected)
        assert len(new.names(key)) in (0, expected.shape[1])
    if name == "aloha":
        assert new.names("action") == tuple(MOTORS)
    old = reader.Dataset(folder)
    for i in (0, 9, 17):
        assert new.task(i) == old.task(i)
        for camera in old.cameras:
            np.testing.assert_array_equal(new.image(i, camera), old.image(i, camera))
