"""Fewer image tokens: the mean of each cell of neighbouring patches, between tower and backbone.

The cells are equal rectangles of a camera's grid of patches, as near to squares as possible.
Attention to a cell stands for that to all of its patches, so a teacher's attention over patches
becomes one over cells by adding probabilities (`pool_logits`).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def cell(side: int, tokens: int) -> tuple[int, int]:
    """Height and width of the cells that make `tokens` out of a grid of side² patches.

    Raises:
      ValueError: the grid cannot be cut so; lists the numbers that it can be cut into.
    """
    divisors = [n for n in range(1, side + 1) if side % n == 0]
    cells = {}
    for height in divisors:  # The last of a number is the nearest to a square.
        for width in (n for n in divisors if n >= height):
            cells[side**2 // (height * width)] = height, width
    if tokens not in cells:
        possible = ", ".join(map(str, sorted(cells, reverse=True)))
        raise ValueError(
            f"{tokens} image tokens a camera cannot be pooled from a grid of {side} × {side} "
            f"patches in equal cells: give one of {possible}."
        )
    return cells[tokens]


def pool(tokens: Float[Array, "b n d"], side: int, count: int) -> Float[Array, "b m d"]:
    """The mean of every cell of every camera.

    A camera's tokens are a grid of `side`² patches, row by row; it has `count` cells. As many cells
    as patches leave the tokens as they are.
    """
    if count == side**2:
        return tokens
    b, _, d = tokens.shape
    return jnp.mean(_cells(tokens, side, count), axis=(-4, -2)).reshape(b, -1, d)


def pool_logits(
    logits: Float[Array, "*b s"], cameras: int, side: int, count: int
) -> Float[Array, "*b p"]:
    """Attention logits over cells, whose softmax is the sum of that over the patches.

    The prefix begins with the patches of all cameras; those of one camera all exist or none does.
    `side` and `count` are as of `pool`.
    """
    if count == side**2:
        return logits
    images = cameras * side**2
    patches = _cells(logits[..., :images, None], side, count)
    cells = jax.scipy.special.logsumexp(patches, axis=(-4, -2))
    cells = cells.reshape(*logits.shape[:-1], -1)
    return jnp.concatenate([cells, logits[..., images:]], axis=-1)


def _cells(x: Float[Array, "*b n d"], side: int, count: int) -> Float[Array, "*b c y h x w d"]:
    """Patches of several cameras by cell: rows of cells, height, columns of cells, width."""
    *b, _, d = x.shape
    height, width = cell(side, count)
    return x.reshape(*b, -1, side // height, height, side // width, width, d)
