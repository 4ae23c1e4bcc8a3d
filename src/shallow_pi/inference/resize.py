"""Resize images on the device as Pillow does on the host: two matrix products an image.

Bilinear with antialiasing, proportions kept, padded with black, as openpi's client resizes. Pillow
rounds to bytes after the columns and after the rows, and so does this: results differ by at most
one grey level. On a GPU this saves Pillow's 1 ms a camera of 480 × 640; a CPU is faster with
Pillow, which leaves out the zeros of the matrices.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


def fit(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width inside of a square of `size`, rounded as openpi's client rounds."""
    ratio = max(width / size, height / size)
    return max(1, int(height / ratio)), max(1, int(width / ratio))


def weights(before: int, after: int) -> Float[np.ndarray, "after before"]:
    """Bilinear weights of one axis: a triangle as wide as the scale, which must be at least 1."""
    scale = before / after
    support = max(scale, 1.0)
    centers = (np.arange(after) + 0.5) * scale
    # Pillow counts a pixel in if its index lies between these.
    low = np.maximum((centers - support + 0.5).astype(int), 0)[:, None]
    high = np.minimum((centers + support + 0.5).astype(int), before)[:, None]
    pixels = np.arange(before)[None]
    distance = np.abs(pixels + 0.5 - centers[:, None]) / support
    found = np.where((pixels >= low) & (pixels < high), np.maximum(1 - distance, 0.0), 0.0)
    return (found / found.sum(axis=1, keepdims=True)).astype(np.float32)


def resize_with_pad(
    images: UInt8[Array, "b h w 3"], size: int
) -> UInt8[Array, "b {size} {size} 3"]:
    """Resize a batch of images to squares; the same array if the size fits."""
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    rows, columns = fit(height, width, size)
    found = images
    if columns != width:
        found = _multiply("vw,bhwc->bhvc", weights(width, columns), found)
    if rows != height:
        found = _multiply("uh,bhvc->buvc", weights(height, rows), found)
    top, left = (size - rows) // 2, (size - columns) // 2
    pad = ((0, 0), (top, size - rows - top), (left, size - columns - left), (0, 0))
    return jnp.pad(found, pad)


def _multiply(
    equation: str, matrix: Float[np.ndarray, "m n"], images: UInt8[Array, "b h w 3"]
) -> UInt8[Array, "b u v 3"]:
    found = jnp.einsum(
        equation, matrix, images.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return jnp.floor(found + 0.5).astype(jnp.uint8)
