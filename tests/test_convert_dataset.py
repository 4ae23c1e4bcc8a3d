"""An old dataset comes out as v3.0, its frames the same or close, readable again."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest

from shallow_pi.data.lerobot import reader

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "convert_dataset.py"
FIXTURES = ROOT / "tests" / "fixtures" / "lerobot"
OLD = FIXTURES / "pusht_v21_video"


@pytest.fixture
def convert(monkeypatch, tmp_path):
    """Runs the command on a source; gives the dataset it made."""
    spec = importlib.util.spec_from_file_location("convert_dataset", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def call(source, *arguments):
        module.main([str(source), str(tmp_path / "new"), *arguments])
        return reader.Dataset(tmp_path / "new")

    return call


def _same_numbers(found, source):
    assert found.info["codebase_version"] == "v3.0"
    assert (found.fps, len(found), found.episodes) == (source.fps, len(source), source.episodes)
    for key, column in source.columns.items():
        if key != "task_index":
            np.testing.assert_array_equal(found.columns[key], column)
            assert found.columns[key].dtype == column.dtype
    assert [found.task(i) for i in range(110)] == [source.task(i) for i in range(110)]


def test_an_old_dataset_keeps_every_bit(convert):
    found, source = convert(OLD), reader.Dataset(OLD)
    _same_numbers(found, source)
    for camera in source.cameras:
        for i in (0, 19, 20, 57, 109):
            np.testing.assert_array_equal(found.picture(i, camera), source.picture(i, camera))
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
def test_pictures_can_be_encoded_anew(convert, codec):
    source = reader.Dataset(FIXTURES / "pusht_v30_image")
    found = convert(FIXTURES / "pusht_v30_image", "--pictures", codec, "--crf", "12")
    _same_numbers(found, source)
    for camera in source.cameras:
        assert found.features[camera]["info"]["video.codec"] == codec
        for i in (109, 0, 19, 20, 57):
            close = found.picture(i, camera).astype(int) - source.picture(i, camera)
            assert np.abs(close).mean() < 3
    assert len(list((found.path / "videos").rglob("*.mp4"))) == 2
    row = found.layout.rows[1]
    assert row["videos/observation.images.top/from_timestamp"] == 2.0
    assert row["videos/observation.images.top/to_timestamp"] == 4.5


def test_video_can_become_images(convert):
    found, source = convert(OLD, "--pictures", "png"), reader.Dataset(OLD)
    _same_numbers(found, source)
    for i in (0, 57, 109):
        np.testing.assert_array_equal(
            found.picture(i, source.cameras[0]), source.picture(i, source.cameras[0])
        )
    assert found.features[source.cameras[0]]["dtype"] == "image"


def test_what_cannot_be_done_is_told_and_leaves_nothing(convert, tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        convert(FIXTURES / "pusht_v30_video")
    assert "is v3.0 already; to encode its videos anew give --pictures" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        convert(tmp_path / "absent")
    assert "no LeRobot dataset at" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    convert(OLD)
    with pytest.raises(SystemExit, match="1"):
        convert(OLD)
    assert "exists; remove it" in capsys.readouterr().err
