"""Parameters on disk: what is written is read, and what is wrong is named."""

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shallow_pi.models import weights

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
    assert weights.param_depth(tmp_path / "all") == DEPTH
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
        ({"depth": 6}, "the checkpoint has 3 layers, the config 6: set depth=3"),
        ({"pi05": True}, r"this is a π0 checkpoint and the config says π0.5: set pi05=False"),
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


def test_depth_is_read_from_metadata(saved, tmp_path):
    assert weights.param_depth(saved) == DEPTH
    weights.save_params(tmp_path / "params", {"other": jnp.zeros(2)})
    with pytest.raises(ValueError, match=r"not a π0 or π0\.5 checkpoint"):
        weights.param_depth(tmp_path)


def test_an_absent_checkpoint_is_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        weights.load_params(tmp_path / "nowhere", _abstract(_tree()))
    with pytest.raises(ValueError, match=r"holds the steps 100: name one"):
        weights.load_params(saved.parent, _abstract(_tree()))
    (tmp_path / "params").mkdir()
    with pytest.raises(ValueError, match="half written"):
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


def test_truncated_numbers_are_an_error_and_not_zeros(tmp_path):
    tree = {"w": jnp.arange(4000.0)}
    weights.save_params(tmp_path / "params", tree)
    data = max(
        (file for file in (tmp_path / "params").rglob("*") if file.is_file()),
        key=lambda file: file.stat().st_size,
    )
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match="fetch it again"):
        weights.load_params(tmp_path, _abstract(tree))


def test_an_existing_folder_is_never_overwritten(saved):
    with pytest.raises(FileExistsError, match="never overwritten"):
        weights.save_params(saved / "params", _tree())


def test_locate_leaves_local_paths_alone_and_refuses_unknown_schemes(tmp_path):
    assert weights.locate(tmp_path) == tmp_path
    with pytest.raises(ValueError, match="expected a local path or gs://"):
        weights.locate("s3://bucket/model")


def test_locate_finds_what_openpi_has_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    (tmp_path / "bucket" / "model").mkdir(parents=True)
    assert weights.locate("gs://bucket/model/") == tmp_path / "bucket" / "model"


def test_locate_downloads_a_folder_or_a_file_once(tmp_path, monkeypatch):
    bucket = fsspec.filesystem("memory")
    bucket.pipe({"/bucket/model/params/a": b"one", "/bucket/model/assets/b": b"two"})
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol, **_: bucket)
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    folder = weights.locate("gs://bucket/model")
    assert (folder / "params" / "a").read_bytes() == b"one"
    assert (folder / "assets" / "b").read_bytes() == b"two"
    file = weights.locate("gs://bucket/model/params/a")
    assert file.read_bytes() == b"one"
    assert [child.name for child in (tmp_path / "bucket").iterdir()] == ["model"]


def test_an_interrupted_download_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    bucket = fsspec.filesystem("memory")
    bucket.pipe({"/bucket/large/params/a": b"one", "/bucket/large/params/b": b"two"})
    monkeypatch.setattr(fsspec, "filesystem", lambda protocol, **_: bucket)
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    get_file = bucket.get_file

    def fail_on_second(source, target):
        if source.endswith("b"):
            raise ConnectionError("connection reset")
        get_file(source, target)

    monkeypatch.setattr(bucket, "get_file", fail_on_second)
    with pytest.raises(FileNotFoundError, match=r"connection reset.*put it at .*bucket/large"):
        weights.locate("gs://bucket/large")
    assert list((tmp_path / "bucket").iterdir()) == []


def test_locate_says_what_is_missing_where_it_cannot_download(tmp_path, monkeypatch):
    def no_gcsfs(protocol, **_):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(fsspec, "filesystem", no_gcsfs)
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"install gcsfs.*uv sync --extra gcs.*put it at"):
        weights.locate("gs://openpi-assets/checkpoints/pi0_base")
