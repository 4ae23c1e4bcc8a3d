"""PyTorch checkpoints: what is written is read, without torch, and what is wrong is named."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shallow_pi.checkpoints import safetensors_file, weights
from shallow_pi.checkpoints import safetensors_layout as layout
from shallow_pi.models import pi0


def _write(path, config, params, **options):
    heads = {
        "num_kv_heads": config.backbone.num_kv_heads,
        "num_image_heads": config.image.num_heads,
    }
    safetensors_file.write(path, weights.leaves(params), **(heads | options))


def _assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config()


@pytest.fixture(scope="module")
def params(config, tiny_params):
    return tiny_params(config)


@pytest.fixture(scope="module")
def saved(config, params, tmp_path_factory):
    """A folder with openpi's file of `params`; tests must not change it."""
    folder = tmp_path_factory.mktemp("pytorch")
    _write(folder / "model.safetensors", config, params)
    return folder


@pytest.fixture
def tensors(saved):
    """All tensors of that file, to break one."""
    return safetensors.numpy.load_file(saved / "model.safetensors")


def _save(tensors, path, **header):
    safetensors.numpy.save_file(
        tensors, path, {"num_kv_heads": "2", "num_image_heads": "2"} | header
    )
    return path


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize("pi05", [False, True])
def test_params_read_are_those_written(tiny_config, tiny_params, tmp_path, pi05, prefix):
    config = tiny_config(pi05=pi05)
    params = tiny_params(config)
    _write(tmp_path / "model.safetensors", config, params, prefix=prefix, unused=True)
    expected = pi0.abstract_params(config)
    _assert_same(weights.load_params(tmp_path, expected), params)
    _assert_same(weights.load_params(tmp_path / "model.safetensors", expected), params)
    stored = weights.stored_params(tmp_path)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), stored) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected
    )


def test_params_are_cast_and_sharded_while_read(config, params, saved):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))

    def sharding(leaf):
        axes = [i for i, size in enumerate(leaf.shape) if size % 4 == 0]
        spec = [None] * leaf.ndim
        if axes:
            spec[axes[-1]] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    expected = pi0.abstract_params(config)
    shardings = jax.tree.map(sharding, expected)
    read = weights.load_params(saved, expected, dtype=jnp.bfloat16, sharding=shardings)
    for leaf, where in zip(jax.tree.leaves(read), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
        assert leaf.dtype == jnp.bfloat16
    _assert_same(read, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    q = weights.leaves(read)["PaliGemma/llm/layers/attn/q_einsum/w"]
    assert q.addressable_shards[0].data.shape == (3, 4, 24, 2)


@pytest.fixture
def names_read(monkeypatch):
    """The names of the tensors that are read, in order."""
    names, read = [], safetensors_file.File._read
    monkeypatch.setattr(
        safetensors_file.File, "_read", lambda self, name: names.append(name) or read(self, name)
    )
    return names


def _read_split(saved, params, path, mesh, spec):
    """Read everything with one leaf split; that leaf."""
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = dict.fromkeys(weights.leaves(params), whole) | {path: NamedSharding(mesh, spec)}
    found = safetensors_file.File(saved / "model.safetensors").read(shardings, None)
    np.testing.assert_array_equal(found[path], weights.leaves(params)[path])
    return found[path]


def test_a_shard_of_layers_reads_those_alone(params, saved, names_read):
    mesh = Mesh(np.array(jax.devices()[:3]), ("layers",))
    path = "PaliGemma/llm/layers/mlp/linear"
    _read_split(saved, params, path, mesh, PartitionSpec("layers"))
    down = [n for n in names_read if n.startswith(layout.BACKBONE) and "down_proj" in n]
    assert sorted(down) == [f"{layout.BACKBONE}layers.{i}.mlp.down_proj.weight" for i in range(3)]


def test_devices_that_hold_the_same_elements_share_one_reading(params, saved, names_read):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    path = "PaliGemma/llm/layers/attn/q_einsum/w"
    _read_split(saved, params, path, mesh, PartitionSpec(None, None, "fsdp"))
    queries = [n for n in names_read if n.startswith(layout.BACKBONE) and "q_proj" in n]
    assert len(queries) == 3 * 4  # Layers times shards, not times devices.


def test_bfloat16_is_kept(config, params, tmp_path):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    _write(tmp_path / "model.safetensors", config, params)
    read = weights.load_params(tmp_path, pi0.abstract_params(config))
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype(jnp.bfloat16)}
    _assert_same(read, params)


def test_the_tied_embedding_is_found_under_its_other_name(config, params, tensors, tmp_path):
    """safetensors keeps one name of tensors that share memory, and openpi's files this one."""
    tensors[layout.TIED] = tensors.pop(layout.EMBEDDING)
    _save(tensors, tmp_path / "model.safetensors")
    _assert_same(weights.load_params(tmp_path, pi0.abstract_params(config)), params)


def test_a_missing_or_unknown_tensor_is_named(config, tensors, tmp_path):
    lost = f"{layout.BACKBONE}layers.1.mlp.up_proj.weight"
    del tensors[lost]
    tensors["value_head.weight"] = np.zeros(3, np.float32)
    _save(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"\(2 differ\)") as caught:
        weights.load_params(tmp_path, pi0.abstract_params(config))
    assert f"missing {lost}" in str(caught.value)
    assert "unknown value_head.weight" in str(caught.value)


def test_a_fast_checkpoint_is_refused_by_name(tensors, tmp_path):
    """π0-FAST has no action expert."""
    left = {name: x for name, x in tensors.items() if name.startswith(layout.PALIGEMMA)}
    _save(left, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="it looks like a π0-FAST checkpoint"):
        weights.stored_params(tmp_path)
    _save({"conv.weight": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"lacks the backbone or action_in_proj.*conv\.weight"):
        weights.stored_params(tmp_path / "other.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_an_error_and_not_zeros(config, saved, tmp_path, share):
    whole = (saved / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"model\.safetensors could not be read .*truncated"):
        weights.load_params(tmp_path, pi0.abstract_params(config))


def test_a_pointer_of_git_lfs_is_told(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"\); it is a Git LFS pointer, .* `git lfs pull`"):
        weights.stored_params(tmp_path)


def test_a_checkpoint_in_several_files_is_read_as_one(config, params, tensors, tmp_path):
    names = sorted(tensors)
    parts = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, chosen in parts.items():
        _save({name: tensors[name] for name in chosen}, tmp_path / file)
    index = {"weight_map": {name: file for file, chosen in parts.items() for name in chosen}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    _assert_same(weights.load_params(tmp_path, pi0.abstract_params(config)), params)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-2-of-2\.safetensors could not be read"):
        weights.stored_params(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="is no index of safetensors files"):
        weights.stored_params(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        # LeRobot's first π0, with transformers before 4.52.
        {
            ".paligemma.model.language_model.": ".paligemma.language_model.model.",
            ".paligemma.model.": ".paligemma.",
            ".paligemma.lm_head.": ".paligemma.language_model.lm_head.",
        },
        # transformers 5.
        {".vision_tower.vision_model.": ".vision_tower."},
        # A model that is compiled.
        {"paligemma_with_expert.": "_orig_mod.paligemma_with_expert._orig_mod."},
    ],
    ids=["before 4.52", "5", "compiled"],
)
def test_other_versions_spell_tensors_otherwise(config, params, tensors, tmp_path, changes):
    found = {}
    for name, tensor in tensors.items():
        for ours, theirs in changes.items():
            name = name.replace(ours, theirs)
        found[f"model.{name}"] = tensor
    found["model.paligemma_with_expert.paligemma.model.vision_tower.embeddings.position_ids"] = (
        np.zeros(4, np.int64)
    )
    found["normalize_inputs.buffer_observation_state.mean"] = np.zeros(3, np.float32)
    _save(found, tmp_path / "model.safetensors")
    _assert_same(weights.load_params(tmp_path, pi0.abstract_params(config)), params)


def test_a_quantized_file_is_refused_by_its_type(tensors, tmp_path):
    tensors["action_in_proj.weight"] = tensors["action_in_proj.weight"].astype(np.int8)
    _save(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"action_in_proj\.weight in .* is of type I8"):
        weights.stored_params(tmp_path)


def test_without_a_header_the_heads_are_openpis_and_told(
    tiny_config, tiny_params, tmp_path, capsys
):
    """One kv head and sixteen image heads: files of openpi and LeRobot do not say so."""
    config = tiny_config()
    one = dataclasses.replace(config.backbone, num_kv_heads=1)
    config = dataclasses.replace(
        config,
        backbone=one,
        expert=dataclasses.replace(config.expert, num_kv_heads=1),
        image=dataclasses.replace(config.image, width=32, num_heads=16),
    )
    params = tiny_params(config)
    _write(tmp_path / "with.safetensors", config, params)
    tensors = safetensors.numpy.load_file(tmp_path / "with.safetensors")
    safetensors.numpy.save_file(tensors, tmp_path / "without.safetensors")
    expected = pi0.abstract_params(config)
    assert capsys.readouterr().err == ""
    _assert_same(weights.load_params(tmp_path / "without.safetensors", expected), params)
    assert "width 24 is not openpi's 2048: assuming openpi's 1 key" in capsys.readouterr().err


def test_heads_that_do_not_fit_are_an_error(tensors, tmp_path):
    _save(tensors, tmp_path / "model.safetensors", num_image_heads="7")
    with pytest.raises(ValueError, match="does not split into image_heads × image_head_dim"):
        weights.stored_params(tmp_path)


def test_a_full_disk_is_an_error_in_a_few_words(tmp_path, small_disk):
    with (
        small_disk(2000),
        pytest.raises(OSError, match=r"w\.safetensors cannot be written \(File too large\)$"),
    ):
        safetensors_file.save({"w": np.zeros(4000)}, tmp_path / "w.safetensors")


def test_an_existing_file_is_never_overwritten(config, params, saved):
    with pytest.raises(FileExistsError, match="never overwritten"):
        _write(saved / "model.safetensors", config, params)
    with pytest.raises(ValueError, match=r"\['other'\] have no name in PyTorch"):
        safetensors_file.write(
            saved / "new", {"other": np.zeros(2)}, num_kv_heads=1, num_image_heads=1
        )


def test_the_unused_matrix_has_the_shape_openpis_class_wants(config, params, tmp_path):
    _write(tmp_path / "model.safetensors", config, params, unused=True)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    unused = tensors["paligemma_with_expert.gemma_expert.lm_head.weight"]
    assert unused.shape == (config.vocab_size, config.expert.width)
    assert not unused.any()
