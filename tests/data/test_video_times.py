"""Times of frames read from a file's index are those that a decoder gives them."""

import fractions
import pathlib

import av
import numpy as np
import pytest

from shallow_pi.data.lerobot import video, video_times

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "lerobot"
TICK = fractions.Fraction(1, 90_000)
REGULAR = np.arange(30) * 3000
VARIABLE = np.cumsum(np.random.default_rng(0).integers(1000, 6000, 30))


def _film(path, ticks=REGULAR, codec="libx264", container=None, **options):
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=30, options={"bf": "3", "g": "12", **options})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.time_base = TICK
        rng = np.random.default_rng(0)
        for tick in ticks:
            image = rng.integers(0, 256, (64, 64, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = int(tick), TICK
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def _decoded(path):
    with av.open(str(path)) as container:
        return np.array([frame.time for frame in container.decode(video=0)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ticks": VARIABLE},
        {"ticks": REGULAR + 18_000},
        {"ticks": REGULAR - 6000},
        {"bf": "0"},
        {"container": {"use_editlist": "0"}},
        {"container": {"movflags": "negative_cts_offsets"}},
        {"container": {"movflags": "faststart"}},
        {"container": {"movflags": "frag_keyframe+empty_moov"}},
    ],
    ids=lambda options: str(options.get("container", list(options))),
)
def test_times_of_mp4_are_those_of_the_decoder(tmp_path, options):
    path = _film(tmp_path / "a.mp4", **options)
    np.testing.assert_allclose(video_times.of(str(path)), _decoded(path), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["a.mkv", "a.ts"])
def test_times_of_other_containers_are_read_too(tmp_path, name):
    path = _film(tmp_path / name)
    np.testing.assert_allclose(video_times.of(str(path)), _decoded(path), rtol=0, atol=1e-9)


def test_lerobots_own_files_are_read_without_ffmpeg(monkeypatch):
    monkeypatch.setattr(video_times, "_demuxed", None)
    files = sorted(FIXTURES.rglob("*.mp4"))
    assert len(files) > 8
    for path in files:
        np.testing.assert_allclose(video_times.of(str(path)), _decoded(path), rtol=0, atol=1e-9)


def test_a_file_that_was_written_again_is_read_again(tmp_path):
    path = _film(tmp_path / "a.mp4")
    assert len(video_times.of(str(path))) == 30
    _film(path, REGULAR[:20])
    assert len(video_times.of(str(path))) == 20


def test_the_nearest_frame_is_found():
    shown = np.array([0.0, 0.1, 0.25, 0.3])
    asked = np.array([-1, 0.04, 0.06, 0.17, 0.18, 0.26, 9])
    np.testing.assert_array_equal(video_times.nearest(shown, asked), [0, 0, 1, 1, 2, 2, 3])
    np.testing.assert_array_equal(video_times.nearest(shown[:1], asked), 0)


def test_frames_that_a_file_was_cut_off_before_are_not_listed(tmp_path):
    path = _film(tmp_path / "a.mp4", container={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert 5 < len(video_times.of(str(path))) < 25


def test_a_frame_invented_by_the_decoder_is_refused(tmp_path):
    path = _film(tmp_path / "a.mp4", g="100")
    whole = bytearray(path.read_bytes())
    middle = whole.index(b"mdat") + (whole.index(b"moov") - whole.index(b"mdat")) // 2
    whole[middle : middle + 3000] = bytes(3000)
    path.write_bytes(whole)
    reader = video.Reader()
    reader.frame(path, 0.1, 0.01)
    with pytest.raises(ValueError, match=r"cannot decode .*a\.mp4 at 0\.\d+ s"):
        [reader.frame(path, i / 30, 0.01) for i in range(30)]
