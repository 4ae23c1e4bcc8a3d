"""Statistics survive openpi's file format, and both normalizations invert."""

import json

import exact_stats
import numpy as np
import pytest

from shallow_pi.data.robots import normalize


def _values(shape: tuple[int, ...] = (200, 3)) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape) * [1.0, 10.0, 0.1] + [0.0, 5.0, -3.0]


def test_formulas_are_those_of_openpi() -> None:
    x, stats = _values(), exact_stats.of(_values())
    z = (x - stats.mean) / (stats.std + 1e-6)
    q = (x - stats.q01) / (stats.q99 - stats.q01 + 1e-6) * 2 - 1
    np.testing.assert_allclose(normalize.normalize(x, stats, "z_score"), z, atol=1e-5)
    np.testing.assert_allclose(normalize.normalize(x, stats, "quantile"), q, atol=1e-5)


@pytest.mark.parametrize("kind", ["z_score", "quantile"])
def test_unnormalize_inverts_normalize(kind: normalize.Kind) -> None:
    x, stats = _values(), exact_stats.of(_values())
    back = normalize.unnormalize(normalize.normalize(x, stats, kind), stats, kind)
    np.testing.assert_allclose(back, x, rtol=1e-5, atol=1e-5)
    assert back.dtype == np.float32


@pytest.mark.parametrize("kind", ["z_score", "quantile"])
def test_constant_dimension_stays_finite_and_inverts(kind: normalize.Kind) -> None:
    stats = exact_stats.of(np.full((10, 1), 7.0))
    normalized = normalize.normalize(np.array([[7.0]]), stats, kind)
    assert np.isfinite(normalized).all()
    np.testing.assert_allclose(normalize.unnormalize(normalized, stats, kind), 7.0, rtol=1e-6)


def test_only_dimensions_that_hardly_moved_are_kept_where_they_were() -> None:
    mean, std = np.array([0.0, 7.0, 300.0, 0.0]), np.array([0.4, 0.0, 0.1, 0.01])
    stats = normalize.NormStats(mean, std)
    values = np.array([[90.0, 7.01, 400.0, 9.0], [-90.0, 6.0, 299.9, -9.0]])
    kept = normalize.steady(values, stats)
    np.testing.assert_array_equal(kept[:, [0, 3]], values[:, [0, 3]])
    np.testing.assert_array_equal(kept[:, 1], 7)
    np.testing.assert_allclose(kept[:, 2], [301.16, 299.9], atol=0.01)
    np.testing.assert_array_equal(normalize.steady(values[:, :2], stats), kept[:, :2])


def test_the_dimensions_that_hardly_moved_are_looked_for_once(monkeypatch) -> None:
    """A robot's policy keeps its state steady in every inference."""
    stats, looked, find = exact_stats.of(_values()), [], normalize.still
    monkeypatch.setattr(normalize, "still", lambda given: looked.append(given) or find(given))
    for values in _values()[:3]:
        np.testing.assert_array_equal(normalize.steady(values, stats), values)
    assert looked == [stats]


def test_longer_statistics_are_cut_to_the_values() -> None:
    stats = exact_stats.of(_values())
    two = normalize.normalize(_values()[:, :2], stats, "z_score")
    np.testing.assert_array_equal(two, normalize.normalize(_values(), stats, "z_score")[:, :2])


def test_shorter_statistics_raise() -> None:
    with pytest.raises(ValueError, match="have 3 dimensions but the values have 4"):
        normalize.normalize(np.zeros((1, 4)), exact_stats.of(_values()), "z_score")


def test_save_and_load_keep_every_bit_in_openpis_layout(tmp_path) -> None:
    stats = {"state": exact_stats.of(_values()), "actions": exact_stats.of(_values() * 2)}
    normalize.save(tmp_path / "asset", stats)
    content = json.loads((tmp_path / "asset" / "norm_stats.json").read_text())
    assert set(content["norm_stats"]["actions"]) == {"mean", "std", "q01", "q99"}
    loaded = normalize.load(tmp_path / "asset")
    for key, value in stats.items():
        for name in ("mean", "std", "q01", "q99"):
            np.testing.assert_array_equal(getattr(loaded[key], name), getattr(value, name))


def test_percentiles_may_be_absent_where_the_mean_normalizes(tmp_path) -> None:
    for more in ({}, {"q01": None, "q99": None}):
        entry = {"mean": [0.0, 1.0], "std": [1.0, 2.0], **more}
        text = json.dumps({"norm_stats": {"state": entry}})
        (tmp_path / "norm_stats.json").write_text(text, encoding="utf-8-sig")
        stats = normalize.load(tmp_path)["state"]
        values = np.array([1.0, 3.0])
        np.testing.assert_allclose(normalize.normalize(values, stats, "z_score"), 1, atol=1e-5)
        with pytest.raises(ValueError, match=r"without q01 and q99 .*compute_norm_stats\.py"):
            normalize.normalize(values, stats, "quantile")
        normalize.save(tmp_path / "again", {"state": stats})
        assert normalize.load(tmp_path / "again")["state"].q01 is None


def test_statistics_that_cannot_be_the_robots_are_refused_or_told(capsys) -> None:
    mean = normalize.NormStats(np.zeros(3), np.ones(3))
    with pytest.raises(
        ValueError, match=r"'state' have no q01 and q99, and π0\.5 .*--data\.norm-st"
    ):
        normalize.check({"state": mean}, {"state": 3}, "quantile")
    with pytest.raises(
        ValueError, match=r"'state' have 3 dimensions, the robot has 4: they are an"
    ):
        normalize.check({"state": mean}, {"state": 4}, "z_score")
    with pytest.raises(ValueError, match=r"lack 'actions'; there are \['state'\]: compute them"):
        normalize.check({"state": mean}, {"actions": 3}, "z_score")
    for theirs, ours in (("action", "actions"), ("observation.state", "state")):
        with pytest.raises(
            ValueError, match=rf"lack '{ours}'; .*: call '{theirs}' so if it is the"
        ):
            normalize.check({theirs: mean}, {ours: 3}, "z_score")
    for padding in (0, 1):
        std = np.array([1.0, 2.0, padding])
        normalize.check({"state": normalize.NormStats(np.zeros(3), std)}, {"state": 2}, "z_score")
    assert capsys.readouterr().err == ""
    moving = normalize.NormStats(np.array([0, 0, 0.3]), np.ones(3))
    normalize.check({"state": moving}, {"state": 2}, "z_score")
    assert "3 dimensions that move, the robot has 2: are they another" in capsys.readouterr().err


def test_bad_statistics_raise(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no normalization statistics at"):
        normalize.load(tmp_path)
    (tmp_path / "norm_stats.json").write_text('{"norm_stats": {"state": {"mean": [1]}}}')
    with pytest.raises(ValueError, match=r"is not a norm_stats\.json file"):
        normalize.load(tmp_path)
    (tmp_path / "norm_stats.json").write_text(
        '{"norm_stats": {"state": {"mean": [1], "std": [NaN]}}}'
    )
    with pytest.raises(
        ValueError, match=r"norm_stats\.json: .*std is not finite in dimension \[0\]"
    ):
        normalize.load(tmp_path)
    with pytest.raises(ValueError, match=r"one of q01 and q99 is absent"):
        normalize.NormStats(np.zeros(1), np.ones(1), np.zeros(1))
    with pytest.raises(ValueError, match=r"std is not finite in dimension \[1\]"):
        normalize.NormStats(*[np.array([0.0, x]) for x in (1, np.nan, 1, 1)])
    with pytest.raises(ValueError, match=r"q01 is above q99 in dimension \[1\]; .* by hand"):
        normalize.NormStats(*[np.array([0.0, x]) for x in (1, 1, 2, 1)])
    with pytest.raises(ValueError, match=r"std is negative in dimension \[0\]"):
        normalize.NormStats(np.zeros(2), np.array([-0.1, 0]))
    # The type checker, where it runs, is the first to object.
    with pytest.raises((ValueError, TypeError), match="'minmax'"):
        normalize.normalize(np.zeros(3), exact_stats.of(_values()), "minmax")
