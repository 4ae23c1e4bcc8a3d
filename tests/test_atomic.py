"""What fails leaves nothing behind, and nobody sees a part."""

import errno
import pathlib

import numpy as np
import pytest

from shallow_pi import atomic
from shallow_pi.data.robots import normalize
from shallow_pi.speed import report as speed_report


def _everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_fails_leaves_neither_itself_nor_its_parents(tmp_path, error):
    def fail():
        with atomic.folder(tmp_path / "kept/new/target") as partial:
            (partial / "file").write_text("half")
            raise error

    (tmp_path / "kept").mkdir()
    with pytest.raises(error):
        fail()
    assert _everything(tmp_path) == ["kept"]


def test_a_folder_appears_whole_and_replaces_none(tmp_path):
    with atomic.folder(tmp_path / "new/target") as partial:
        (partial / "file").write_text("whole")
        assert not (tmp_path / "new/target").exists()
    assert _everything(tmp_path) == ["new", "new/target", "new/target/file"]

    def again():
        with atomic.folder(tmp_path / "new/target") as partial:
            (partial / "file").write_text("other")

    with pytest.raises(OSError, match="not empty"):
        again()
    assert (tmp_path / "new/target/file").read_text() == "whole"
    assert _everything(tmp_path) == ["new", "new/target", "new/target/file"]


def test_parents_that_another_process_uses_stay(tmp_path):
    def fail():
        with atomic.parents(tmp_path / "a/b/c"):
            (tmp_path / "a/other").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert _everything(tmp_path) == ["a", "a/other"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_that_fails_stays_as_it_was(tmp_path, monkeypatch, error):
    path = tmp_path / "file"
    path.write_text("old")

    def stop(self, target):
        raise error

    monkeypatch.setattr(pathlib.Path, "replace", stop)
    with pytest.raises(error):
        atomic.write(path, "new")
    assert path.read_text() == "old"
    assert _everything(tmp_path) == ["file"]


def _report(folder, value):
    speed_report.write(folder, "benchmark.json", {"ms": value}, {})


def _statistics(folder, value):
    normalize.save(folder, {"state": normalize.NormStats(np.full(2, value), np.ones(2))})


@pytest.mark.parametrize("write", [_report, _statistics])
def test_results_that_cannot_be_written_leave_the_earlier_ones(tmp_path, monkeypatch, write):
    def full(self, data, *_, **__):
        with self.open("w"):  # What was there is gone.
            raise OSError(errno.ENOSPC, "No space left on device")

    write(tmp_path, 1.0)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    for name in ("write_text", "write_bytes"):
        monkeypatch.setattr(pathlib.Path, name, full)
    with pytest.raises(OSError, match="No space left") as error:
        write(tmp_path, 2.0)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before
    assert _everything(tmp_path) == [path.name]
