"""openpi's wire format: msgpack, in which an array is a map of its bytes, dtype and shape.

`pack` writes and `unpack` reads the messages of `openpi_client.msgpack_numpy`; arrays as the PyPI
package msgpack-numpy packs them are understood too, and either with names that are text where they
should be bytes (C++ and JavaScript have no other); such a client is answered alike. Nothing is
ever unpickled, and a client's message is bounded before memory is spent on it: dtypes are numbers,
booleans and text, an array is as long as its bytes, and depth and number of items are limited.
Arrays are read-only views of the message.
"""

import math
import re
from collections.abc import Callable
from typing import Any, Literal, NoReturn, TypeVar

import msgpack
import numpy as np

# Limits of an observation: entries of all its maps and lists together, and levels of them.
# Images and states are arrays, which count as one.
MAX_ITEMS = 65_536
MAX_DEPTH = 16
MAX_ARRAY_AXES = 8

# As NumPy's `dtype.str` writes them, or as it prints them, which clients without NumPy write.
_DTYPE = re.compile(
    r"[<>|=]?(b1|\?|[iu][1248]|f[248]|[US]\d{1,5})|bool|u?int(8|16|32|64)|float(16|32|64)"
)
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"
# msgpack-numpy's: True in the map of an array, False in that of a scalar.
_EITHER = b"nd"

# The packing of arrays: by openpi_client.msgpack_numpy, or by the PyPI package msgpack-numpy; the
# names in the map of an array are bytes, or text.
Packing = Literal["openpi", "openpi-text", "msgpack-numpy", "msgpack-numpy-text"]
# An array or scalar as the map that travels.
Packed = dict[bytes, object] | dict[str, object]
Entries = TypeVar("Entries", dict, list)
# Python types a NumPy scalar is built from, by the kind of its dtype.
_SCALAR_TYPES: dict[str, tuple[type, ...]] = {
    "b": (bool,),
    "i": (int,),
    "u": (int,),
    "f": (int, float),
    "U": (str,),
    "S": (bytes,),
}
_PLAIN = (str, bytes, bool, int, float, np.ndarray, np.generic, type(None))


def pack(value: object, packing: Packing = "openpi") -> bytes:
    """Msgpack of maps, lists, text, numbers and NumPy arrays and scalars.

    Raises:
      ValueError: an array of objects, records or complex numbers.
      TypeError: something else msgpack does not know.
    """
    packed: bytes = msgpack.packb(value, default=_PACKERS[packing])
    return packed


def unpack(message: bytes, *, max_items: int = MAX_ITEMS, max_depth: int = MAX_DEPTH) -> Any:
    """The inverse of `pack`, in either packing.

    Raises:
      ValueError: not msgpack, cut short, too much in it, or a map that claims to be an array and
        is none; the message says which.
    """
    return read(message, max_items=max_items, max_depth=max_depth)[0]


def read(
    message: bytes, *, max_items: int = MAX_ITEMS, max_depth: int = MAX_DEPTH
) -> tuple[Any, Packing]:
    """As `unpack`, with the packing of its arrays, in which a client wants its answer."""
    count = _Counter(max_items)
    packing: Packing = "openpi"

    def read_map(found: dict[object, object]) -> object:
        nonlocal packing
        count(found)
        if is_text := _has_text_names(found):
            found = {n.encode() if isinstance(n, str) else n: v for n, v in found.items()}
        if isinstance(found.get(_EITHER), bool):
            packing = "msgpack-numpy-text" if is_text else "msgpack-numpy"
        elif is_text:
            packing = "openpi-text"
        return _unpack_numpy(found)

    try:
        value = msgpack.unpackb(
            message,
            object_hook=read_map,
            list_hook=count,
            ext_hook=_refuse_extension,
            max_array_len=max_items,
            max_map_len=max_items,
        )
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError) as error:
        why = str(error) or type(error).__name__
        raise ValueError(f"not a readable msgpack message: {why}") from error
    _check(value, max_depth)
    return value, packing


class _Counter:
    """Counts the entries of lists and maps as they are read, and stops at a limit."""

    def __init__(self, limit: int) -> None:
        self._left = self._limit = limit

    def __call__(self, found: Entries) -> Entries:
        self._left -= len(found)
        if self._left < 0:
            raise ValueError(
                f"more than {self._limit} entries in lists and maps; send images and states as "
                "arrays"
            )
        return found


def _has_text_names(found: dict[object, object]) -> bool:
    """True for the map of an array or scalar whose names are text."""
    if _ARRAY.decode() in found or _SCALAR.decode() in found:
        return True
    return isinstance(found.get(_EITHER.decode()), bool) and {"type", "data"} <= found.keys()


def _pack_openpi(value: object) -> dict[bytes, object]:
    value = _check_sendable(value)
    if isinstance(value, np.generic):
        return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    return {
        _ARRAY: True,
        b"data": value.tobytes(),
        b"dtype": value.dtype.str,
        b"shape": value.shape,
    }


def _pack_msgpack_numpy(value: object) -> dict[bytes, object]:
    value = _check_sendable(value)
    found = {_EITHER: False, b"type": value.dtype.str, b"data": value.tobytes()}
    if isinstance(value, np.ndarray):
        found |= {_EITHER: True, b"kind": b"", b"shape": value.shape}
    return found


def _text_names(pack: Callable[[object], dict[bytes, object]]) -> Callable[[object], Packed]:
    return lambda value: {name.decode(): found for name, found in pack(value).items()}


_PACKERS: dict[Packing, Callable[[object], Packed]] = {
    "openpi": _pack_openpi,
    "openpi-text": _text_names(_pack_openpi),
    "msgpack-numpy": _pack_msgpack_numpy,
    "msgpack-numpy-text": _text_names(_pack_msgpack_numpy),
}


def _check_sendable(value: object) -> np.ndarray | np.generic:
    if not isinstance(value, np.ndarray | np.generic):
        raise TypeError(f"cannot send a {type(value).__name__}; send text, numbers and arrays")
    if not _DTYPE.fullmatch(value.dtype.str):
        raise ValueError(f"cannot send dtype {value.dtype}; send booleans, numbers or text")
    return value


def _unpack_numpy(found: dict[object, object]) -> object:
    if _ARRAY in found:
        return _array(found.get(b"dtype"), found.get(b"shape"), found.get(b"data"))
    if _SCALAR in found:
        return _scalar(_dtype(found.get(b"dtype")), found.get(b"data"))
    if found.get(_EITHER) is True:
        return _array(found.get(b"type"), found.get(b"shape"), found.get(b"data"))
    if found.get(_EITHER) is False:
        return _array(found.get(b"type"), [], found.get(b"data"))[()]
    return found


def _scalar(dtype: np.dtype, value: object) -> np.generic:
    if not isinstance(value, _SCALAR_TYPES[dtype.kind]):
        raise ValueError(f"a {dtype} scalar cannot hold a {type(value).__name__}")
    if isinstance(value, int) and dtype.kind in "iu" and not _fits(value, dtype):
        raise ValueError(f"a {dtype} scalar cannot hold {value}")
    with np.errstate(over="ignore"):
        scalar: np.generic = dtype.type(value)
    return scalar


def _fits(value: int, dtype: np.dtype) -> bool:
    return bool(np.iinfo(dtype).min <= value <= np.iinfo(dtype).max)


def _dtype(name: object) -> np.dtype:
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise ValueError(
            f"an array of dtype {str(name)[:40]!r} is refused; send booleans, numbers or text"
        )
    return np.dtype(name)


def _array(name: object, shape: object, data: object) -> np.ndarray:
    dtype = _dtype(name)
    if not isinstance(data, bytes):
        raise ValueError(f"an array's data must be bytes, got {type(data).__name__}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_ARRAY_AXES
        or not all(type(n) is int and 0 <= n < 2**48 for n in shape)
    ):
        raise ValueError(
            f"an array's shape must be at most {MAX_ARRAY_AXES} lengths, got {str(shape)[:80]}"
        )
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(
            f"an array of shape {shape} and dtype {dtype} needs "
            f"{math.prod(shape) * dtype.itemsize} bytes, got {len(data)}"
        )
    return np.ndarray(shape, dtype, data)


def _refuse_extension(code: int, _: bytes) -> NoReturn:
    raise ValueError(f"msgpack extension type {code} is refused")


def _check(value: object, levels: int) -> None:
    """Refuse what is nested too deep, and anything but plain values under names."""
    if isinstance(value, dict):
        for name in value:
            if not isinstance(name, str):
                raise ValueError(
                    f"names must be text, got {str(name)[:60]}; arrays are packed as by "
                    "openpi_client.msgpack_numpy, or by msgpack-numpy"
                )
        inner = list(value.values())
    elif isinstance(value, list):
        inner = value
    elif isinstance(value, _PLAIN):
        return
    else:
        raise ValueError(f"a {type(value).__name__} is refused; send text, numbers and arrays")
    if levels <= 0:
        raise ValueError("lists and maps are nested too deep")
    for part in inner:
        _check(part, levels - 1)
