"""Lines of results: what is written is read, by whomever and however often it was interrupted."""

import dataclasses
import os

import pytest

from shallow_pi import atomic
from shallow_pi.evidence.claims import cells

SITUATION = cells.Situation(("touch", "moving"), late=3, executor="late")
CELL = cells.Cell("l6-s0", SITUATION)
ORIGIN = {"commit": "abc", "device": "cpu", "seconds": 1.5}


def _block(seeds, success, digest="d", cell=CELL):
    columns = {name: [0.5] * len(seeds) for name in cells.COLUMNS["episodes"]}
    tasks = tuple("moving" if seed % 2 else "touch" for seed in seeds)
    columns["success"] = [success] * len(seeds)
    return cells.Block(cell, digest, tuple(seeds), tasks, columns, ORIGIN)


def test_a_line_gives_its_block_back():
    block = _block([4, 5, 6, 9], 1)
    assert '"seeds":[[4,3],[9,1]]' in block.to_json()
    assert cells.from_json(block.to_json()) == block


def test_what_a_simulator_does_not_tell_is_absent_and_the_rest_is_needed():
    block = _block([4, 5], 1)
    columns = {n: v for n, v in block.columns.items() if n not in ("collided", "disc_speed")}
    known = dataclasses.replace(block, columns=columns)
    assert cells.from_json(known.to_json()) == known
    del columns["jerk"]
    with pytest.raises(ValueError, match=r"expected a line of results.*jerk"):
        cells.from_json(dataclasses.replace(block, columns=columns).to_json())


def test_blocks_of_several_files_add_up(tmp_path):
    cells.append(tmp_path / "a.jsonl", _block([1, 2], 1))
    cells.append(tmp_path / "b.jsonl", _block([3], 0))
    other = dataclasses.replace(CELL, policy="l4-s0")
    cells.append(tmp_path / "b.jsonl", _block([1], 1, cell=other))
    found = cells.read(tmp_path)
    assert (found.seeds(CELL), found.seeds(other)) == ({1, 2, 3}, {1})
    assert found.column(CELL, "success", [3, 1]).tolist() == [0, 1]
    assert found.tasks[CELL] == {1: "moving", 2: "touch", 3: "moving"}
    again = dataclasses.replace(_block([3], 0), origin={**ORIGIN, "commit": "def"})
    cells.append(tmp_path / "c.jsonl", again)
    commits = [origin["commit"] for origin in cells.read(tmp_path).origins[CELL]]
    assert commits == ["abc", "def"], "of each block whose results hold"


def test_a_line_cut_short_is_left_out_and_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(_block([1], 1).to_json()[:-40])
    cells.append(path, _block([2], 1))
    assert cells.read(tmp_path).seeds(CELL) == {2}


def test_a_disk_with_room_for_a_part_of_a_line_is_an_error(tmp_path, monkeypatch):
    path, write = tmp_path / "a.jsonl", os.write
    monkeypatch.setattr(atomic.os, "write", lambda file, data: write(file, data[:-9]))
    with pytest.raises(OSError, match=r"a\.jsonl cannot be written \(No space left"):
        cells.append(path, _block([1], 1))
    monkeypatch.undo()
    cells.append(path, _block([2], 1))
    assert cells.read(tmp_path).seeds(CELL) == {2}


def test_results_of_another_training_are_not_mixed_in(tmp_path):
    cells.append(tmp_path / "a.jsonl", _block([1, 2], 0, digest="old"))
    cells.append(tmp_path / "b.jsonl", _block([3], 1, digest="new"))
    assert cells.read(tmp_path).seeds(CELL) == {3}  # The later line's.
    assert cells.read(tmp_path, {"l6-s0": "old"}).seeds(CELL) == {1, 2}
    assert cells.read(tmp_path, {"l6-s0": "third"}).seeds(CELL) == set()
    cells.append(tmp_path / "b.jsonl", _block([2], 0, digest="old"))
    cells.append(tmp_path / "b.jsonl", _block([4], 1, digest="new"))
    assert cells.read(tmp_path).seeds(CELL) == {3, 4}, "wherever the lines of the last one stand"


def test_a_line_that_is_something_else_is_refused_with_its_place(tmp_path):
    (tmp_path / "a.jsonl").write_text(_block([1], 1).to_json() + '\n{"kind":"episodes"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: expected a line of results"):
        cells.read(tmp_path)


@pytest.mark.parametrize("kind", cells.COLUMNS)
def test_no_column_has_the_name_of_a_field(kind):
    fields = {field.name for field in dataclasses.fields(cells.Situation)}
    assert not fields & set(cells.COLUMNS[kind])
