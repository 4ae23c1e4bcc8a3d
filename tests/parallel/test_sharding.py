"""The place of every parameter of the full-size models, written out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from shallow_pi.checkpoints import weights
from shallow_pi.models import pi0
from shallow_pi.parallel import processes, sharding

D, E, L, N = 2048, 1024, 18, None  # N: a whole axis.
F, T = "fsdp", "tensor"
LLM, IMG = "PaliGemma/llm/", "PaliGemma/img/"
LAYERS, BLOCK = LLM + "layers/", IMG + "Transformer/encoderblock/"
HEADS = "MultiHeadDotProductAttention_0/"

# path: (shape, spec with fsdp=2 and tensor=2). The one KV head cannot be split over tensor.
BOTH = {
    LLM + "embedder/input_embedding": ((257152, D), P(T, F)),
    LAYERS + "attn/q_einsum/w": ((L, 8, D, 256), P(N, T, F, N)),
    LAYERS + "attn/q_einsum_1/w": ((L, 8, E, 256), P(N, T, F, N)),
    LAYERS + "attn/kv_einsum/w": ((L, 2, 1, D, 256), P(N, N, N, F, N)),
    LAYERS + "attn/kv_einsum_1/w": ((L, 2, 1, E, 256), P(N, N, N, F, N)),
    LAYERS + "attn/attn_vec_einsum/w": ((L, 8, 256, D), P(N, T, N, F)),
    LAYERS + "attn/attn_vec_einsum_1/w": ((L, 8, 256, E), P(N, T, N, F)),
    LAYERS + "mlp/gating_einsum": ((L, 2, D, 16384), P(N, N, F, T)),
    LAYERS + "mlp_1/gating_einsum": ((L, 2, E, 4096), P(N, N, F, T)),
    LAYERS + "mlp/linear": ((L, 16384, D), P(N, T, F)),
    LAYERS + "mlp_1/linear": ((L, 4096, E), P(N, T, F)),
    LAYERS + "pre_attention_norm/scale": ((L, D), P()),
    LAYERS + "pre_ffw_norm/scale": ((L, D), P()),
    LLM + "final_norm/scale": ((D,), P()),
    IMG + "embedding/kernel": ((14, 14, 3, 1152), P()),
    IMG + "embedding/bias": ((1152,), P()),
    IMG + "pos_embedding": ((1, 256, 1152), P()),
    IMG + "head/kernel": ((1152, D), P(F, N)),
    IMG + "head/bias": ((D,), P()),
    IMG + "Transformer/encoder_norm/scale": ((1152,), P()),
    IMG + "Transformer/encoder_norm/bias": ((1152,), P()),
    BLOCK + "LayerNorm_0/scale": ((27, 1152), P()),
    BLOCK + "LayerNorm_0/bias": ((27, 1152), P()),
    BLOCK + "LayerNorm_1/scale": ((27, 1152), P()),
    BLOCK + "LayerNorm_1/bias": ((27, 1152), P()),
    BLOCK + "MlpBlock_0/Dense_0/kernel": ((27, 1152, 4304), P(N, F, T)),
    BLOCK + "MlpBlock_0/Dense_0/bias": ((27, 4304), P(N, T)),
    BLOCK + "MlpBlock_0/Dense_1/kernel": ((27, 4304, 1152), P(N, T, F)),
    BLOCK + "MlpBlock_0/Dense_1/bias": ((27, 1152), P()),
    BLOCK + HEADS + "query/kernel": ((27, 1152, 16, 72), P(N, F, T, N)),
    BLOCK + HEADS + "query/bias": ((27, 16, 72), P(N, T, N)),
    BLOCK + HEADS + "key/kernel": ((27, 1152, 16, 72), P(N, F, T, N)),
    BLOCK + HEADS + "key/bias": ((27, 16, 72), P(N, T, N)),
    BLOCK + HEADS + "value/kernel": ((27, 1152, 16, 72), P(N, F, T, N)),
    BLOCK + HEADS + "value/bias": ((27, 16, 72), P(N, T, N)),
    BLOCK + HEADS + "out/kernel": ((27, 16, 72, 1152), P(N, T, N, F)),
    BLOCK + HEADS + "out/bias": ((27, 1152), P()),
    "action_in_proj/kernel": ((32, E), P()),
    "action_in_proj/bias": ((E,), P()),
    "action_out_proj/kernel": ((E, 32), P()),
    "action_out_proj/bias": ((32,), P()),
}
PI0 = BOTH | {
    LAYERS + "pre_attention_norm_1/scale": ((L, E), P()),
    LAYERS + "pre_ffw_norm_1/scale": ((L, E), P()),
    LLM + "final_norm_1/scale": ((E,), P()),
    "state_proj/kernel": ((32, E), P()),
    "state_proj/bias": ((E,), P()),
    "action_time_mlp_in/kernel": ((2 * E, E), P(F, T)),
    "action_time_mlp_in/bias": ((E,), P(T)),
    "action_time_mlp_out/kernel": ((E, E), P(T, F)),
    "action_time_mlp_out/bias": ((E,), P()),
}
PI05 = BOTH | {
    LAYERS + "pre_attention_norm_1/Dense_0/kernel": ((L, E, 3 * E), P(N, F, N)),
    LAYERS + "pre_attention_norm_1/Dense_0/bias": ((L, 3 * E), P()),
    LAYERS + "pre_ffw_norm_1/Dense_0/kernel": ((L, E, 3 * E), P(N, F, N)),
    LAYERS + "pre_ffw_norm_1/Dense_0/bias": ((L, 3 * E), P()),
    LLM + "final_norm_1/Dense_0/kernel": ((E, 3 * E), P(F, N)),
    LLM + "final_norm_1/Dense_0/bias": ((3 * E,), P()),
    "time_mlp_in/kernel": ((E, E), P(F, T)),
    "time_mlp_in/bias": ((E,), P(T)),
    "time_mlp_out/kernel": ((E, E), P(T, F)),
    "time_mlp_out/bias": ((E,), P()),
}


def _nested(table):
    tree = {}
    for path, (shape, _) in table.items():
        *folders, last = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = jax.ShapeDtypeStruct(shape, jnp.float32)
    return tree


def _specs(tree):
    return {path: leaf.spec for path, leaf in weights.leaves(tree).items()}


@pytest.mark.parametrize(("table", "total"), [(PI0, 3238048528), (PI05, 3353433872)])
def test_every_parameter_lies_where_the_table_says(table, total):
    assert sum(math.prod(shape) for shape, _ in table.values()) == total
    mesh = sharding.MeshConfig(fsdp=2, tensor=2).create()
    specs = _specs(sharding.param_sharding(mesh, _nested(table)))
    assert specs == {path: spec for path, (_, spec) in table.items()}
    for path, (shape, spec) in table.items():
        large = math.prod(shape) * 4 >= sharding.LARGE_BYTES
        assert not large or "fsdp" in spec, path


@pytest.mark.parametrize(("table", "pi05"), [(PI0, False), (PI05, True)])
def test_the_written_table_is_the_models_tree(table, pi05):
    shapes = weights.leaves(pi0.abstract_params(pi0.Pi0Config(pi05=pi05)))
    assert {path: leaf.shape for path, leaf in shapes.items()} == {
        path: shape for path, (shape, _) in table.items()
    }


def test_a_scorer_of_image_tokens_is_on_every_device():
    shapes = pi0.abstract_params(pi0.Pi0Config(scored_tokens=64))
    mesh = sharding.MeshConfig(fsdp=2, tensor=2).create()
    specs = _specs(sharding.param_sharding(mesh, shapes))
    own = {path: spec for path, spec in specs.items() if path not in PI0}
    names = ("hidden/bias", "hidden/kernel", "position", "prompt/kernel", "score/kernel")
    assert own == {f"image_scorer/{name}": P() for name in names}


def test_full_size_models_split_over_all_usual_meshes():
    devices = jax.devices()
    for config in (
        sharding.MeshConfig(),
        sharding.MeshConfig(fsdp=8),
        sharding.MeshConfig(fsdp=2, tensor=4),
        sharding.MeshConfig(tensor=8),
    ):
        mesh = config.create(devices)
        sharding.param_sharding(mesh, _nested(PI0))
        sharding.param_sharding(mesh, _nested(PI05))


def test_moments_lie_where_their_parameters_do():
    tree = _nested(PI05)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "opt_state": jax.eval_shape(transform.init, tree),
        "ema_params": tree,
    }
    mesh = sharding.MeshConfig(fsdp=2, tensor=2).create()
    specs = _specs(sharding.param_sharding(mesh, state))
    for path, (_, spec) in PI05.items():
        assert specs[f"opt_state/1/0/mu/{path}"] == spec
        assert specs[f"opt_state/1/0/nu/{path}"] == spec
        assert specs[f"ema_params/{path}"] == spec
    assert specs["step"] == P()
    assert specs["opt_state/1/0/count"] == P()


def test_an_unmatched_large_array_is_an_error_and_a_small_one_is_replicated():
    mesh = sharding.MeshConfig(fsdp=8).create()
    small = {"adapter": {"kernel": jax.ShapeDtypeStruct((1023, 1024), jnp.float32)}}
    assert _specs(sharding.param_sharding(mesh, small)) == {"adapter/kernel": P()}
    large = {
        name: {"kernel": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
        for name in ("adapter", "gate")
    }
    with pytest.raises(ValueError, match=r"adapter/kernel \(1024, 1024\)") as caught:
        sharding.param_sharding(mesh, large)
    assert "gate/kernel" in str(caught.value)


def test_a_large_array_that_fsdp_cannot_split_is_an_error_only_with_fsdp():
    tree = _nested({LAYERS + "mlp/linear": ((1, 1025, 1025), None)})
    with pytest.raises(ValueError, match=r"mlp/linear .* cannot be split .*fsdp=8"):
        sharding.param_sharding(sharding.MeshConfig(fsdp=8).create(), tree)
    specs = _specs(sharding.param_sharding(sharding.MeshConfig().create(), tree))
    assert specs == {LAYERS + "mlp/linear": P(None, "tensor", "fsdp")}


@pytest.mark.parametrize(
    ("axes", "named"),
    [
        ({"tensor": 3}, r"mlp/linear \(18, 16384, 2048\) cannot be split .* tensor=3"),
        ({"fsdp": 3, "tensor": 2}, r"mlp/linear \(18, 16384, 2048\) cannot be split .*fsdp=3"),
    ],
)
def test_no_axis_that_was_asked_for_is_dropped_from_a_large_array(axes, named):
    """Copies would do the same work, or take the memory, that the axis was to divide."""
    devices = jax.devices()[: math.prod(axes.values())]
    mesh = sharding.MeshConfig(data=1, **{"fsdp": 1, **axes}).create(devices)
    with pytest.raises(sharding.CannotSplitError, match=named):
        sharding.param_sharding(mesh, _nested(PI0))


def test_the_rest_of_the_devices_is_data():
    assert dict(sharding.MeshConfig(fsdp=2, tensor=2).create().shape) == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
    }
    assert sharding.MeshConfig().create().devices.shape == (8, 1, 1)
    assert sharding.MeshConfig(data=2, tensor=2).create().devices.shape == (2, 2, 2)
    mesh = sharding.MeshConfig(data=1).create(jax.devices()[3:4])
    assert mesh.devices.tolist() == [[[jax.devices()[3]]]]


def test_the_old_partitioner_is_refused_on_several_devices(monkeypatch):
    """JAX 0.6 and older use it unless `processes.initialize` was called."""
    monkeypatch.setattr(processes, "uses_shardy", lambda: False)
    with pytest.raises(ValueError, match=r"old partitioner.*JAX_USE_SHARDY_PARTITIONER=1"):
        sharding.MeshConfig().create()
    assert sharding.MeshConfig().create(jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sharding.MeshConfig(fsdp=3).create(), "fsdp=3, tensor=1 does not fit 8 devices"),
        (
            lambda: sharding.MeshConfig(data=4, fsdp=1).create(),
            "data=4, .*the product must be 8, where",
        ),
        (lambda: sharding.MeshConfig(data=3).create(), "data=3, .*the product must be 8, where"),
        (lambda: sharding.MeshConfig(fsdp=16).create(), "does not fit 8 devices"),
        (lambda: sharding.MeshConfig(fsdp=0), "fsdp must be 1 or more, or -1 to choose, got 0"),
        (lambda: sharding.MeshConfig(data=0), "mesh.data must be 1 or more, or -1"),
        (lambda: sharding.MeshConfig(tensor=-1), "mesh.tensor must be 1 or more, got -1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_batch_is_split_over_data_and_fsdp_and_copied_over_tensor():
    mesh = sharding.MeshConfig(fsdp=2, tensor=2).create()
    batch = jax.device_put(np.arange(8), sharding.batch_sharding(mesh))
    rows = sorted(shard.data.tolist() for shard in batch.addressable_shards)
    assert rows == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [6, 7], [6, 7]]
    copy = jax.device_put(np.arange(8), sharding.replicated(mesh))
    assert all(shard.data.shape == (8,) for shard in copy.addressable_shards)


def test_a_batch_size_that_devices_cannot_share_is_an_error():
    mesh = sharding.MeshConfig(fsdp=2, tensor=2).create()
    sharding.check_batch_size(mesh, 12)
    with pytest.raises(ValueError, match=r"batch size 10 is not .* 4 devices .*set it to 8 or 12"):
        sharding.check_batch_size(mesh, 10)
    with pytest.raises(ValueError, match=r"batch size 0 .*set it to 4"):
        sharding.check_batch_size(mesh, 0)


def test_a_split_product_is_the_whole_one():
    """Specs that disagree with the mathematics would still compile; the numbers must not move."""
    mesh = sharding.MeshConfig(fsdp=2, tensor=2).create()
    key = jax.random.key(0)
    params = {
        "gating_einsum": jax.random.normal(key, (1, 2, 8, 16)),
        "linear": jax.random.normal(key, (1, 16, 8)),
    }
    params = {"PaliGemma": {"llm": {"layers": {"mlp": params}}}}
    x = jax.random.normal(key, (8, 8))

    def forward(params, x):
        mlp = params["PaliGemma"]["llm"]["layers"]["mlp"]
        gate, up = jnp.einsum("bd,idf->ibf", x, mlp["gating_einsum"][0])
        return (jax.nn.gelu(gate) * up) @ mlp["linear"][0]

    shardings = sharding.param_sharding(mesh, params)
    split = jax.jit(
        forward,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=sharding.batch_sharding(mesh),
    )(jax.device_put(params, shardings), jax.device_put(x, sharding.batch_sharding(mesh)))
    np.testing.assert_allclose(split, forward(params, x), rtol=1e-5, atol=1e-5)
