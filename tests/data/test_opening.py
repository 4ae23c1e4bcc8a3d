"""From a data config to samples: held-out episodes, mixtures, statistics over all, caches."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from shallow_pi import progress
from shallow_pi.data import data_config, loader, opening, sources
from shallow_pi.data.lerobot import reader
from shallow_pi.data.lerobot import writer as lerobot_writer
from shallow_pi.data.robots import normalize
from shallow_pi.interop import openpi_data


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """Other recordings of the same robot: two episodes of 6 and 4 frames."""
    folder = tmp_path_factory.mktemp("more") / "dataset"
    _record(folder, (6, 4))
    return folder


def _record(folder, lengths, fps=20, cameras=("base", "wrist"), dims=3, names=None):
    generator = np.random.default_rng(1)
    with lerobot_writer.Writer(folder, fps, names=names) as writer:
        for length in lengths:
            images = {c: generator.integers(0, 256, (length, 24, 24, 3), np.uint8) for c in cameras}
            state, action = 5 + generator.standard_normal((2, length, dims)).astype(np.float32)
            writer.add_episode(images, state, action, "touch the red block")


@pytest.fixture
def model(tiny_config):
    return tiny_config(vocab_size=320, max_token_len=12)


@pytest.fixture
def data(tiny_dataset):
    dataset, tokens = tiny_dataset
    return data_config.DataConfig(path=str(dataset), tokenizer=str(tokens))


def _states(source: sources.Source) -> np.ndarray:
    return np.stack([source[i].observation.state for i in range(len(source))])


def test_all_episodes_are_trained_on_unless_some_are_held_out(data, model, capsys):
    found = opening.open_data(data, model, None)
    base, wrist = "observation.images.base", "observation.images.wrist"
    told = f"Cameras: base_0_rgb ← {base}, left_wrist_0_rgb ← {wrist}"
    assert told in capsys.readouterr().err
    third = dataclasses.replace(model, cameras=(*model.cameras, "right_wrist_0_rgb"))
    opening.open_data(data, third, None)
    assert f"{told}, right_wrist_0_rgb ← black" in capsys.readouterr().err
    assert len(found.train) == 9 + 7 + 8
    assert found.held_out is None
    assert found.assets is not None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x", "y", "z"], ("x", "y", "z")),
        ([["x", "y", "z"]], ("x", "y", "z")),
        ({"motors": ["x", "y", "z"]}, ("x", "y", "z")),
        ({"x": 0, "y": 1, "z": 2}, ("x", "y", "z")),
        (["state"], None),
        (["0", "1", "2"], None),
        (None, None),
        (3, None),
    ],
    ids=str,
)
def test_dimensions_are_named_as_the_dataset_names_them(data, model, tmp_path, names, expected):
    shutil.copytree(data.path, tmp_path / "named")
    file = tmp_path / "named" / "meta" / "info.json"
    info = json.loads(file.read_text())
    info["features"]["action"]["names"] = names
    file.write_text(json.dumps(info))
    data = dataclasses.replace(data, path=str(tmp_path / "named"))
    assert opening.open_data(data, model, None).assets.names.get("actions") == expected


def test_held_out_episodes_are_whole_and_shape_neither_samples_nor_statistics(data, model):
    found = opening.open_data(dataclasses.replace(data, held_out=0.3), model, None)
    dataset = reader.Dataset(data.path)
    train, held_out = reader.split(dataset.episodes, 0.3)
    assert len(found.train) == sum(dataset.layout.lengths[e] for e in train)
    assert len(found.held_out) == sum(dataset.layout.lengths[e] for e in held_out)
    alone = reader.Dataset(data.path, episodes=train)
    state, _ = np.stack(alone.columns["observation.state"]), None
    np.testing.assert_allclose(found.assets.stats["state"].mean, state.mean(0), rtol=1e-5)
    # In one normalization, and not a frame in both.
    np.testing.assert_allclose(_states(found.train)[:, :3].mean(0), 0, atol=1e-5)
    both = np.concatenate([_states(found.train), _states(found.held_out)])
    assert len(np.unique(both, axis=0)) == 24


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_an_empty_split_is_reported(data, model, share):
    few = dataclasses.replace(data, held_out=share)
    if share == 0.01:  # At least one.
        assert len(opening.open_data(few, model, None).held_out) in (7, 8, 9)
    else:
        with pytest.raises(ValueError, match=r"data\.held-out, .*cannot hold out 0.9 of 3 epi"):
            opening.open_recordings(few, 32)


def test_synthetic_samples_can_be_held_out_too(model):
    data = data_config.DataConfig(source="synthetic", held_out=0.1)
    found = opening.open_data(data, model, None)
    assert found.assets is None
    train, held_out = (_states(s)[:50] for s in (found.train, found.held_out))
    assert len(np.unique(np.concatenate([train, held_out]), axis=0)) == 100
    without = opening.open_data(dataclasses.replace(data, held_out=0.0), model, None)
    assert without.held_out is None


def test_datasets_are_mixed_by_weight_and_held_out_each(data, model, more):
    data = dataclasses.replace(data, more=(str(more),), weights=(1, 3), held_out=0.4)
    found = opening.open_data(data, model, None)
    first, second = found.train.sources
    assert (len(first) + len(found.held_out.sources[0])) == 24
    assert len(second) + len(found.held_out.sources[1]) == 10
    assert [weight for _, weight in sources.shares(found.held_out)] == [1, 3]
    both = reader.Dataset(data.path), reader.Dataset(more)
    parts = [d.select(reader.split(d.episodes, 0.4)[0]) for d in both]
    state = np.concatenate([part.columns["observation.state"] for part in parts])
    np.testing.assert_allclose(found.assets.stats["state"].mean, state.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.assets.stats["state"].std, state.std(0), rtol=1e-5)
    # The second was recorded around 5, the first around 0.
    batch = next(loader.Loader(found.train, 8, num_threads=0))
    back = normalize.unnormalize(
        batch.observation.state[:, :3], found.assets.stats["state"], "z_score"
    )
    assert (back.mean(1) > 2.5).sum() == 6


def test_datasets_without_weights_are_one(data, model, more):
    found = opening.open_data(dataclasses.replace(data, more=(str(more),)), model, None)
    assert sources.shares(found.train) == [(34, 1.0)]


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({"fps": 10}, "is recorded at 10 fps, robot turntable runs at 20"),
        ({"dims": 4}, r"has shape \(4,\), robot turntable expects \(3,\)"),
        ({"cameras": ("base", "side")}, "lacks camera 'observation.images.wrist'"),
    ],
)
def test_a_dataset_of_another_robot_cannot_be_mixed_in(data, model, tmp_path, recorded, message):
    _record(tmp_path / "other", (4, 4), **recorded)
    with pytest.raises(ValueError, match=message):
        opening.open_data(dataclasses.replace(data, more=(str(tmp_path / "other"),)), model, None)


def test_joints_in_another_order_are_told(data, model, tmp_path, capsys):
    paths = []
    for names in ("abc", "bac", "abc"):
        paths.append(tmp_path / f"{len(paths)}")
        _record(paths[-1], (4,), names={"observation.state": list(names), "action": list("abc")})
    first, *others = map(str, paths)
    opening.open_data(dataclasses.replace(data, path=first, more=tuple(others)), model, None)
    told = capsys.readouterr().err
    assert f"state of dataset {paths[1]} are ['b', 'a', 'c'], those of {first} ['a'," in told
    assert told.count("learned as one") == 1


@pytest.mark.parametrize("teachers", ["ours", "lerobots"])
def test_joints_in_another_order_than_the_teachers_are_told(
    data, model, tmp_path, capsys, teachers
):
    step = tmp_path / "teacher"
    for names in ("abc", "bac", "abc"):
        path = tmp_path / f"{names}{len(list(tmp_path.iterdir()))}"
        _record(path, (4,), names={key: list(names) for key in ("observation.state", "action")})
        there = dataclasses.replace(data, path=str(path))
        assets = opening.open_data(there, model, step if step.exists() else None).assets
        told = capsys.readouterr().err
        expected = f"actions of dataset {path} are ['b', 'a', 'c'], those of the teacher in {step}"
        assert (expected in told) == (names == "bac")
        if not step.exists() and teachers == "ours":
            assets.save(step / "assets")
        elif not step.exists():
            normalize.save(step / "assets" / "turntable", assets.stats)
            (step / "config.json").write_text(json.dumps({"action_feature_names": list(names)}))


def test_a_dataset_given_twice_is_told_unless_its_episodes_differ(data, capsys):
    twice = dataclasses.replace(data, more=(f"{data.path}/../dataset",))
    opening.open_recordings(twice, 32)
    assert "is given twice (--data.path, --data.more), and 3 of its" in capsys.readouterr().err
    opening.open_recordings(dataclasses.replace(twice, episodes=("0/0", "1/1")), 32)
    assert "twice" not in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_caches_change_no_sample(data, model, more, tmp_path, cache):
    data = dataclasses.replace(data, more=(str(more),), weights=(2, 1), held_out=0.3)
    plain = opening.open_data(data, model, None)
    kept = dataclasses.replace(data, cache=cache, cache_dir=str(tmp_path / "frames"))
    for _ in range(2):
        cached = opening.open_data(kept, model, None)
        for left, right in ((plain.train, cached.train), (plain.held_out, cached.held_out)):
            expected = next(loader.Loader(left, 8, seed=4, num_threads=0))
            found = next(loader.Loader(right, 8, seed=4, num_threads=0))
            jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert len(list(tmp_path.glob("frames/*.u8"))) == (4 if cache == "disk" else 0)


def test_statistics_are_the_teachers_the_datasets_only_with_a_word(data, model, tmp_path, capsys):
    computed = opening.open_data(data, model, None).assets.stats
    assert "Statistics: computed from the dataset" in capsys.readouterr().err
    wide = {key: dataclasses.replace(x, std=x.std * 100) for key, x in computed.items()}
    normalize.save(tmp_path / "teacher" / "assets" / "other", wide)
    found = opening.open_data(data, model, tmp_path / "teacher").assets.stats
    np.testing.assert_array_equal(found["actions"].std, wide["actions"].std)
    told = capsys.readouterr().err
    assert "taking its only ones, 'other'" in told
    assert "Statistics: " in told
    assert "times narrower than they say" in told
    own = dataclasses.replace(data, norm_stats="dataset")
    found = opening.open_data(own, model, tmp_path / "teacher").assets.stats
    np.testing.assert_array_equal(found["actions"].std, computed["actions"].std)
    assert "trained with other statistics of 'state'" in capsys.readouterr().err
    opening.open_data(data, model, tmp_path / "without")
    assert (
        "has no statistics: using the dataset's, which is right only if" in capsys.readouterr().err
    )
    progress.be_strict()
    with pytest.raises(ValueError, match=r"has no statistics.*\(--strict makes"):
        opening.open_data(data, model, tmp_path / "without")


@pytest.mark.parametrize("pi05", [True, False])
def test_a_gripper_that_hardly_ever_moves_is_told_where_percentiles_normalize(
    data, tiny_config, tmp_path, capsys, pi05
):
    """Its rare values are a million times as large as the others after normalization."""
    images = {name: np.zeros((200, 8, 8, 3), np.uint8) for name in ("base", "wrist")}
    state = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    state[:, 2] = np.arange(200) == 100
    with lerobot_writer.Writer(tmp_path / "set", 20) as writer:
        writer.add_episode(images, state, 2 * state, "go")
    model = tiny_config(pi05=pi05, vocab_size=320, max_token_len=48)
    opening.open_data(dataclasses.replace(data, path=str(tmp_path / "set")), model, None)
    assert ("state[2] has one value (0) in 98 % of" in capsys.readouterr().err) == pi05


def test_a_memory_cache_has_a_limit(data, model):
    with pytest.raises(ValueError, match=r"caching 24 samples needs 0 MiB, more than .*cache-gib"):
        opening.open_data(dataclasses.replace(data, cache="memory", cache_gib=1e-5), model, None)


def test_a_source_can_be_a_function_of_somebody_else(model):
    data = data_config.DataConfig(source="shallow_pi.data.opening:Data", path="here")
    assert opening.open_data(data, model, None) == opening.Data(data, model, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more": ("b",)}, r"pi05_libero is one dataset of openpi's: .*--data.source lerobot"),
        ({"exclude_episodes": ("1",)}, r"reads every episode of pi05_libero: .*--data.source ler"),
        (
            {"norm_stats": "dataset"},
            r"computes no statistics of pi05_libero \(--data.norm-stats dataset\): .*give",
        ),
    ],
)
def test_openpis_loader_refuses_what_only_our_reader_does_and_needs_no_openpi_for_it(
    model, changes, message
):
    data = data_config.DataConfig(source=openpi_data.SOURCE, path="pi05_libero", **changes)
    with pytest.raises(ValueError, match=message):
        opening.open_data(data, model, None)


@pytest.mark.parametrize("source", ["no_such_module:open", "shallow_pi.data.opening:no", ":"])
def test_a_source_that_cannot_be_imported_is_reported(model, source):
    with pytest.raises(ValueError, match="names no function that can be imported"):
        opening.open_data(data_config.DataConfig(source=source), model, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": 1.0}, "data.held-out is a share of the episodes"),
        ({"weights": (1, 2)}, r"got 2 weights \[1, 2\] for 1 datasets"),
        ({"more": ("b",), "weights": (1, -2)}, "weights must be positive"),
        ({"num_workers": -1}, "--data.num-workers must be at least 0, got -1"),
        ({"num_workers": 1, "cache": "memory"}, "data.cache memory is for one process"),
        ({"cache": True}, "data.cache must be none, memory or disk, got True"),
        ({"cache_gib": -1.0}, "data.cache-gib must be at least 0"),
        ({"source": "lerobots"}, "data.source must be lerobot, synthetic or MODULE:FUNCTION"),
    ],
)
def test_bad_configs_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        data_config.DataConfig(**changes)
