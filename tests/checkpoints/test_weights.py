"""Parameters on disk: what is written is read, and what is wrong is named."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shallow_pi.checkpoints import weights

DEPTH = 3


def _tree(depth=DEPTH, pi05=False, action_dim=8):
    generator = np.random.default_rng(0)
    layers = {"attn": {"q_einsum": {"w": (depth, 2, 16, 4)}}, "mlp": {"linear": (depth, 8, 16)}}
    shapes = {
        "PaliGemma": {
            "llm": {"embedder": {"input_embedding": (32, 16)}, "layers": layers},
            "img": {"pos_embedding": (1, 9, 16)},
        },
        "action_in_proj": {"kernel": (action_dim, 16), "bias": (16,)},
    }
    shapes |= (
        {"time_mlp_in": {"kernel": (16, 16)}}
        if pi05
        else {"state_proj": {"kernel": (8, 16)}, "action_time_mlp_in": {"kernel": (32, 16)}}
    )
    return jax.tree.map(
        lambda shape: generator.standard_normal(shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def _abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)


def _assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A step folder with the parameters of `_tree()`; tests must not change it."""
    step = tmp_path_factory.mktemp("weights") / "100"
    weights.save_params(step / "params", _tree())
    return step


def test_a_folder_does_not_tell_where_it_was_written(saved):
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if os.fsencode(saved) in path.read_bytes()] == []


def test_params_read_are_those_written(saved):
    tree = _tree()
    _assert_same(weights.load_params(saved / "params", _abstract(tree)), tree)
    _assert_same(weights.load_params(saved, _abstract(tree)), tree)


def test_params_are_cast_and_sharded_while_read(saved):
    tree = _tree()
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    # The last axis is divisible by 4 in every leaf of the tree.
    shardings = jax.tree.map(
        lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "fsdp")), tree
    )
    read = weights.load_params(saved, _abstract(tree), dtype=jnp.bfloat16, sharding=shardings)
    for leaf, sharding in zip(jax.tree.leaves(read), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert leaf.dtype == jnp.bfloat16
        assert leaf.addressable_shards[0].data.shape[-1] == leaf.shape[-1] // 4
    _assert_same(read, jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree))


def test_dtype_none_keeps_what_is_stored(tmp_path):
    tree = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _tree())
    weights.save_params(tmp_path / "params", tree)
    read = weights.load_params(tmp_path, _abstract(tree))
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {jnp.dtype(jnp.bfloat16)}
    _assert_same(read, tree)


def test_value_keys_of_openpi_are_stripped_only_where_all_leaves_have_them(tmp_path):
    tree = _tree()
    with ocp.PyTreeCheckpointer() as checkpointer:
        nested = jax.tree.map(lambda x: {"value": x}, tree)
        checkpointer.save(tmp_path / "all" / "params", {"params": nested})
        nested["action_in_proj"]["bias"] = nested["action_in_proj"]["bias"]["value"]
        checkpointer.save(tmp_path / "some" / "params", {"params": nested})
    _assert_same(weights.load_params(tmp_path / "all", _abstract(tree)), tree)
    with pytest.raises(ValueError, match="extra action_in_proj/kernel/value"):
        weights.load_params(tmp_path / "some", _abstract(tree))


def test_every_missing_extra_and_misshapen_path_is_named(saved):
    expected = _abstract(_tree())
    del expected["action_in_proj"]["bias"]
    expected["action_in_proj"]["scale"] = jax.ShapeDtypeStruct((16,), jnp.float32)
    expected["PaliGemma"]["img"]["pos_embedding"] = jax.ShapeDtypeStruct((1, 4, 16), jnp.float32)
    with pytest.raises(ValueError, match="teacher") as caught:
        weights.load_params(saved, expected)
    message = str(caught.value)
    assert "(3 differ)" in message
    assert "missing action_in_proj/scale (16,)" in message
    assert "extra action_in_proj/bias (16,)" in message
    assert "shape PaliGemma/img/pos_embedding: expected (1, 4, 16), found (1, 9, 16)" in message


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"depth": 6}, "the checkpoint has 3 layers, the config 6: give --model.depth 3"),
        (
            {"pi05": True},
            r"says π0.5: use the other checkpoint, or a config of π0 \(--model.no-pi05\)",
        ),
        ({"action_dim": 7}, "the checkpoint has 8 action dimensions, the config 7"),
    ],
)
def test_a_usual_mistake_gets_a_hint(saved, change, hint):
    with pytest.raises(ValueError, match=hint):
        weights.load_params(saved, _abstract(_tree(**change)))


def test_an_integer_leaf_is_not_taken_for_a_floating_one():
    shape = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(ValueError, match="dtype a: expected float32, found int32"):
        weights.check_tree({"a": shape}, {"a": jnp.zeros(2, jnp.int32)}, "student")
    weights.check_tree({"a": shape}, {"a": jnp.zeros(2, jnp.bfloat16)}, "student")


def test_an_absent_checkpoint_is_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        weights.load_params(tmp_path / "nowhere", _abstract(_tree()))
    with pytest.raises(ValueError, match=r"holds the steps 100: name one"):
        weights.load_params(saved.parent, _abstract(_tree()))
    (tmp_path / "params").mkdir()
    with pytest.raises(ValueError, match="downloaded in part"):
        weights.load_params(tmp_path, _abstract(_tree()))


def test_an_unfinished_save_is_recognised(tmp_path):
    (tmp_path / "7.orbax-checkpoint-tmp-0").mkdir()
    with pytest.raises(FileNotFoundError, match=r"only 7\.orbax-checkpoint-tmp-0"):
        weights.load_params(tmp_path / "7", _abstract(_tree()))


@pytest.mark.parametrize("broken", ["_METADATA", "manifest.ocdbt", "d/*"])
def test_a_truncated_checkpoint_is_an_error_that_names_the_folder(tmp_path, broken):
    tree = {"w": jnp.arange(4000.0)}
    weights.save_params(tmp_path / "params", tree)
    for file in (tmp_path / "params").glob(broken):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=rf"{tmp_path.name}/params could not be read"):
        weights.load_params(tmp_path, _abstract(tree))


def test_a_checkpoint_of_another_user_is_not_called_damaged(tmp_path):
    """TensorStore's text, which as root no permission brings about."""
    denied = 'Error reading "w/.zarray" in OCDBT database at file:///p/: Permission denied'
    found = weights.damaged(tmp_path, ValueError(denied))
    assert isinstance(found, PermissionError)
    assert str(found) == f"{tmp_path} could not be read (Permission denied): make it readable"


@pytest.mark.parametrize("kept", [100, None])
def test_numbers_that_are_cut_short_or_missing_are_an_error_and_not_zeros(tmp_path, kept):
    tree = {"head": {"w": jnp.arange(4000.0)}}
    weights.save_params(tmp_path / "params", tree)
    data = max(
        (file for file in (tmp_path / "params").rglob("*") if file.is_file()),
        key=lambda file: file.stat().st_size,
    )
    content = data.read_bytes()
    data.unlink()
    if kept is not None:
        data.write_bytes(content[:kept])
    with pytest.raises(
        ValueError, match=r"\(a file in it is missing or cut short, and with it head/w"
    ):
        weights.load_params(tmp_path, _abstract(tree))


def test_a_full_disk_is_an_error_in_a_few_words(tmp_path, small_disk):
    with (
        small_disk(2000),
        pytest.raises(OSError, match=r"params cannot be written \(File too large\)$"),
    ):
        weights.save_params(tmp_path / "params", {"w": jax.random.normal(jax.random.key(0), 4000)})


def test_an_existing_folder_is_never_overwritten(saved):
    with pytest.raises(FileExistsError, match="never overwritten"):
        weights.save_params(saved / "params", _tree())


def test_a_fast_checkpoint_is_refused_by_name(tmp_path):
    """π0-FAST has a backbone alone, under the same paths."""
    tree = _tree()
    weights.save_params(tmp_path / "params", {"PaliGemma": tree["PaliGemma"]})
    with pytest.raises(ValueError, match=r"params is a π0-FAST checkpoint.*no action expert"):
        weights.stored_params(tmp_path)
    with pytest.raises(ValueError, match=r"give one of π0 or π0\.5"):
        weights.load_params(tmp_path, _abstract(tree))


def _with_adapters(tree, rank=16):
    """Factors under openpi's names: next to an einsum's `w`, and next to an MLP's matrix."""
    generator = np.random.default_rng(1)
    tree = jax.tree.map(np.copy, tree)
    layers = tree["PaliGemma"]["llm"]["layers"]
    for parent, name, base in (
        (layers["attn"]["q_einsum"], "lora", "w"),
        (layers["mlp"], "linear_lora", "linear"),
    ):
        *lead, inputs, outputs = parent[base].shape
        shapes = {"a": (*lead, inputs, rank), "b": (*lead, rank, outputs)}
        for factor, shape in shapes.items():
            parent[f"{name}_{factor}"] = generator.standard_normal(shape).astype(np.float32)
    return tree


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
def test_adapters_are_merged_while_read_and_sharded(tmp_path, stored):
    """openpi stores frozen matrices in bfloat16 and adapters in float32: the sum is float32."""
    tree = _tree()
    both = jax.tree.map(lambda x: x.astype(stored), tree)
    layers = _with_adapters(tree)["PaliGemma"]["llm"]["layers"]
    for part, name in (("attn", "q_einsum"), ("mlp", None)):
        target = both["PaliGemma"]["llm"]["layers"][part]
        source = layers[part] if name is None else layers[part][name]
        target = target if name is None else target[name]
        target.update({key: leaf for key, leaf in source.items() if "lora" in key})
    weights.save_params(tmp_path / "params", both)

    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    shardings = jax.tree.map(
        lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "fsdp")), tree
    )
    read = weights.load_params(tmp_path, _abstract(tree), sharding=shardings)
    found, want = weights.leaves(read), weights.leaves(tree)
    for path, factors, w in (
        ("attn/q_einsum/w", layers["attn"]["q_einsum"], "lora"),
        ("mlp/linear", layers["mlp"], "linear_lora"),
    ):
        path = f"PaliGemma/llm/layers/{path}"
        assert found[path].dtype == jnp.float32
        assert found[path].sharding.is_equivalent_to(weights.leaves(shardings)[path], 4)
        base = np.asarray(want[path].astype(stored), np.float32)
        merged = base + factors[f"{w}_a"] @ factors[f"{w}_b"]
        np.testing.assert_allclose(found[path], merged, rtol=1e-5, atol=1e-5)
    other = found["action_in_proj/kernel"]
    assert other.dtype == stored
    np.testing.assert_array_equal(other, tree["action_in_proj"]["kernel"].astype(stored))
    assert set(weights.leaves(weights.stored_params(tmp_path))) == set(want)
    kept = weights.load_params(tmp_path, _abstract(tree))
    cast = weights.load_params(tmp_path, _abstract(tree), dtype=jnp.bfloat16)
    _assert_same(cast, jax.tree.map(lambda x: x.astype(jnp.bfloat16), kept))  # Rounded once.


def test_adapters_that_cannot_be_merged_are_refused_with_the_reason(tmp_path):
    weights.save_params(tmp_path / "params", _with_adapters(_tree(), rank=8))
    with pytest.raises(ValueError, match=r"params: .*q_einsum/lora_a is .* of rank 8.*alpha"):
        weights.load_params(tmp_path, _abstract(_tree()))
    with pytest.raises(ValueError, match="rank 8"):
        weights.stored_params(tmp_path)


def test_a_missing_pytorch_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*model\.safetensors"):
        weights.load_params(tmp_path / "model.safetensors", _abstract(_tree()))


@pytest.mark.parametrize(
    "name", ["with space", "折り ü", "a:b", "k=v", "x{y}%20", "~home", "l" * 200]
)
def test_a_folder_may_have_almost_any_name(tmp_path, name):
    tree = _tree()
    weights.save_params(tmp_path / name / "params", tree)
    _assert_same(weights.load_params(tmp_path / name, _abstract(tree)), tree)


@pytest.mark.parametrize("name", ["run [12]", "st*r", "what?", "back\\slash", "gs:"])
def test_a_name_under_which_nothing_could_be_read_again_is_refused(tmp_path, name):
    """Orbax saves into such a folder without a word, and then does not find the arrays."""
    with pytest.raises(ValueError, match=r"Orbax cannot read checkpoints .*symbolic link"):
        weights.save_params(tmp_path / name / "params", _tree())
    assert not (tmp_path / name).exists()


def test_a_teacher_may_lie_in_a_folder_with_brackets(tmp_path):
    tree = _tree()
    (tmp_path / "run [12]").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run [12]")
    weights.save_params(tmp_path / "link" / "params", tree)
    _assert_same(weights.load_params(tmp_path / "run [12]", _abstract(tree)), tree)


def test_a_run_of_lerobots_is_told_its_checkpoint(tmp_path):
    (tmp_path / "checkpoints" / "last").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"run of LeRobot's: name .*/checkpoints/last"):
        weights.stored_params(tmp_path)


def test_parameters_written_anew_have_another_digest(saved, tmp_path):
    tree = _tree()
    tree["action_in_proj"]["bias"] = tree["action_in_proj"]["bias"] + 1
    weights.save_params(tmp_path / "100" / "params", tree)
    assert weights.digest(saved) == weights.digest(saved / "params")
    assert weights.digest(tmp_path / "100") != weights.digest(saved)


def test_the_digest_of_a_large_file_is_of_pieces_of_it(tmp_path):
    content, found = bytearray(weights.SAMPLES * weights.SAMPLE * 4), []
    for place in (0, 1, len(content) // 2, len(content) - 1):
        content[place] = 1
        (tmp_path / "model.safetensors").write_bytes(content)
        found.append(weights.digest(tmp_path))
    assert len(set(found)) == 3, "the last byte is in no piece"
