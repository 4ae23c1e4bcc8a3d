"""One program from bytes to actions: a single buffer goes in, one small array comes out.

An argument of a compiled call costs 1 to 2 µs on the host, a transfer some 10 µs, and a full-size
model has hundreds of weights. So everything that changes from call to call (noise or its seed,
state, prompt, masks, images) is packed into one buffer of bytes, a row for each observation
(`Layout`, `pack`), and taken apart again inside the program. Of the weights every vector (biases,
norms) is packed too, when they are prepared: slices of a vector cost nothing where elementwise
operations read them. Matrices stay arguments of their own, because XLA would copy the slice.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8, UInt32

from shallow_pi.inference import prepare, quantize, real_time, resize, sampler, tuning
from shallow_pi.models import observation as observations
from shallow_pi.models import pi0

KEY_KIND = "threefry2x32"


class Seed(NamedTuple):
    """Noise that the program draws itself: from `fold_in(key, call)`."""

    # `jax.random.key_data` of a key.
    key: UInt32[np.ndarray, " 2"]
    # One for all rows, or one for each.
    call: int | UInt32[np.ndarray, " b"]


@dataclasses.dataclass(frozen=True)
class Layout:
    """The fields of one row of the buffer; a program is compiled for each layout."""

    # With the cameras and the prompt length of the observations (see `prepare.trim`).
    config: pi0.Pi0Config
    # Chunks go on from previous ones.
    guided: bool = False
    # Height and width of each camera's images, where they are not yet the model's.
    sizes: tuple[tuple[int, int], ...] = ()

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """A row, as NumPy's structured dtype without gaps."""
        c = self.config
        chunk = c.action_horizon, c.action_dim
        sizes = self.sizes or ((c.image_size, c.image_size),) * len(c.cameras)
        fields: list[tuple[str, type, tuple[int, ...]]] = [
            ("key", np.uint32, (2,)),
            ("call", np.uint32, ()),
            # 1 where the noise is given and not drawn.
            ("given", np.uint32, ()),
            ("noise", np.float32, chunk),
            ("state", np.float32, (c.action_dim,)),
            # -1 where the prompt is masked.
            ("tokens", np.int32, (c.max_token_len,)),
        ]
        if self.guided:
            fields += [
                ("previous", np.float32, chunk),
                ("delay", np.int32, ()),
                ("executed", np.int32, ()),
                ("max_weight", np.float32, ()),
            ]
        fields.append(("camera_masks", np.uint8, (len(c.cameras),)))
        fields += [
            (name, np.uint8, (*size, 3)) for name, size in zip(c.cameras, sizes, strict=True)
        ]
        return np.dtype(fields)


def pack(
    layout: Layout,
    observation: observations.Observation,
    start: Float[np.ndarray, "b ah ad"] | Seed,
    guidance: real_time.Guidance | None = None,
) -> UInt8[np.ndarray, "b n"]:
    """Write observations, the start of their paths and previous chunks into one buffer.

    The observation, which has the layout's cameras and prompt length, and the guidance of a guided
    layout are on the host; images are uint8.

    Raises:
      ValueError: images of another dtype or size.
    """
    rows = np.empty(len(observation.state), layout.dtype)
    if isinstance(start, Seed):
        rows["key"], rows["call"], rows["given"], rows["noise"] = start.key, start.call, 0, 0
    else:
        rows["key"], rows["call"], rows["given"], rows["noise"] = 0, 0, 1, start
    rows["state"] = observation.state
    masked = np.where(observation.tokenized_prompt_mask, observation.tokenized_prompt, -1)
    rows["tokens"] = masked
    if guidance is not None:
        for name in guidance._fields:
            rows[name] = getattr(guidance, name)
    for i, name in enumerate(layout.config.cameras):
        image, shape = np.asarray(observation.images[name]), rows[name].shape
        if image.dtype != np.uint8 or image.shape != shape:
            raise ValueError(
                f"images of {name} must be uint8 {shape}, got {image.dtype} {image.shape}"
            )
        rows["camera_masks"][:, i], rows[name] = observation.image_masks[name], image
    return rows.view(np.uint8).reshape(len(rows), -1)


def unpack(
    layout: Layout, packed: UInt8[Array, "b n"]
) -> tuple[observations.Observation, Float[Array, "b ah ad"], real_time.Guidance | None]:
    """Take a buffer apart inside a program; images are in [-1, 1] then."""
    found = _fields(layout, packed)

    def draw(key: Array, call: Array) -> Array:
        folded = jax.random.fold_in(jax.random.wrap_key_data(key, impl=KEY_KIND), call)
        return jax.random.normal(folded, found["noise"].shape[1:])

    drawn = jax.vmap(draw)(found["key"], found["call"])
    noise = jnp.where(found["given"][:, None, None] > 0, found["noise"], drawn)
    names = dict(enumerate(layout.config.cameras))
    observation = observations.Observation(
        images={name: found[name] for name in names.values()},
        image_masks={name: found["camera_masks"][:, i] > 0 for i, name in names.items()},
        state=found["state"],
        tokenized_prompt=jnp.maximum(found["tokens"], 0),
        tokenized_prompt_mask=found["tokens"] >= 0,
    )
    guidance = None
    if layout.guided:
        guidance = real_time.Guidance(
            found["previous"], found["delay"], found["executed"], found["max_weight"][0]
        )
    return observation.as_float(), noise, guidance


def resized(layout: Layout, packed: UInt8[Array, "b n"]) -> UInt8[Array, "b m"]:
    """The buffer with every image in the model's size, by a program of its own.

    The sampler's program, which takes long to compile, does not depend on a robot's cameras then.
    """
    found, side = _fields(layout, packed), layout.config.image_size
    images = [resize.resize_with_pad(found[name], side) for name in layout.config.cameras]
    head = layout.dtype.itemsize - sum(found[name][0].size for name in layout.config.cameras)
    flat = [image.reshape(len(packed), -1) for image in images]
    return jnp.concatenate([packed[:, :head], *flat], axis=1)


_resized = jax.jit(resized, static_argnums=0)


def _fields(layout: Layout, packed: UInt8[Array, "b n"]) -> dict[str, Array]:
    found = {}
    for name, (field, start, *_) in (layout.dtype.fields or {}).items():
        part = packed[:, start : start + field.itemsize]
        if field.base != np.uint8:
            words = part.reshape(len(packed), -1, field.base.itemsize)
            part = jax.lax.bitcast_convert_type(words, field.base)
        found[name] = part.reshape(len(packed), *field.shape)
    return found


class Arrays(NamedTuple):
    """Prepared weights as the arguments of a program."""

    # One array for each dtype: all vectors of it, one behind the other.
    vectors: tuple[Float[Array, " n"], ...]
    others: tuple[Array, ...]


def pack_weights(prepared: prepare.Prepared) -> Arrays:
    """Join the vectors among prepared weights."""
    leaves = jax.tree.leaves(prepared)
    groups = [
        [leaf for leaf in leaves if leaf.ndim == 1 and leaf.dtype == dtype]
        for dtype in _vector_dtypes(leaves)
    ]
    others = tuple(leaf for leaf in leaves if leaf.ndim != 1)
    return Arrays(tuple(jnp.concatenate(group) for group in groups), others)


def unpack_weights(shapes: PyTree, arrays: Arrays) -> prepare.Prepared:
    """Inverse of `pack_weights`, given the prepared weights as `jax.ShapeDtypeStruct`s."""
    leaves, tree = jax.tree.flatten(shapes)
    dtypes, others = _vector_dtypes(leaves), iter(arrays.others)
    starts = dict.fromkeys(dtypes, 0)
    found = []
    for leaf in leaves:
        if leaf.ndim != 1:
            found.append(next(others))
            continue
        start = starts[leaf.dtype]
        starts[leaf.dtype] = end = start + leaf.shape[0]
        found.append(jax.lax.slice(arrays.vectors[dtypes.index(leaf.dtype)], (start,), (end,)))
    return jax.tree.unflatten(tree, found)


def _vector_dtypes(leaves: list[np.ndarray]) -> list[np.dtype]:
    return sorted({leaf.dtype for leaf in leaves if leaf.ndim == 1}, key=str)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A model's weights on the device, and the program that samples with them."""

    arrays: Arrays
    # Shapes of the prepared weights (see `unpack_weights`).
    shapes: PyTree
    # Integration steps.
    num_steps: int
    options: tuning.InferenceOptions

    @classmethod
    def create(
        cls,
        config: pi0.Pi0Config,
        params: PyTree,
        num_steps: int,
        options: tuning.InferenceOptions,
        bounds: quantize.Bounds | None = None,
    ) -> "Program":
        """Prepare a model's parameters; `bounds` are those of `prepare.prepare`."""
        given = (config, num_steps, options, params, bounds)
        return cls(_packed(*given), _prepared.eval_shape(*given), num_steps, options)

    @property
    def weights(self) -> prepare.Prepared:
        """The prepared weights, taken apart."""
        return unpack_weights(self.shapes, self.arrays)

    @functools.cached_property
    def run(self) -> jax.stages.Wrapped:
        """The jitted function of (layout, arrays, buffer); the layout is static."""
        leaves, tree = jax.tree.flatten(self.shapes)
        return _jitted(tuple(leaves), tree, self.num_steps, self.options)

    def __call__(
        self, layout: Layout, packed: UInt8[np.ndarray | Array, "b n"]
    ) -> Float[Array, "b ah ad"]:
        """Normalized actions on the device, float32; images are resized there if need be."""
        if layout.sizes:
            packed = _resized(layout, packed)
            layout = dataclasses.replace(layout, sizes=())
        actions: Array = self.run(layout, self.arrays, packed)
        return actions


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _prepared(
    config: pi0.Pi0Config,
    num_steps: int,
    options: tuning.InferenceOptions,
    params: PyTree,
    bounds: quantize.Bounds | None,
) -> prepare.Prepared:
    return prepare.prepare(config, params, sampler.integration_times(num_steps), options, bounds)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _packed(
    config: pi0.Pi0Config,
    num_steps: int,
    options: tuning.InferenceOptions,
    params: PyTree,
    bounds: quantize.Bounds | None,
) -> Arrays:
    return pack_weights(_prepared(config, num_steps, options, params, bounds))


@functools.lru_cache(maxsize=16)
def _jitted(
    leaves: tuple[jax.ShapeDtypeStruct, ...],
    tree: jax.tree_util.PyTreeDef,
    num_steps: int,
    options: tuning.InferenceOptions,
) -> jax.stages.Wrapped:
    """One function for all programs of a kind, so that it is traced and compiled once."""
    shapes = jax.tree.unflatten(tree, leaves)
    return jax.jit(
        functools.partial(_run, shapes=shapes, num_steps=num_steps, options=options),
        static_argnums=0,
    )


def _run(
    layout: Layout,
    arrays: Arrays,
    packed: UInt8[Array, "b n"],
    *,
    shapes: PyTree,
    num_steps: int,
    options: tuning.InferenceOptions,
) -> Float[Array, "b ah ad"]:
    observation, noise, guidance = unpack(layout, packed)
    return sampler.sample_prepared(
        layout.config,
        unpack_weights(shapes, arrays),
        observation,
        noise,
        num_steps=num_steps,
        options=options,
        guidance=guidance,
    )
