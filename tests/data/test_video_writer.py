"""Video reads back frame by frame, close to the original, with the requested key frames."""

import os
import pathlib

import av
import numpy as np
import pytest

from shallow_pi.data.lerobot import video, video_writer


def _film(length=12, shape=(48, 64)):
    """A square that moves over a soft ground: what codecs are made for."""
    ground = np.linspace(40, 200, shape[1]).astype(np.uint8)
    film = np.broadcast_to(ground[None, None, :, None], (length, *shape, 3)).copy()
    for i, image in enumerate(film):
        image[10:26, 2 * i : 2 * i + 16] = (200, 60, 30)
    return film


@pytest.mark.parametrize("codec", ["av1", "h264"])
@pytest.mark.parametrize("group", [1, 2, 5])
def test_images_come_back_in_any_order_from_short_groups(tmp_path, codec, group):
    film, path = _film(), tmp_path / "films" / "a.mp4"
    encoding = video_writer.Encoding(codec, group, crf=12)
    encoder = video_writer.Encoder(path, 10, (48, 64), encoding)
    for image in film:
        encoder.add(image)
    encoder.close()
    reader = video.Reader()
    for i in np.random.default_rng(0).permutation(len(film)):
        found = reader.frame(path, i / 10, tolerance=0.04)
        error = np.abs(found.astype(int) - film[i])
        assert error.mean() < 4, f"frame {i} is off by {error.mean():.1f}"
    with av.open(str(path)) as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert len(keys) == len(film)
    assert keys == [i % group == 0 for i in range(len(film))]
    described = video_writer.describe(path, 10.0)
    assert (described["video.codec"], described["video.height"]) == (codec, 48)
    assert described["video.fps"] == 10


def test_bad_sizes_and_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="even sizes, got images of 47 by 64"):
        video_writer.Encoder(tmp_path / "a.mp4", 10, (47, 64), video_writer.Encoding())
    with pytest.raises(ValueError, match="group >= 1 and crf in 0…63, got 0 and 30"):
        video_writer.Encoding(group=0)
    # The type checker, where it runs, is the first to object.
    with pytest.raises((ValueError, TypeError), match="mpeg2"):
        video_writer.Encoding("mpeg2")


def test_a_process_that_wrote_a_video_keeps_its_priority(tmp_path):
    """SVT-AV1 gives it, and with it its children, real-time priority where it may (root)."""
    tasks = pathlib.Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("needs Linux's list of threads")
    # A test that encoded without our writer may have left this thread the encoder's priority.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    before, others = os.sched_getscheduler(0), {task.name for task in tasks.iterdir()}
    encoder = video_writer.Encoder(tmp_path / "film.mp4", 10, (64, 64), video_writer.Encoding())
    for grey in range(4):
        encoder.add(np.full((64, 64, 3), 60 * grey, np.uint8))
    begun = [int(task.name) for task in tasks.iterdir() if task.name not in others]
    policies = {os.sched_getscheduler(task) for task in begun}
    encoder.close()
    assert not policies & {os.SCHED_FIFO, os.SCHED_RR}
    assert os.sched_getscheduler(0) == before
