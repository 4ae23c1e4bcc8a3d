"""Parity with openpi: what both sides are given, from seeds, and what our side makes of it.

`interop/record_parity.py` runs openpi on the same and stores the results in
`models/openpi_parity.npz`; `models/test_parity_openpi.py` compares. Images and patches have
openpi's sizes, which it hard-codes; all else is small. Inputs are numpy, whose generators give the
same numbers in every version.
"""

import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from shallow_pi.checkpoints import weights
from shallow_pi.data.robots import pipelines
from shallow_pi.distill import losses, step
from shallow_pi.distill import spec as specs
from shallow_pi.inference import forward, prepare, sampler, tuning
from shallow_pi.models import gemma, pi0, siglip
from shallow_pi.models import observation as observations

# Small enough for a test; openpi's module constant is set to it where its side runs.
VOCAB_SIZE = 512
BATCH = 2
NUM_STEPS = 10
SEED = 7


def model(pi05: bool, depth: int, dtype: str) -> pi0.Pi0Config:
    """Narrow streams of unequal width, openpi's images and cameras, a two-layer image encoder."""
    return pi0.Pi0Config(
        pi05=pi05,
        depth=depth,
        backbone=gemma.GemmaConfig(width=64, mlp_dim=128, num_heads=8, num_kv_heads=1, head_dim=16),
        expert=gemma.GemmaConfig(width=48, mlp_dim=96, num_heads=8, num_kv_heads=1, head_dim=16),
        image=siglip.SiglipConfig(width=32, depth=2, mlp_dim=64, num_heads=2, patch_size=14),
        vocab_size=VOCAB_SIZE,
        action_dim=16,
        action_horizon=6,
        max_token_len=24,
        dtype=dtype,
    )


# Depth 1 is a single block; at depth 4 the layers must come in their order, too.
MODELS = {
    f"{name}_l{depth}_{dtype}": model(name == "pi05", depth, dtype)
    for name in ("pi0", "pi05")
    for depth, dtype in ((1, "float32"), (4, "float32"), (4, "bfloat16"))
}
# Largest difference from openpi, as a share of the largest of its numbers; deep stacks: 1e-4.
BLOCK_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
# What a single block, embedding or encoder gives.
BLOCKS = ("image_tokens", "prompt_tokens", "suffix_tokens", "condition")


def parameters(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """A float32 array for every path, each from a generator of its own.

    Kernels keep the scale of what goes through them, and no leaf is zero, so each one matters.
    """
    return {
        path: np.random.default_rng((SEED, zlib.crc32(path.encode()))).standard_normal(
            shape, np.float32
        )
        * np.float32(_scale(path, shape))
        for path, shape in shapes.items()
    }


def _scale(path: str, shape: tuple[int, ...]) -> float:
    parent, _, leaf = path.rpartition("/")
    if leaf in ("bias", "scale") or len(shape) < 2:
        return 0.1
    if parent.endswith("img/embedding"):
        return math.prod(shape[:-1]) ** -0.5
    if parent.rpartition("/")[2] in ("query", "key", "value"):
        return shape[-3] ** -0.5
    return shape[-2] ** -0.5


def batch(config: pi0.Pi0Config) -> dict[str, object]:
    """A batch under openpi's keys; camera 3 of sample 0 is absent, prompts end in padding."""
    generator = np.random.default_rng(SEED)
    b, size, prompt = BATCH, config.image_size, config.max_token_len
    masks = {name: np.ones(b, bool) for name in config.cameras}
    masks[config.cameras[-1]][0] = False
    return {
        "image": {
            name: generator.integers(0, 256, (b, size, size, 3), np.uint8)
            for name in config.cameras
        },
        "image_mask": masks,
        "state": generator.standard_normal((b, config.action_dim), np.float32),
        "tokenized_prompt": generator.integers(0, config.vocab_size, (b, prompt), np.int32),
        "tokenized_prompt_mask": np.arange(prompt) < prompt - 5 + 3 * np.arange(b)[:, None],
        "actions": generator.standard_normal(
            (b, config.action_horizon, config.action_dim), np.float32
        ),
    }


def noise(config: pi0.Pi0Config) -> np.ndarray:
    """The start of the sampler's path."""
    shape = BATCH, config.action_horizon, config.action_dim
    return np.random.default_rng(SEED + 1).standard_normal(shape, np.float32)


def times() -> np.ndarray:
    """Flow times of the embedded suffix, one a sample."""
    return np.array([0.25, 0.9], np.float32)


def tower_inputs(config: pi0.Pi0Config) -> dict[str, np.ndarray]:
    """Embedded tokens and the condition of the adaptive norms, for the tower alone.

    Tokens of standard deviation 1 down to 0.01, where the norms' epsilon counts.
    """
    generator = np.random.default_rng(SEED + 2)

    def tokens(count: int, width: int) -> np.ndarray:
        sizes = np.geomspace(1, 0.01, count, dtype=np.float32)[:, None]
        return generator.standard_normal((BATCH, count, width), np.float32) * sizes

    prefix = 40
    return {
        "prefix": tokens(prefix, config.backbone.width),
        "suffix": tokens(config.action_horizon + (not config.pi05), config.expert.width),
        "valid": np.arange(prefix) < prefix - 7 * np.arange(BATCH)[:, None],
        "condition": generator.standard_normal((BATCH, config.expert.width), np.float32),
    }


def own_params(config: pi0.Pi0Config) -> dict:
    """The parameters in our tree."""
    shapes = weights.leaves(pi0.abstract_params(config))
    return nested(parameters({path: leaf.shape for path, leaf in shapes.items()}))


def nested(flat: Mapping[str, np.ndarray]) -> dict:
    """`{"a/b": x}` as `{"a": {"b": x}}`."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(leaf)
    return tree


def thinned(array: jax.Array) -> np.ndarray:
    """Some 2,000 numbers of an array, spread over all its axes."""
    flat = np.asarray(array, np.float32).reshape(-1)
    return flat[:: -(-flat.size // 2000) | 1]


def ours(config: pi0.Pi0Config) -> dict[str, np.ndarray]:
    """Our outputs for the inputs; the names are those of the recorded file."""
    return {
        name: thinned(value)
        for name, value in jax.jit(_ours, static_argnums=0)(config, own_params(config)).items()
    }


def observe(samples: dict[str, object]) -> observations.Observation:
    """Our observation of the batch."""
    return pipelines.to_observation(jax.tree.map(jnp.asarray, samples)).as_float()


def _ours(config: pi0.Pi0Config, params: dict) -> dict[str, jax.Array]:
    dtype, samples = jnp.dtype(config.dtype), batch(config)
    observation = observe(samples)
    encoder = siglip.Module(config.image, config.backbone.width, dtype)
    images = observation.images[config.cameras[0]]
    actions, t = jnp.asarray(samples["actions"]), jnp.asarray(times())
    policy = pi0.Pi0(config)
    prefix = policy.apply({"params": params}, observation, method="embed_prefix").tokens
    suffix, condition = policy.apply(
        {"params": params},
        *(observation.state, actions[:, None], t[:, None]),
        method="embed_suffix",
    )
    results = {
        "image_tokens": encoder.apply({"params": params["PaliGemma"]["img"]}, images),
        "prompt_tokens": prefix[:, -config.max_token_len :],
        "suffix_tokens": suffix,
        **_our_tower(config, params["PaliGemma"]["llm"]),
        "loss": _our_loss(config, params, samples),
        # Serving casts every parameter to the compute dtype.
        "actions": sampler.sample_actions(
            config,
            jax.tree.map(lambda x: x.astype(dtype), params),
            observation,
            jnp.asarray(noise(config)),
            num_steps=NUM_STEPS,
        ),
    }
    return results if condition is None else results | {"condition": condition}


def _our_tower(config: pi0.Pi0Config, params: dict) -> dict[str, jax.Array]:
    inputs = {name: jnp.asarray(value) for name, value in tower_inputs(config).items()}
    suffix, valid = inputs["suffix"], inputs["valid"]
    condition = inputs["condition"].astype(config.dtype)[:, None] if config.pi05 else None
    geometry = gemma.Geometry.create(
        valid, config.expert.head_dim, suffix.shape[1], config.action_horizon, condition
    )
    tower = gemma.Module(
        (config.backbone, config.expert), config.depth, config.vocab_size, jnp.dtype(config.dtype)
    )
    prefix = inputs["prefix"]
    suffix, *_ = tower.apply({"params": params}, prefix, suffix[:, None], geometry)
    keys, values = _our_cache(config, params, prefix.astype(config.dtype), geometry)
    # Keys and values of padding are never read, and differ.
    mask = valid[None, :, :, None, None]
    return {"tower": suffix, "keys": keys * mask, "values": values * mask}


def _our_cache(
    config: pi0.Pi0Config, llm: dict, prefix: jax.Array, geometry: gemma.Geometry
) -> tuple[jax.Array, jax.Array]:
    """The prefix's keys and values of every layer, as inference caches them."""
    stack = prepare.stack_layers(config, {"PaliGemma": {"llm": llm}}, 0, tuning.SCANNED)
    c = config.backbone
    empty = jnp.zeros((config.depth, *prefix.shape[:2], c.num_kv_heads, c.head_dim), prefix.dtype)
    mask = geometry.prefix_valid[:, None]
    _, cache = forward.run_layers(
        *(config, stack, prefix, (empty, empty), 0, geometry.prefix_rope, mask, None, "xla")
    )
    return cache


def _our_loss(config: pi0.Pi0Config, params: dict, samples: dict) -> jax.Array:
    """openpi's loss through the training step's own draws; shape (b, ah)."""
    spec = specs.Spec(
        student=config,
        optimizer=None,
        schedule=None,
        losses=losses.Losses(task=1.0, velocity=0.0, attention=0.0),
        augmentation=observations.NO_AUGMENTATION,
    )
    mask = jnp.ones(samples["actions"].shape[:2], bool)
    whole = pipelines.to_batch(jax.tree.map(jnp.asarray, samples) | {"action_mask": mask})
    inputs = step.draw_inputs(spec, jax.random.key(SEED), whole)
    v, _ = pi0.velocity(config, params, inputs.observation, inputs.x_t, inputs.t)
    return losses.task_loss(v, inputs.u)


def compare(
    config: pi0.Pi0Config, found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]
) -> None:
    """Assert that all results agree, within the block's or the deep stack's tolerance."""
    apart = {}
    for name, value in found.items():
        block = name in BLOCKS or (config.depth == 1 and name != "actions")
        tolerance = (BLOCK_TOLERANCE if block else TOLERANCE)[config.dtype]
        difference = np.abs(value - expected[name]).max() / np.abs(expected[name]).max()
        if not difference <= tolerance:
            apart[name] = f"{difference:.2g} (at most {tolerance:.0e})"
    assert not apart, f"relative differences from openpi: {apart}"
