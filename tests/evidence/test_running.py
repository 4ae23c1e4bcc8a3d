"""Outcomes of episodes hold what their simulator tells of them, and nothing made up."""

import pytest

from shallow_pi.evidence import running
from shallow_pi.evidence.claims import catalogue, cells


def _expert(situation, tmp_path, **fields):
    job = running.Job(cells.Cell("expert", situation), (cells.EPISODE_SEED,), **fields)
    (block,) = running.measure(job, tmp_path)
    return block


def test_an_episode_of_the_tabletop_tells_of_collisions_and_its_disc(tmp_path):
    block = _expert(cells.Situation(("moving",)), tmp_path)
    assert tuple(block.columns) == cells.COLUMNS["episodes"]
    assert block.columns["success"] == [1.0]
    assert block.columns["disc_speed"][0] in (-30, -15, 15, 30)
    assert block.columns["path_mm"][0] > 50


def test_an_episode_can_be_cut_off(tmp_path):
    block = _expert(cells.Situation(("touch",)), tmp_path, max_seconds=0.2)
    assert (block.columns["success"], block.columns["steps"]) == ([0.0], [4.0])


def test_meta_world_tells_neither_of_collisions_nor_of_a_disc(tmp_path):
    pytest.importorskip("metaworld", reason="needs the extra metaworld")
    (situation,) = {column.situation for column in catalogue.CLAIMS["metaworld"].columns}
    block = _expert(situation, tmp_path)
    assert list(block.columns) == ["success", "steps", "path_mm", "jerk"]
    assert block.tasks == ("reach",)
    assert block.columns["success"] == [1.0]
    assert cells.from_json(block.to_json()) == block
