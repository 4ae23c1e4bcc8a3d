"""Low-rank adapters of openpi's LoRA checkpoints, merged into the matrices they adapt.

openpi stores `lora_a`, `lora_b` beside an attention projection's `w`, and `<name>_lora_a`,
`<name>_lora_b` beside an MLP's matrices (models/lora.py). An attention adapter is scaled by
alpha / rank, and alpha is in the training config, not in the checkpoint; openpi's own variants
(`gemma_2b_lora` of rank 16, `gemma_300m_lora` of rank 32) all have alpha = rank, so the scale is 1,
and any other rank is refused. MLP adapters are never scaled. The output projection's adapter sums
over the heads twice, once in each factor, which its merged matrix has to follow.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from shallow_pi.models import parameters

# Rank of openpi's adapters by stream: backbone, action expert.
RANKS = {"": 16, "_1": 32}

_LEAF = re.compile(r"(?P<base>.*?)(?:/lora|_lora)_(?P<factor>[ab])")
_STREAM = re.compile(r"/(?:attn/\w+_einsum|mlp)(?P<stream>_1)?/")


def is_adapter(path: str) -> bool:
    """True if the leaf at this path is a factor of an adapter."""
    return _LEAF.fullmatch(path) is not None


def adapters(leaves: Mapping[str, Array | jax.ShapeDtypeStruct]) -> dict[str, tuple[str, str]]:
    """The paths of the two factors of every adapted matrix, by the path of the matrix.

    Raises:
      ValueError: a factor without its partner or its matrix, or a rank openpi's variants lack.
    """
    found: dict[str, dict[str, str]] = {}
    for path in leaves:
        if match := _LEAF.fullmatch(path):
            base = match["base"] if f"{match['base']}/w" not in leaves else f"{match['base']}/w"
            found.setdefault(base, {})[match["factor"]] = path
    for base, factors in found.items():
        absent = [path for path in [base] if path not in leaves]
        absent += [f"factor {name} of {base}" for name in "ab" if name not in factors]
        if absent:
            raise ValueError(
                f"this LoRA checkpoint lacks {absent}: expected openpi's, a matrix and its two "
                "factors; fetch it again, or merge it with the code that trained it"
            )
        stream = _STREAM.search(f"{base}/")
        expected = RANKS[(stream["stream"] or "") if stream else ""]
        rank = leaves[factors["a"]].shape[-1]
        if rank != expected:
            raise ValueError(
                f"{factors['a']} is a LoRA adapter of rank {rank}, not openpi's {expected}: its "
                "alpha is not in the checkpoint, merge it with the code that trained it"
            )
    return {base: (factors["a"], factors["b"]) for base, factors in found.items()}


def merge(
    path: str, w: Float[Array, "*shape"], a: Float[Array, "..."], b: Float[Array, "..."]
) -> Float[Array, "*shape"]:
    """The sum of openpi's matrix at a path and its adapter, in float32.

    The matrix has a leading layer axis; the factors are of shapes (…, in, rank) and (…, rank, out).
    """
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    parameter = parameters.find(path)
    if parameter is not None and "heads" in parameter.inputs:
        # (l, n, h, d): openpi's "BTNH,NHL->BTL" sums over the heads, then "BTL,NLD->BTD" again.
        b = jnp.sum(b, axis=1, keepdims=True)
    return w.astype(jnp.float32) + jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
