"""An image is the one recorded with its frame, read for what it is or refused by name."""

import fractions
import io
import json
import pathlib
import shutil

import av
import numpy as np
import polars as pl
import pytest
from PIL import Image

from shallow_pi.data import fit, frame_cache
from shallow_pi.data.lerobot import images, reader
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.data.robots import robot as robots

TOP = "observation.images.top"
FPS, COUNT = 10, 20
ROBOT = robots.Robot("any", {"base_0_rgb": TOP}, state_dim=1, action_dim=1, fps=FPS)


def _film(path, times, codec="libx264", pixels="yuv420p", options=None) -> pathlib.Path:
    """A video whose image i is grey, 12 * i bright, shown at times[i]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tick = fractions.Fraction(1, 90_000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options or {"crf": "5", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
        stream.codec_context.time_base = tick
        for i, time in enumerate(times):
            image = np.full((32, 32, 3), 12 * i, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time * 90_000), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def _dataset(folder, film, timestamps) -> pathlib.Path:
    """Two episodes with one and the same video and timestamps."""
    numbers = np.zeros((len(timestamps), 1), np.float32)
    vectors = {"observation.state": numbers, "action": numbers}
    with lerobot_writer.Writer(folder, FPS) as writer:
        for _ in range(2):
            films = {TOP: lerobot_writer.Film(film, sample=np.zeros((1, 32, 32, 3), np.uint8))}
            writer.add(films, vectors, ["go"] * len(numbers))
            film = shutil.copyfile(film, film.with_stem(film.stem + "_again"))
    data = folder / "data" / "chunk-000" / "file-000.parquet"
    stamps = pl.Series("timestamp", np.tile(timestamps, 2), pl.Float32)
    pl.read_parquet(data).with_columns(stamps).write_parquet(data)
    return folder


def _seen(dataset, start=0) -> list[int]:
    """Numbers of the images that an episode's frames have."""
    rows = range(start, start + len(dataset) // 2)
    return [round(float(dataset.image(i, TOP).mean()) / 12) for i in rows]


GRID = np.arange(COUNT) / FPS
CLOCK = np.arange(COUNT) / 9.7
JITTER = np.cumsum(np.random.default_rng(0).uniform(0.05, 0.2, COUNT))


@pytest.mark.parametrize(
    ("shown", "timestamps", "expected"),
    [
        pytest.param(GRID, GRID[5:], range(5, COUNT), id="trimmed start"),
        pytest.param(CLOCK, CLOCK, range(COUNT), id="slow clock"),
        pytest.param(JITTER, JITTER, range(COUNT), id="variable rate"),
        pytest.param(JITTER, JITTER[::3], range(0, COUNT, 3), id="frames left out"),
        pytest.param(GRID + 0.2, GRID + 0.2, range(COUNT), id="late video"),
        pytest.param(GRID, GRID + np.linspace(0, 0.02, COUNT), range(COUNT), id="small drift"),
        pytest.param(np.arange(COUNT) / 9.99, GRID, range(COUNT), id="fractional rate"),
    ],
)
def test_image_is_the_one_of_the_recorded_time(tmp_path, shown, timestamps, expected) -> None:
    dataset = reader.Dataset(
        _dataset(tmp_path / "set", _film(tmp_path / "a.mp4", shown), timestamps)
    )
    assert _seen(dataset) == list(expected)
    assert _seen(dataset, start=len(timestamps)) == list(expected)


@pytest.mark.parametrize(
    ("shown", "timestamps", "worst"),
    [
        pytest.param(GRID, CLOCK, "frame 19: recorded at 1.9588 s, .*0.0588 s away", id="drift"),
        pytest.param(GRID, GRID + 0.04, r"frame \d+: .*0.0400 s away, at most 0.0250", id="offset"),
        pytest.param(GRID + 0.2, GRID, "frame 0: .* nearest image at 0.2000 s.*2 of 20", id="late"),
        pytest.param(GRID[:-3], GRID, "frame 19: .*3 of 20 .* ends at 1.6000", id="short"),
        pytest.param(GRID, GRID * np.nan, "frame 0: recorded at nan s", id="no times"),
        pytest.param(GRID, GRID * 0, "frame 1: .* 19 timestamps do not rise", id="zeros"),
        pytest.param(GRID, 1.7e9 + GRID, "frame 1: recorded at 1700000000.0000 s", id="date"),
        pytest.param(GRID, 1000 * GRID, "frame 19: .*19 of 20 frames", id="milliseconds"),
    ],
)
def test_frames_without_an_image_are_refused_when_opened(
    tmp_path, shown, timestamps, worst
) -> None:
    folder = _dataset(tmp_path / "set", _film(tmp_path / "a.mp4", shown), timestamps)
    expected = rf"{TOP} of episode 0, {worst}.*2 of 2 episodes of dataset .*/set: so the videos"
    with pytest.raises(ValueError, match=expected):
        reader.Dataset(folder)
    assert len(reader.Dataset(folder, cameras=[])) == 2 * COUNT, "videos that are not read"


def test_an_episode_without_images_can_be_left_out(tmp_path) -> None:
    folder = _dataset(tmp_path / "set", _film(tmp_path / "a.mp4", GRID), GRID)
    second = folder / "videos" / TOP / "chunk-000" / "file-001.mp4"
    _film(second, GRID[:9])
    dataset = reader.Dataset(folder, skip_bad_episodes=True)
    assert dataset.episodes == [0]
    assert "11 of 20 frames" in dataset.skipped[1]
    second.unlink()
    assert len(reader.Dataset(folder)) == 2 * COUNT, "nobody asked for the video"
    with pytest.raises(ValueError, match=r"episode 1, frame 0: video file .*001\.mp4 is missing"):
        reader.Dataset(folder, cameras=[TOP])


def _version_2(root, film, lengths, starts=(0, 0)) -> pathlib.Path:
    """Episodes of a video each; `starts` are the first timestamps."""
    (root / "meta").mkdir(parents=True)
    info = {"codebase_version": "v2.1", "fps": FPS, "features": {TOP: {"dtype": "video"}}}
    (root / "meta" / "info.json").write_text(json.dumps(info))
    rows = [{"episode_index": n, "length": length} for n, length in enumerate(lengths)]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for n, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        data = root / f"data/chunk-000/episode_{n:06d}.parquet"
        video = root / f"videos/chunk-000/{TOP}/episode_{n:06d}.mp4"
        for path in (data, video):
            path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(film, video)
        index = pl.Series("frame_index", np.arange(length))
        pl.DataFrame([index, (index / FPS + start).alias("timestamp")]).write_parquet(data)
    return root


def test_images_after_an_episodes_last_frame_are_told(tmp_path, capsys) -> None:
    """A start that was cut out of the rows alone shifts every image, which fits all the same."""
    film = _film(tmp_path / "a.mp4", GRID)
    reader.Dataset(_version_2(tmp_path / "set", film, (15, COUNT)))
    told = capsys.readouterr().err
    assert "5 images of videos/chunk-000/observation.images.top/episode_000000.mp4" in told
    assert "renumbered, images lag behind" in told
    for number, (lengths, starts) in enumerate(
        [((COUNT, COUNT), (0, 0)), ((COUNT - 1, COUNT - 1), (0, 0)), ((10, 10), (0.5, 0.5))]
    ):
        reader.Dataset(_version_2(tmp_path / str(number), film, lengths, starts))
    assert not capsys.readouterr().err, "as recorded, an image more, times as recorded"


def test_episodes_with_the_same_stretch_of_video_are_told(tmp_path, capsys) -> None:
    """As LeRobot's merges of several files left them."""
    half = COUNT // 2
    folder = _dataset(tmp_path / "set", _film(tmp_path / "a.mp4", GRID), GRID[:half])
    meta = folder / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    table = pl.read_parquet(meta).with_columns(pl.lit(0).alias(f"videos/{TOP}/file_index"))
    for start, shared in ((1.0, ""), (0.5, "episodes 0 and 1 share 0.5 s of videos/")):
        starts = pl.Series(f"videos/{TOP}/from_timestamp", [0.0, start])
        table.with_columns(starts).write_parquet(meta)
        assert len(reader.Dataset(folder)) == COUNT
        told = capsys.readouterr().err
        assert (shared in told) if shared else ("share" not in told), told
    # Times that run on through the file, as in no version of the format.
    data = folder / "data" / "chunk-000" / "file-000.parquet"
    ends = pl.Series(f"videos/{TOP}/from_timestamp", [0.5, 1.5])
    table.with_columns(ends).write_parquet(meta)
    late = (pl.col("timestamp") + 0.4).cast(pl.Float32)
    pl.read_parquet(data).with_columns(late).write_parquet(data)
    assert reader.Dataset(folder, skip_bad_episodes=True).episodes == [0]
    assert "episodes 0 and 1 share 0.4 s of videos/" in capsys.readouterr().err
    starts = pl.Series(f"videos/{TOP}/from_timestamp", [0, None], pl.Float64)
    table.with_columns(starts).write_parquet(meta)
    with pytest.raises(ValueError, match=r"meta/episodes has no '.*from_timestamp' of episode 1; "):
        reader.Dataset(folder)
    dataset = reader.Dataset(folder, skip_bad_episodes=True)
    assert dataset.episodes == [0]
    assert frame_cache.key(dataset, TOP, 32)


def test_only_a_share_of_very_many_regular_videos_is_checked(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(images, "MAX_CHECKED", 1)
    folder = _dataset(tmp_path / "set", _film(tmp_path / "a.mp4", GRID), GRID)
    _film(folder / "videos" / TOP / "chunk-000" / "file-001.mp4", GRID[:9])
    dataset = reader.Dataset(folder)
    with pytest.raises(ValueError, match=r"episode 1, frame 19: .* no frame within 0\.0250 s of"):
        dataset.image(2 * COUNT - 1, TOP)
    data = folder / "data" / "chunk-000" / "file-000.parquet"
    later = pl.col("timestamp") + pl.when(pl.col("episode_index") == 1).then(0.01).otherwise(0)
    pl.read_parquet(data).with_columns(later.cast(pl.Float32)).write_parquet(data)
    with pytest.raises(ValueError, match="1 of 2 episodes"):
        reader.Dataset(folder)


def test_float32_times_of_a_long_episode_are_made_exact() -> None:
    frames = np.arange(10**6)
    exact = frames / 30
    found = images.times(exact.astype(np.float32), frames, 30.0)
    np.testing.assert_array_equal(found, exact)
    later = exact[:1000] + 0.001
    np.testing.assert_array_equal(images.times(later, frames[:1000], 30.0), later)


@pytest.mark.parametrize(
    ("shape", "names", "expected"),
    [
        ([480, 640, 3], ["height", "width", "channels"], (480, 640)),
        ([3, 480, 640], ["channels", "height", "width"], (480, 640)),
        ([3, 480, 640], None, (480, 640)),
        ([480, 640, 3], [["height", "width", "channel"]], (480, 640)),
        ([480, 640], None, None),
        (None, None, None),
    ],
)
def test_declared_size_is_read_in_any_order(shape, names, expected) -> None:
    assert images.declared_size({"shape": shape, "names": names}) == expected


def _encoded(image, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, **{"format": "PNG", **options})
    return data.getvalue()


def _with_images(folder, column) -> reader.Dataset:
    """A dataset whose camera is stored as `column`."""
    length = len(column)
    with lerobot_writer.Writer(folder, FPS) as writer:
        films = {TOP: np.zeros((length, 6, 8, 3), np.uint8)}
        writer.add_episode(films, np.zeros((length, 1)), np.zeros((length, 1)), "go")
    data = folder / "data" / "chunk-000" / "file-000.parquet"
    pl.read_parquet(data).with_columns(pl.Series(TOP, column)).write_parquet(data)
    return reader.Dataset(folder)


def test_image_files_that_are_missing_are_counted_when_a_dataset_is_opened(tmp_path, capsys):
    folder = tmp_path / "set"
    with lerobot_writer.Writer(folder, FPS) as writer:
        for _ in range(3):
            films = {TOP: np.zeros((4, 6, 8, 3), np.uint8)}
            writer.add_episode(films, np.zeros((4, 1)), np.zeros((4, 1)), "go")
    data = folder / "data" / "chunk-000" / "file-000.parquet"
    table = pl.read_parquet(data)
    places = [f"images/{TOP}/episode_{n:06d}/frame_{i}.png" for n in range(3) for i in range(4)]
    named = [{"bytes": None, "path": place} for place in places]
    table.with_columns(pl.Series(TOP, named)).write_parquet(data)
    for place, encoded in zip(places, table[TOP], strict=True):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(encoded["bytes"])
    assert len(reader.Dataset(folder, cameras=[TOP])) == 12
    for place in (places[5], places[6], places[9]):
        (folder / place).unlink()
    with pytest.raises(
        ValueError,
        match=r"episode 1, frame 1: its file 'images.*frame_1.png' is missing, .*\n3 of 12 frames "
        r"have no image of it, in 2 of 3 episodes .*--data.skip-bad-episodes",
    ):
        reader.Dataset(folder, cameras=[TOP])
    assert len(reader.Dataset(folder, cameras=[TOP], episodes=[0])) == 4
    found = reader.Dataset(folder, cameras=[TOP], skip_bad_episodes=True)
    assert (found.episodes, list(found.skipped)) == ([0], [1, 2])
    assert "episode 2 of dataset" in capsys.readouterr().err


@pytest.mark.parametrize(("without", "left"), [([0], [1, 2]), ([1, 2], [0]), ([1], [0, 2])])
def test_a_camera_that_some_episodes_lack_is_told_when_a_dataset_is_opened(tmp_path, without, left):
    """It was added, or unplugged, between two sessions of a recording."""
    meta = tmp_path / "meta"
    meta.mkdir()
    info = {"codebase_version": "v2.1", "fps": FPS, "features": {TOP: {"dtype": "image"}}}
    (meta / "info.json").write_text(json.dumps(info))
    rows = [{"episode_index": n, "length": 4} for n in range(3)]
    (meta / "episodes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    image = io.BytesIO()
    Image.fromarray(COLOUR).save(image, "PNG")
    for n in range(3):
        table = pl.DataFrame({"episode_index": [n] * 4, "frame_index": range(4)})
        if n not in without:
            table = table.with_columns(pl.Series(TOP, _structs(*[image.getvalue()] * 4)))
        file = tmp_path / "data" / "chunk-000" / f"episode_{n:06d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        table.write_parquet(file)
    with pytest.raises(
        ValueError,
        match=rf"top of episode {without[0]}, .*episode_00000{without[0]}.parquet has no such "
        rf"column\n{4 * len(without)} of 12 frames .* in {len(without)} of 3 .*--data.skip-bad",
    ):
        reader.Dataset(tmp_path, cameras=[TOP])
    found = reader.Dataset(tmp_path, cameras=[TOP], skip_bad_episodes=True)
    assert (found.episodes, list(found.skipped)) == (left, without)
    np.testing.assert_array_equal(found.image(len(found) - 1, TOP), COLOUR)


def _structs(*encoded) -> list[dict]:
    return [{"bytes": data, "path": None} for data in encoded]


COLOUR = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
GREY = np.repeat(COLOUR[..., :1], 3, axis=-1)


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.fromarray(COLOUR), {}, COLOUR),
        (Image.fromarray(COLOUR), {"format": "BMP"}, COLOUR),
        (Image.fromarray(COLOUR).convert("RGBA"), {}, COLOUR),
        (Image.fromarray(COLOUR[..., 0]), {}, GREY),
        (Image.fromarray(COLOUR[..., 0]).convert("P"), {}, GREY),
        (Image.fromarray(COLOUR[..., 0]).convert("LA"), {}, GREY),
        (Image.fromarray(COLOUR[..., 0] > 127), {}, 255 * (GREY > 127)),
        (Image.fromarray(255 - GREY).convert("CMYK"), {"format": "TIFF"}, 255 - GREY),
    ],
    ids=["RGB", "BMP", "RGBA", "grey", "palette", "grey alpha", "1 bit", "CMYK"],
)
def test_every_kind_of_colour_becomes_rgb(tmp_path, capsys, image, options, expected) -> None:
    dataset = _with_images(tmp_path / "set", _structs(_encoded(image, **options)))
    np.testing.assert_array_equal(dataset.image(0, TOP), expected)
    fit.check(dataset, ROBOT)
    assert "warning" not in capsys.readouterr().err


def test_an_image_taken_sideways_is_turned(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # The camera was turned: show it a quarter clockwise.
    column = _structs(_encoded(Image.fromarray(COLOUR), exif=exif))
    found = _with_images(tmp_path / "set", column).image(0, TOP)
    np.testing.assert_array_equal(found, np.rot90(COLOUR, -1))


def test_transparency_and_changing_sizes_are_told_once(tmp_path, capsys) -> None:
    clear = np.concatenate([COLOUR, np.full((6, 8, 1), 9, np.uint8)], axis=-1)
    column = _structs(
        _encoded(Image.fromarray(clear)),
        _encoded(Image.fromarray(COLOUR[:4])),
        _encoded(Image.fromarray(COLOUR[:3])),
    )
    dataset = _with_images(tmp_path / "set", column)
    np.testing.assert_array_equal(dataset.image(0, TOP), COLOUR)
    np.testing.assert_array_equal(dataset.image(1, TOP), COLOUR[:4])
    dataset.image(1, TOP)
    told = capsys.readouterr().err
    assert told.count("partly transparent") == 1
    assert told.count("expected 6 by 8, got 4 by 8") == 1


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_depth_is_read_as_numbers_and_refused_as_a_camera(tmp_path, mode) -> None:
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    depth = np.linspace(300, 3000, 48).reshape(6, 8).astype(kind)
    column = _structs(_encoded(Image.fromarray(depth), format="TIFF"))
    dataset = _with_images(tmp_path / "set", column)
    np.testing.assert_array_equal(dataset.image(0, TOP), depth[..., None])
    with pytest.raises(ValueError, match=rf"'{TOP}' \(for base_0_rgb\) of .* records depth \(its"):
        fit.check(dataset, ROBOT)


@pytest.mark.parametrize(
    ("codec", "pixels", "options"),
    [
        ("ffv1", "gray16le", None),
        ("ffv1", "gray12le", None),
        ("libx265", "gray12le", {"x265-params": "lossless=1:log-level=none"}),
    ],
)
def test_depth_video_is_read_as_numbers(tmp_path, codec, pixels, options) -> None:
    path = tmp_path / ("a.mkv" if codec == "ffv1" else "a.mp4")
    code = np.arange(64, dtype=np.uint16).reshape(8, 8).repeat(8, 0).repeat(8, 1) * 60
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixels
        for i in range(3):
            frame = av.VideoFrame(64, 64, pixels)
            rows = np.zeros((64, frame.planes[0].line_size // 2), np.uint16)
            rows[:, :64] = code + i
            frame.planes[0].update(rows.tobytes())
            frame.pts, frame.time_base = i, fractions.Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    folder = _dataset(tmp_path / "set", _film(tmp_path / "b.mp4", GRID[:3]), GRID[:3])
    for file in (folder / "videos").rglob("*.mp4"):
        file.write_bytes(path.read_bytes())
    dataset = reader.Dataset(folder)
    np.testing.assert_array_equal(dataset.image(2, TOP), (code + 2)[..., None])
    with pytest.raises(ValueError, match=rf"above 8 bits \({pixels}\)"):
        fit.check(dataset, ROBOT)


def test_deep_colour_and_grey_video_are_images(tmp_path) -> None:
    silent = {"crf": "5", "x265-params": "log-level=none"}
    film = _film(tmp_path / "deep.mp4", GRID, "libx265", "yuv420p10le", silent)
    deep = reader.Dataset(_dataset(tmp_path / "deep", film, GRID))
    assert _seen(deep) == list(range(COUNT))
    film = _film(tmp_path / "grey.mp4", GRID, "libx264", "gray")
    grey = reader.Dataset(_dataset(tmp_path / "grey", film, GRID)).image(9, TOP)
    np.testing.assert_allclose(grey, 107, atol=2)
    assert (grey == grey[..., :1]).all()
    fit.check(deep, ROBOT)


def test_images_are_found_however_they_are_stored(tmp_path) -> None:
    data = _encoded(Image.fromarray(COLOUR))
    nested = pl.Series([COLOUR.tolist()], dtype=pl.List(pl.List(pl.List(pl.UInt8))))
    columns = [[data], nested, pl.Series([COLOUR.transpose(2, 0, 1).tolist()]), ["frame_0.png"]]
    for path in ("frame_0.png", "/home/me/frame_0.png", "C:\\rec\\frame_0.png"):
        columns.append([{"bytes": None, "path": path}])
    for number, column in enumerate(columns):
        folder = tmp_path / str(number)
        dataset = _with_images(folder, column)
        beside = folder / "images" / TOP / "episode_000000"
        beside.mkdir(parents=True)
        (beside / "frame_0.png").write_bytes(data)
        np.testing.assert_array_equal(dataset.image(0, TOP), COLOUR, f"column {number}")
    (beside / "frame_0.png").unlink()
    dataset = reader.Dataset(folder)
    with pytest.raises(
        ValueError, match=r"episode 0, frame 0: .*frame_0\.png' is missing, in .*episode_000000 too"
    ):
        dataset.image(0, TOP)
    dataset = _with_images(tmp_path / "base64", ["iVBORw0KGgo" * 400])
    with pytest.raises(ValueError, match=r"its file 'iVBORw0KGgo\w{,100} is missing, in "):
        dataset.image(0, TOP)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_damaged_image_is_named(tmp_path, kind) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    whole = _encoded(Image.fromarray(noise), format=kind)
    broken = whole[:40] + b"\0" * 40 + whole[80:]
    column = _structs(whole[: len(whole) // 2], broken[: len(broken) - 9], b"", None)
    dataset = _with_images(tmp_path / "set", column)
    for i in range(4):
        with pytest.raises(ValueError, match=rf"^{TOP} of episode 0, frame {i}: .*file-000\.parq"):
            dataset.image(i, TOP)


def test_a_file_that_is_no_video_is_named_when_opened(tmp_path) -> None:
    folder = _dataset(tmp_path / "set", _film(tmp_path / "a.mp4", GRID), GRID)
    file = folder / "videos" / TOP / "chunk-000" / "file-001.mp4"
    whole = file.read_bytes()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    for content, reason in (
        (whole[: len(whole) // 2], "cut off"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ((tmp_path / "sound.mp4").read_bytes(), "no video stream"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"episode 1, frame 0: .*001\.mp4.*{reason}"):
            reader.Dataset(folder)
