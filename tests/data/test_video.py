"""A frame is the same whichever way the reader comes to it."""

import fractions
import struct

import av
import numpy as np
import pytest

from shallow_pi.data.lerobot import video

FPS, COUNT = 20, 90


@pytest.fixture(
    params=[
        pytest.param(("libx264", {"g": "2", "bf": "0"}), id="short groups"),
        pytest.param(("libx264", {"g": "30", "bf": "3"}), id="B frames"),
        pytest.param(("libx264", {"g": "12", "bf": "2", "x264-params": "open-gop=1"}), id="open"),
        pytest.param(("libsvtav1", {"g": "7", "preset": "12"}), id="av1"),
    ]
)
def film(request, tmp_path, monkeypatch):
    """A video of noise that drifts, and its frames in the order they are shown."""
    monkeypatch.setenv("SVT_LOG", "1")
    codec, options = request.param
    path, rng = tmp_path / "film.mp4", np.random.default_rng(0)
    scene = rng.integers(0, 256, (64, 96, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(COUNT):
            image = np.roll(scene, 5 * i, 1) // 2 + i
            frame = av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, fractions.Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == COUNT
    return path, frames


def test_frames_are_the_same_in_any_order(film):
    path, frames = film
    rng, reader = np.random.default_rng(1), video.Reader()
    jumps = [(i + step) for i in rng.integers(0, COUNT - 5, 25) for step in (0, 1, 3, 3, 4)]
    for i in (*jumps, *range(COUNT), *reversed(range(COUNT))):
        found = reader.frame(path, i / FPS, 0.4 / FPS)
        np.testing.assert_array_equal(found, frames[i], f"frame {i}")


def test_frames_in_order_are_decoded_once(film, monkeypatch):
    path, _ = film
    sought = []
    seek = video._Stream.seek
    monkeypatch.setattr(video._Stream, "seek", lambda s, t: (sought.append(t), seek(s, t)))
    reader = video.Reader()
    for i in range(COUNT):
        reader.frame(path, i / FPS, 0.4 / FPS)
    assert len(sought) == 1


def test_a_jump_beyond_the_group_seeks_instead_of_decoding_on(film, monkeypatch):
    path, _ = film
    reader = video.Reader()
    for i in range(40):  # Shows the reader how long groups are.
        reader.frame(path, i / FPS, 0.4 / FPS)
    (stream,) = reader._local.streams.values()
    decoded = []
    decode_to = video._Stream.decode_to

    def counted(self, seconds):
        inner, self.frames = self.frames, iter(())
        self.frames = (decoded.append(frame.time) or frame for frame in inner)
        return decode_to(self, seconds)

    monkeypatch.setattr(video._Stream, "decode_to", counted)
    group = round(stream.group * FPS)
    reader.frame(path, 57 / FPS, 0.4 / FPS)
    assert len(decoded) <= group + 3, "from one key frame, and what it takes to be sure"


@pytest.mark.parametrize("late", [0.5, 3.0])
def test_a_seek_that_lands_too_late_is_repeated_earlier(film, monkeypatch, late):
    """Imitates containers with an index that is not by presentation time."""
    path, frames = film
    seek = video._Stream.seek
    monkeypatch.setattr(video._Stream, "seek", lambda self, t: seek(self, t + late if t > 0 else t))
    for i in (30, 70, 45):
        found = video.Reader().frame(path, i / FPS, 0.4 / FPS)
        np.testing.assert_array_equal(found, frames[i], f"frame {i}")


def test_a_time_without_a_frame_is_an_error(film):
    path, frames = film
    reader = video.Reader()
    for seconds in (COUNT / FPS, 100.0, 0.5 / FPS):
        with pytest.raises(ValueError, match=r"has no frame within 0\.02.* is it cut off"):
            reader.frame(path, seconds, 0.4 / FPS)
    np.testing.assert_array_equal(reader.frame(path, 0.0, 0.4 / FPS), frames[0])


@pytest.mark.parametrize(
    ("matrix", "bright"),
    [
        ((0, 1, 0, -1, 0, 0), "right"),  # A quarter clockwise.
        ((0, -1, 0, 1, 0, 0), "left"),
        ((-1, 0, 0, 0, -1, 0), "bottom"),
    ],
)
def test_a_video_taken_sideways_is_turned(tmp_path, matrix, bright):
    """As players and LeRobot's decoder (torchcodec from 0.11 on) show it."""
    path, image = tmp_path / "film.mp4", np.zeros((32, 64, 3), np.uint8)
    image[:16] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    # The matrix of version 0 of a track's header, the last entry of which stays.
    at = data.find(b"tkhd") + 44
    data[at : at + 24] = struct.pack(">6i", *(65536 * entry for entry in matrix))
    path.write_bytes(data)
    shown = video.Reader().frame(path, 0.0, 0.01).astype(int).mean(axis=2)
    sides = {"left": shown[:, 2], "right": shown[:, -3], "top": shown[2], "bottom": shown[-3]}
    assert {side for side, values in sides.items() if values.min() > 200} == {bright}
