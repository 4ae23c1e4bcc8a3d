"""Recorded messages read back unchanged, and a bad disk loses only records."""

import os

import numpy as np
import pytest

from shallow_pi.serving import protocol, recorder

METADATA = {"robot": "turntable"}


def pair(number):
    observation = protocol.pack({"state": np.float32([number])})
    return observation, protocol.pack({"actions": np.full((2, 1), number, np.float32)})


def recorded(folder, numbers, **options):
    """The recorder's only file, after these were added."""
    record = recorder.Recorder(folder, METADATA, **options)
    name = record.begin(1)
    for number in numbers:
        record.add(name, 1e9 + number, *pair(number))
    record.end(name)
    record.close()
    return folder / name, record


def states(path):
    return [found.observation["state"][0] for found in recorder.read(path)]


def test_records_come_back_in_order_with_their_answers(tmp_path):
    path, record = recorded(tmp_path, range(5))
    found = list(recorder.read(path))
    assert [r.observation["state"][0] for r in found] == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(found[3].answer["actions"], [[3], [3]])
    assert found[0].time <= found[-1].time
    assert record.dropped == 0


def test_two_connections_lie_in_two_files(tmp_path):
    record = recorder.Recorder(tmp_path, METADATA)
    names = [record.begin(number) for number in (1, 2)]
    for number in range(6):
        record.add(names[number % 2], 1e9 + number, *pair(number))
    record.close()
    assert states(tmp_path / names[0]) == [0, 2, 4]
    assert states(tmp_path / names[1]) == [1, 3, 5]


def test_a_connection_without_a_record_makes_no_file(tmp_path):
    recorded(tmp_path, [])
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_cut_off_gives_what_is_whole(tmp_path):
    path, _ = recorded(tmp_path, range(4))
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert states(path) == [0, 1, 2]


def test_recording_ends_at_its_limit(tmp_path, caplog):
    size = sum(map(len, pair(0)))
    path, record = recorded(tmp_path, range(5), limit_bytes=3 * size)
    assert states(path) == [0, 1, 2]
    assert record.dropped == 2
    assert f"not everything is recorded to {tmp_path}: --record-limit-gb is rea" in caplog.text


def test_a_disk_that_fails_ends_the_recording_alone(tmp_path, caplog):
    record = recorder.Recorder(tmp_path / "there", METADATA)
    (tmp_path / "there").rmdir()
    name = record.begin(1)
    for number in range(3):
        record.add(name, 1e9 + number, *pair(number))
    record.close()
    assert record.dropped == 3
    assert "ends: " in caplog.text


def test_a_disk_that_is_full_ends_the_recording_alone(tmp_path, small_disk, caplog):
    """Part of a record waits to be written, and fails again when its file is closed."""
    with small_disk(6):
        path, record = recorded(tmp_path, range(3))
        assert not record._thread.is_alive()
    assert record.dropped == 3
    assert path.stat().st_size <= 6
    assert "ends: " in caplog.text


def test_what_the_disk_cannot_follow_is_dropped_not_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(recorder, "BACKLOG", 0)
    _, record = recorded(tmp_path, range(3))
    assert record.dropped == 3
    assert "the disk is too slow" in caplog.text


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        recorder.Recorder(tmp_path / "file", METADATA)
    if os.geteuid() == 0:
        return  # Root may write everywhere.
    (closed := tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ValueError, match=r"cannot write recordings to .*closed"):
        recorder.Recorder(closed, METADATA)


@pytest.mark.parametrize("content", [b"", b"text", protocol.pack({"format": "other"})])
def test_another_file_is_no_recording(tmp_path, content):
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(ValueError, match="is no recording of this server"):
        list(recorder.read(tmp_path / "other"))
