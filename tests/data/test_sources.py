"""Sources of samples: what a sample holds, mixtures of datasets, and what is kept in memory."""

import dataclasses
import itertools
import pathlib

import jax
import numpy as np
import pytest

from shallow_pi.data import fit, loader, sources
from shallow_pi.data.lerobot import reader
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.data.robots import pipelines, tokenizer
from shallow_pi.data.robots import robot as robots
from shallow_pi.models import batch as batches

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "lerobot"


class Numbers:
    """A source whose sample `i` says which it is, and which counts how often it is read."""

    def __init__(self, length: int, first: int = 0) -> None:
        self.length = length
        self.first = first
        self.reads = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        self.reads += 1
        number = self.first + i
        return {"index": np.int32(number), "vector": {"x": np.full(3, number, np.float32)}}


def _indices(batches, count: int) -> list[list[int]]:
    return [batch["index"].tolist() for batch in itertools.islice(batches, count)]


def test_cache_reads_each_sample_once_and_changes_nothing() -> None:
    plain, counted = Numbers(20), Numbers(20)
    cached = sources.Cached(counted)
    expected = _indices(loader.Loader(plain, 5, seed=2), 12)
    assert _indices(loader.Loader(cached, 5, seed=2, num_threads=0), 12) == expected
    assert counted.reads == 21  # one more to learn the shapes
    np.testing.assert_array_equal(cached[7]["vector"]["x"], plain[7]["vector"]["x"])
    assert counted.reads == 21


def test_cache_refuses_more_than_its_bound() -> None:
    assert sources.Cached(Numbers(20)).nbytes == 20 * 16
    with pytest.raises(ValueError, match="caching 20 samples needs 0 MiB, more than 0 MiB: raise"):
        sources.Cached(Numbers(20), max_bytes=319)


def _assert_fits(batch, model, b: int) -> None:
    found = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    assert found == batches.spec(model, b)


def test_dataset_source_gives_the_batch_of_the_contract(tmp_path, tiny_config) -> None:
    robot = robots.Robot(
        "pusht", {"base_0_rgb": "observation.images.top"}, state_dim=2, action_dim=2, fps=10
    )
    dataset = reader.Dataset(FIXTURES / "pusht_v30_image")
    tokenizer.train(dataset.tasks.values(), tmp_path / "small.model")
    transform = pipelines.inputs(
        robot,
        cameras=("base_0_rgb", "left_wrist_0_rgb"),
        image_size=48,
        action_dim=6,
        tokenizer=tokenizer.Tokenizer(tmp_path / "small.model", 24),
        stats=sources.norm_stats([dataset], robot, 8),
        kind="z_score",
    )
    source = sources.DatasetSource(dataset, robot, 8, transform)
    batch = next(loader.Loader(sources.Cached(source), 4))
    sizes = {"image_size": 48, "action_dim": 6, "action_horizon": 8, "max_token_len": 24}
    _assert_fits(batch, tiny_config(**sizes), 4)
    everything = np.stack([source[i].observation.state[:2] for i in range(len(source))])
    np.testing.assert_allclose(everything.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(everything.std(0), 1, atol=1e-5)
    reference = np.load(FIXTURES / "reference_v30_image.npz")
    np.testing.assert_array_equal(source[105].action_mask, ~reference["pad"][105])


def test_synthetic_samples_are_deterministic_and_fit_the_contract(tiny_config) -> None:
    model = tiny_config()
    source, again = (sources.SyntheticSource(model, seed=1) for _ in range(2))
    batch, same = (next(loader.Loader(s, 4)) for s in (source, again))
    jax.tree.map(np.testing.assert_array_equal, batch, same)
    _assert_fits(batch, model, 4)
    assert batch.observation.tokenized_prompt.max() < model.vocab_size
    np.testing.assert_array_equal(batch.actions[:, 0], batch.observation.state)
    assert len(np.unique(batch.observation.state)) == 4 * model.action_dim


@pytest.mark.parametrize("name", ["libero_delta", "droid_position", "ur5", "aloha_sim", "in parts"])
def test_recordings_of_other_robots_become_batches(tmp_path, name) -> None:
    """In the keys of openpi's converters: states in parts, images under plain names."""
    in_parts = dataclasses.replace(robots.UR5, action_key="velocity", action_more=("close",))
    robot = in_parts if name == "in parts" else robots.find(name)
    rng = np.random.default_rng(0)
    with lerobot_writer.Writer(tmp_path / "data", robot.fps) as writer:
        for length in (4, 6):
            images = {
                key: rng.integers(0, 256, (length, 6, 8, 3), np.uint8)
                for key in robot.cameras.values()
            }
            columns = {
                key: rng.uniform(0.1, 0.9, (length, size)).astype(np.float32)
                for keys, dim in (
                    (robot.state_keys, robot.state_dim),
                    (robot.action_keys, robot.action_dim),
                )
                for key, size in zip(keys, [dim - len(keys) + 1] + [1] * len(keys), strict=False)
            }
            writer.add(images, columns, ["go"] * length)
    dataset = reader.Dataset(tmp_path / "data")
    tokenizer.train(["go"], tmp_path / "small.model")
    stats = sources.norm_stats([dataset], robot, 5)
    transform = pipelines.inputs(
        robot,
        cameras=("base_0_rgb", "left_wrist_0_rgb"),
        image_size=8,
        action_dim=16,
        tokenizer=tokenizer.Tokenizer(tmp_path / "small.model", 48),
        stats=stats,
        kind="z_score",
    )
    source = sources.DatasetSource(dataset, robot, 5, transform)
    samples = [source[i] for i in range(len(source))]
    for rows, dim in (
        ([sample.observation.state[None] for sample in samples], robot.state_dim),
        ([sample.actions for sample in samples], robot.action_dim),
    ):
        values = np.concatenate(rows)[:, :dim]
        np.testing.assert_allclose(values.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(values.std(0), 1, atol=1e-3)
    dataset.columns.loaded[robot.state_key] = np.zeros((10, 2), np.float32)
    with pytest.raises(ValueError, match=f"robot {robot.name} expects "):
        fit.check(dataset, robot)


def test_a_mixture_holds_the_samples_of_its_sources_one_after_the_other() -> None:
    mixture = sources.Mixture([Numbers(3), Numbers(2, first=10), Numbers(4, first=20)], (2, 1, 1))
    assert [int(mixture[i]["index"]) for i in range(9)] == [0, 1, 2, 10, 11, 20, 21, 22, 23]
    assert sources.shares(mixture) == [(3, 2), (2, 1), (4, 1)]
    assert sources.shares(sources.Cached(mixture)) == sources.shares(mixture)
    for i in (9, -1):
        with pytest.raises(IndexError, match=f"sample {i} of a mixture of 9"):
            mixture[i]


def test_a_mixture_without_weights_is_one_shuffle_over_all_samples() -> None:
    mixture = sources.Mixture([Numbers(3), Numbers(5, first=3)])
    assert sources.shares(mixture) == sources.shares(Numbers(8)) == [(8, 1.0)]
    order = list(itertools.chain(*_indices(loader.Loader(mixture, 4), 4)))
    assert sorted(order[:8]) == sorted(order[8:]) == list(range(8))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1,), r"got 1 weights \[1\] for 2 datasets: give one for each"),
        ((1, 0), r"weights must be positive and finite, got \[1, 0\]"),
        ((1, float("nan")), "weights must be positive and finite"),
    ],
)
def test_bad_weights_are_told(weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        sources.Mixture([Numbers(3), Numbers(3)], weights)


def test_statistics_of_several_datasets_are_those_of_all_their_frames() -> None:
    robot = robots.Robot(
        "pusht",
        {"base_0_rgb": "observation.images.top"},
        state_dim=2,
        action_dim=2,
        fps=10,
        delta=robots.mask(2),
    )
    whole = reader.Dataset(FIXTURES / "pusht_v30_image")
    parts = [whole.select(whole.episodes[:1]), whole.select(whole.episodes[1:])]
    assert sum(map(len, parts)) == len(whole)
    found, expected = sources.norm_stats(parts, robot, 7), sources.norm_stats([whole], robot, 7)
    for key in ("state", "actions"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6),
            vars(found[key]),
            vars(expected[key]),
        )


def test_selected_episodes_read_as_if_opened_alone() -> None:
    path = FIXTURES / "pusht_v30_video"
    whole = reader.Dataset(path)
    chosen = whole.episodes[1::2]
    part, alone = whole.select(chosen), reader.Dataset(path, episodes=chosen)
    assert part.episodes == alone.episodes
    assert len(part) == len(alone) < len(whole)
    for i in (0, len(part) // 2, len(part) - 1):
        jax.tree.map(np.testing.assert_array_equal, part[i], alone[i])
        jax.tree.map(np.testing.assert_array_equal, part.chunk(i, 9), alone.chunk(i, 9))
