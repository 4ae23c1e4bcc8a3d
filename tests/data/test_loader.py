"""The order of samples is a function of the seed: shards, prefetch and resume cannot change it."""

import itertools
import json
import pathlib
import threading

import jax
import numpy as np
import pytest

from shallow_pi.data import lerobot, lerobot_writer, loader, pipelines, robots, tokenizer

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "lerobot"


class Numbers:
    """A source whose sample `i` says which it is, and which counts how often it is read."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.reads = 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        self.reads += 1
        return {"index": np.int32(i), "vector": {"x": np.full(3, i, np.float32)}}


def _indices(batches, count: int) -> list[list[int]]:
    return [batch["index"].tolist() for batch in itertools.islice(batches, count)]


def test_every_epoch_shows_each_sample_once_in_another_order() -> None:
    order = list(itertools.chain(*_indices(loader.Loader(Numbers(12), 4, seed=1), 6)))
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12))
    assert order[:12] != order[12:]
    assert order[:12] != list(range(12))


def test_same_seed_same_batches_other_seed_other_batches() -> None:
    first, again, other = (
        _indices(loader.Loader(Numbers(50), 8, seed=seed, num_threads=threads), 10)
        for seed, threads in ((3, 0), (3, 4), (4, 0))
    )
    assert first == again
    assert first != other


def test_batches_stack_nested_samples() -> None:
    batch = next(loader.Loader(Numbers(10), 4))
    assert batch["vector"]["x"].shape == (4, 3)
    np.testing.assert_array_equal(batch["vector"]["x"][:, 0], batch["index"])


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("consumed", [0, 1, 5])
def test_restore_continues_with_the_very_next_batch(threads: int, consumed: int) -> None:
    source = loader.Cached(Numbers(20))
    straight = loader.Loader(source, 6, seed=7, num_threads=threads)
    _indices(straight, consumed)
    state = json.loads(json.dumps(straight.state()))
    expected = _indices(straight, 8)
    resumed = loader.Loader(source, 6, seed=7, num_threads=threads)
    resumed.restore(state)
    assert _indices(resumed, 8) == expected
    straight.restore(state)
    assert _indices(straight, 8) == expected


def test_processes_share_each_global_batch_disjointly() -> None:
    whole = _indices(loader.Loader(Numbers(24), 8, process_index=0, process_count=1), 6)
    shards = [
        _indices(loader.Loader(Numbers(24), 8, process_index=p, process_count=2), 6) for p in (0, 1)
    ]
    for k, batch in enumerate(whole):
        assert len(shards[0][k]) == len(shards[1][k]) == 4
        assert not set(shards[0][k]) & set(shards[1][k])
        assert sorted(shards[0][k] + shards[1][k]) == sorted(batch)
    epoch = itertools.chain(*shards[0][:3], *shards[1][:3])
    assert sorted(epoch) == list(range(24))


def test_resume_on_another_number_of_processes_sees_the_same_global_batch() -> None:
    one = loader.Loader(Numbers(24), 8, process_index=0, process_count=1)
    _indices(one, 4)
    state, expected = one.state(), _indices(one, 1)[0]
    seen = []
    for process in range(4):
        part = loader.Loader(Numbers(24), 8, process_index=process, process_count=4)
        part.restore(state)
        seen += _indices(part, 1)[0]
    assert sorted(seen) == sorted(expected)


def test_cache_reads_each_sample_once_and_changes_nothing() -> None:
    plain, counted = Numbers(20), Numbers(20)
    cached = loader.Cached(counted)
    expected = _indices(loader.Loader(plain, 5, seed=2), 12)
    assert _indices(loader.Loader(cached, 5, seed=2, num_threads=0), 12) == expected
    assert counted.reads == 21  # one more to learn the shapes
    np.testing.assert_array_equal(cached[7]["vector"]["x"], plain[7]["vector"]["x"])
    assert counted.reads == 21


def test_cache_refuses_more_than_its_bound() -> None:
    assert loader.Cached(Numbers(20)).nbytes == 20 * 16
    with pytest.raises(ValueError, match="caching 20 samples needs 0 MiB, more than the 0 MiB"):
        loader.Cached(Numbers(20), max_bytes=319)


def test_prefetch_state_counts_what_was_handed_out() -> None:
    sharding = jax.sharding.NamedSharding(
        jax.sharding.Mesh(np.array(jax.devices()), ("data",)), jax.sharding.PartitionSpec("data")
    )
    source = Numbers(40)
    expected = _indices(loader.Loader(source, 8, seed=5), 8)
    ahead = loader.prefetch(loader.Loader(source, 8, seed=5), sharding, depth=3)
    start = ahead.state()
    assert _indices(ahead, 4) == expected[:4]
    batch = next(ahead)
    assert batch["vector"]["x"].sharding.is_equivalent_to(sharding, 2)
    assert batch["index"].shape == (8,)
    state = ahead.state()
    resumed = loader.Loader(source, 8, seed=5)
    resumed.restore(state)
    assert _indices(resumed, 3) == expected[5:8]
    _indices(ahead, 2)
    ahead.restore(state)
    assert _indices(ahead, 3) == expected[5:8]
    ahead.restore(start)
    assert _indices(ahead, 8) == expected


def test_dataset_source_gives_the_batch_of_the_contract(tmp_path) -> None:
    robot = robots.Robot(
        "pusht", {"base_0_rgb": "observation.images.top"}, state_dim=2, action_dim=2, fps=10
    )
    dataset = lerobot.Dataset(FIXTURES / "pusht_v30_image")
    tokenizer.train(dataset.tasks.values(), tmp_path / "small.model")
    transform = pipelines.inputs(
        robot,
        cameras=("base_0_rgb", "left_wrist_0_rgb"),
        image_size=48,
        action_dim=6,
        tokenizer=tokenizer.Tokenizer(tmp_path / "small.model", 24),
        stats=dataset.norm_stats(robot, 8),
        kind="z_score",
    )
    source = loader.DatasetSource(dataset, robot, 8, transform)
    batch = next(loader.Loader(loader.Cached(source), 4))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), batch)
    assert shapes == {
        "image": dict.fromkeys(("base_0_rgb", "left_wrist_0_rgb"), ((4, 48, 48, 3), "uint8")),
        "image_mask": dict.fromkeys(("base_0_rgb", "left_wrist_0_rgb"), ((4,), "bool")),
        "state": ((4, 6), "float32"),
        "tokenized_prompt": ((4, 24), "int32"),
        "tokenized_prompt_mask": ((4, 24), "bool"),
        "actions": ((4, 8, 6), "float32"),
        "action_mask": ((4, 8), "bool"),
    }
    everything = np.stack([source[i]["state"][:2] for i in range(len(source))])
    np.testing.assert_allclose(everything.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(everything.std(0), 1, atol=1e-5)
    reference = np.load(FIXTURES / "reference_v30_image.npz")
    np.testing.assert_array_equal(source[105]["action_mask"], ~reference["pad"][105])


def test_synthetic_samples_are_deterministic_and_fit_the_contract() -> None:
    sizes = {"cameras": ("base_0_rgb",), "image_size": 8, "action_dim": 4, "action_horizon": 5}
    source, again = (
        loader.SyntheticSource(**sizes, max_token_len=6, vocab_size=16, seed=1) for _ in range(2)
    )
    batch, same = (next(loader.Loader(s, 4)) for s in (source, again))
    jax.tree.map(np.testing.assert_array_equal, batch, same)
    assert batch["image"]["base_0_rgb"].shape == (4, 8, 8, 3)
    assert batch["image"]["base_0_rgb"].dtype == np.uint8
    assert batch["actions"].shape == (4, 5, 4)
    assert batch["actions"].dtype == batch["state"].dtype == np.float32
    assert batch["tokenized_prompt"].max() < 16
    np.testing.assert_array_equal(batch["actions"][:, 0], batch["state"])
    assert len(np.unique(batch["state"])) == 16


def test_errors_of_the_source_reach_the_caller() -> None:
    class Broken(Numbers):
        def __getitem__(self, i: int) -> dict:
            raise ValueError(f"cannot decode sample {i} in {threading.current_thread().name}")

    with pytest.raises(ValueError, match="cannot decode sample"):
        next(loader.Loader(Broken(5), 2, num_threads=2))


def test_bad_input_raises() -> None:
    with pytest.raises(ValueError, match="batch_size 6 must be a positive multiple of the 4 proc"):
        loader.Loader(Numbers(20), 6, process_index=0, process_count=4)
    with pytest.raises(ValueError, match="the data source is empty"):
        loader.Loader(Numbers(0), 4)
    state = loader.Loader(Numbers(20), 4, seed=1).state()
    with pytest.raises(ValueError, match=r"differ in \{'seed': \(1, 2\)\}"):
        loader.Loader(Numbers(20), 4, seed=2).restore(state)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(ValueError, match="prefetch depth must be at least 1"):
        loader.prefetch(loader.Loader(Numbers(20), 4), device, depth=0)


@pytest.mark.parametrize("name", ["libero_delta", "droid_position", "ur5", "aloha_sim"])
def test_recordings_of_other_robots_become_batches(tmp_path, name) -> None:
    """In the keys of openpi's converters: states in parts, pictures under plain names."""
    robot, rng = robots.find(name), np.random.default_rng(0)
    more = len(robot.state_more)
    sizes = [robot.state_dim - more] + [1] * more
    with lerobot_writer.Writer(tmp_path / "data", robot.fps) as writer:
        for length in (4, 6):
            images = {
                key: rng.integers(0, 256, (length, 6, 8, 3), np.uint8)
                for key in robot.cameras.values()
            }
            columns = {
                key: rng.uniform(0.1, 0.9, (length, size)).astype(np.float32)
                for key, size in zip(robot.state_keys, sizes, strict=True)
            }
            columns[robot.action_key] = rng.normal(size=(length, robot.action_dim))
            columns[robot.action_key] = columns[robot.action_key].astype(np.float32)
            writer.add(images, columns, ["go"] * length)
    dataset = lerobot.Dataset(tmp_path / "data")
    tokenizer.train(["go"], tmp_path / "small.model")
    stats = dataset.norm_stats(robot, 5)
    transform = pipelines.inputs(
        robot,
        cameras=("base_0_rgb", "left_wrist_0_rgb"),
        image_size=8,
        action_dim=16,
        tokenizer=tokenizer.Tokenizer(tmp_path / "small.model", 48),
        stats=stats,
        kind="z_score",
    )
    source = loader.DatasetSource(dataset, robot, 5, transform)
    samples = [source[i] for i in range(len(source))]
    for key, dim in (("state", robot.state_dim), ("actions", robot.action_dim)):
        values = np.concatenate([np.atleast_2d(sample[key]) for sample in samples])[:, :dim]
        np.testing.assert_allclose(values.mean(0), 0, atol=1e-4)
        np.testing.assert_allclose(values.std(0), 1, atol=1e-3)
    dataset.columns[robot.state_key] = np.zeros((10, 2), np.float32)
    with pytest.raises(ValueError, match=rf"robot {name} expects \({robot.state_dim},\)"):
        dataset.validate(robot)
