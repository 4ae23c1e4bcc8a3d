"""Images of the cache are those of the dataset, whatever happened to its files in between."""

import os
import pathlib
import pickle
import pwd
import shutil
import threading

import numpy as np
import polars as pl
import pytest
from PIL import Image

from shallow_pi import user_cache
from shallow_pi.data import frame_cache
from shallow_pi.data.lerobot import reader
from shallow_pi.data.robots import transforms

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "lerobot" / "pusht_v30_video"
CAMERA = "observation.images.top"
SIZE = 40


class Counted(reader.Dataset):
    """Counts the images that are decoded."""

    reads = 0

    def image(self, i, camera):
        """As the dataset's."""
        self.reads += 1
        return super().image(i, camera)


@pytest.fixture
def dataset():
    return Counted(FIXTURE)


def _cache(dataset, folder, share=1.0):
    return frame_cache.FrameCache(dataset, [CAMERA], SIZE, folder, share)


def _file(folder) -> pathlib.Path:
    (file,) = folder.glob("*.u8")
    return file


def test_each_image_is_decoded_once_and_is_the_one_the_model_sees(dataset, tmp_path):
    frames = [3, 40, 109, 0]
    expected = [
        transforms.resize_with_pad(reader.Dataset(FIXTURE).image(i, CAMERA), SIZE) for i in frames
    ]
    cache = _cache(dataset, tmp_path / "frames")
    for repeat in range(2):
        for i, image in zip(frames, expected, strict=True):
            np.testing.assert_array_equal(cache.image(i, CAMERA), image, f"time {repeat}")
    assert dataset.reads == 4
    # Another run, and another process, find them.
    again = _cache(dataset, tmp_path / "frames")
    there = pickle.loads(pickle.dumps(cache))
    for other in (again, there):
        np.testing.assert_array_equal(other.image(40, CAMERA), expected[1])
    assert dataset.reads == 4
    assert _file(tmp_path / "frames").stat().st_size <= 110 * (8 + 3 * SIZE**2)


def test_episodes_of_a_part_share_the_file_of_the_whole(dataset, tmp_path):
    part = dataset.select(dataset.episodes[2:])
    first = int(np.flatnonzero(dataset.columns["episode_index"] == dataset.episodes[2])[0])
    cached = _cache(dataset, tmp_path).image(first + 1, CAMERA)
    unread = reader.Dataset(FIXTURE, episodes=part.episodes)
    unread.image = None
    np.testing.assert_array_equal(_cache(unread, tmp_path).image(1, CAMERA), cached)


def test_a_record_that_was_cut_off_or_damaged_is_written_anew(dataset, tmp_path):
    cache = _cache(dataset, tmp_path)
    expected = {i: cache.image(i, CAMERA) for i in (0, 1, 2)}
    record = 8 + 3 * SIZE**2
    with _file(tmp_path).open("r+b") as file:
        file.seek(500)
        file.write(bytes(range(256)))  # An image, behind its checksum.
        file.truncate(3 * record - 100)  # A crash in the middle of the last one.
    reads = dataset.reads
    for i in (1, 0, 2):
        np.testing.assert_array_equal(_cache(dataset, tmp_path).image(i, CAMERA), expected[i])
    assert dataset.reads == reads + 2
    for i in (0, 1, 2):
        _cache(dataset, tmp_path).image(i, CAMERA)
    assert dataset.reads == reads + 2


def test_several_writers_at_once_agree(dataset, tmp_path):
    expected = [
        transforms.resize_with_pad(dataset.image(i, CAMERA), SIZE) for i in range(0, 110, 10)
    ]
    wrong = []

    def read(cache):
        for k in range(11):
            if not np.array_equal(cache.image(10 * k, CAMERA), expected[k]):
                wrong.append(k)

    threads = [
        threading.Thread(target=read, args=(_cache(reader.Dataset(FIXTURE), tmp_path),))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_key_changes_with_whatever_decides_the_bytes(tmp_path):
    copy = shutil.copytree(FIXTURE, tmp_path / "copy")
    video = min(copy.rglob("*.mp4"))
    os.utime(video, ns=(0, 10**18))
    keys = [frame_cache.key(reader.Dataset(copy), CAMERA, size) for size in (40, 48)]
    os.utime(video, ns=(0, 10**18 + 1))
    keys.append(frame_cache.key(reader.Dataset(copy), CAMERA, 40))
    video.write_bytes(video.read_bytes() + b"x")
    os.utime(video, ns=(0, 10**18))
    keys.append(frame_cache.key(reader.Dataset(copy), CAMERA, 40))
    data = min((copy / "data").rglob("*.parquet"))
    os.utime(data, ns=(0, 10**18))
    keys.append(frame_cache.key(reader.Dataset(copy), CAMERA, 40))
    assert len(set(keys)) == 5
    moved = shutil.copytree(copy, tmp_path / "moved")  # Keeps the times.
    assert frame_cache.key(reader.Dataset(moved), CAMERA, 40) == keys[-1]
    subset = reader.Dataset(copy, episodes=[1])
    assert frame_cache.key(subset, CAMERA, 40) == keys[-1]


@pytest.mark.parametrize("inside", ["", "images/observation.images.top/episode_000000/"])
def test_the_key_changes_with_image_files_beside_the_data(tmp_path, inside):
    copy = shutil.copytree(FIXTURE.with_name("pusht_v30_image"), tmp_path / "copy")
    folder = copy / inside if inside else copy / "data" / "chunk-000"
    folder.mkdir(parents=True, exist_ok=True)
    (data,) = (copy / "data").rglob("*.parquet")
    table = pl.read_parquet(data)
    names = [f"{inside}{i}.png" for i in range(len(table))]
    for name in names:
        (folder / pathlib.Path(name).name).write_bytes(table[CAMERA][0]["bytes"])
    column = pl.Series(CAMERA, [{"bytes": None, "path": name} for name in names])
    table.with_columns(column).write_parquet(data)
    dataset = reader.Dataset(copy)
    key = frame_cache.key(dataset, CAMERA, 40)
    assert frame_cache.key(reader.Dataset(copy, episodes=[1]), CAMERA, 40) == key
    assert dataset.image(30, CAMERA).any()
    # Corrected in place, as blue for red.
    Image.fromarray(dataset.image(30, CAMERA)[..., ::-1]).save(folder / "30.png")
    assert frame_cache.key(reader.Dataset(copy), CAMERA, 40) != key


def test_a_limit_keeps_a_part_and_says_so(dataset, tmp_path, capsys):
    record = 8 + 3 * SIZE**2
    everything = [[dataset], [CAMERA], SIZE, tmp_path]
    assert frame_cache.share(*everything, 110 * record) == 1.0
    assert frame_cache.share(*everything) == 1.0
    assert not capsys.readouterr().err
    share = frame_cache.share(*everything, 55 * record)
    assert share == 0.5
    assert "holds 50% of the images" in capsys.readouterr().err
    cache = _cache(dataset, tmp_path, share)
    for i in (54, 54, 55, 55):
        cache.image(i, CAMERA)
    assert dataset.reads == 3
    assert _file(tmp_path).stat().st_size == 55 * record


def test_a_disk_that_is_short_limits_the_cache(dataset, tmp_path, monkeypatch, capsys):
    record = 8 + 3 * SIZE**2
    free = frame_cache.RESERVE + 11 * record
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, free))
    assert frame_cache.share([dataset], [CAMERA], SIZE, tmp_path) == pytest.approx(0.1)
    assert "(the disk has free)" in capsys.readouterr().err


def test_a_disk_that_fills_up_stops_the_cache_but_not_the_run(
    dataset, tmp_path, monkeypatch, capsys
):
    cache = _cache(dataset, tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    expected = transforms.resize_with_pad(dataset.image(5, CAMERA), SIZE)
    for _ in range(3):
        np.testing.assert_array_equal(cache.image(5, CAMERA), expected)
    warned = capsys.readouterr().err
    assert "".join(warned.split()).count("Nospaceleftondevice") == 1


def test_an_unwritable_folder_is_reported(dataset, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"no place for the frame cache at .*file.*--data\.cache-dir"):
        _cache(dataset, tmp_path / "file" / "frames")


def test_the_default_folder_follows_the_variable(monkeypatch):
    monkeypatch.setenv("SHALLOW_PI_CACHE", "/somewhere")
    assert user_cache.folder("frames") == pathlib.Path("/somewhere/frames")
    monkeypatch.delenv("SHALLOW_PI_CACHE")
    assert user_cache.folder("frames") == pathlib.Path("~/.cache/shallow_pi/frames").expanduser()


def test_a_user_without_a_home_is_told_which_variable_to_set(monkeypatch):
    for name in ("HOME", "SHALLOW_PI_CACHE"):
        monkeypatch.delenv(name, raising=False)
    # As for the users that containers make up.
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["no such user"])
    with pytest.raises(ValueError, match=r"user \d+ has none: set SHALLOW_PI_CACHE to a folder"):
        user_cache.folder("frames")
