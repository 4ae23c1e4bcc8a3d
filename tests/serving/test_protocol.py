"""The wire format is openpi's, and nothing a stranger sends does harm."""

import msgpack
import numpy as np
import pytest

from shallow_pi.serving import protocol

msgpack_numpy = pytest.importorskip("openpi_client.msgpack_numpy", reason="no openpi-client here")

OBSERVATION = {
    "image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
    "nested": {"state": np.linspace(0, 1, 5), "half": np.ones(2, np.float16)},
    "empty": np.zeros((0, 3), np.float32),
    "nothing": np.float32(0.5),
    "mask": np.array([True, False]),
    "words": np.array(["pick", "up"]),
    "big": np.arange(3, dtype=">i4"),
    "prompt": "touch the red block",
    "list": [1, 2.5, None, True, "text"],
}


def assert_same(found, expected):
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, np.ndarray | np.generic):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


@pytest.mark.parametrize("pack", [protocol.pack, msgpack_numpy.packb], ids=["ours", "openpi"])
@pytest.mark.parametrize("unpack", [protocol.unpack, msgpack_numpy.unpackb], ids=["ours", "openpi"])
def test_what_one_side_packs_the_other_unpacks(pack, unpack):
    assert_same(unpack(pack(OBSERVATION)), OBSERVATION)


def test_the_bytes_are_openpis():
    assert protocol.pack(OBSERVATION) == msgpack_numpy.packb(OBSERVATION)


def packed_by_msgpack_numpy(value):
    """The public format of the PyPI package msgpack-numpy."""

    def encode(found):
        fields = {b"type": found.dtype.str, b"data": found.tobytes()}
        if isinstance(found, np.ndarray):
            return {b"nd": True, b"kind": b"", b"shape": found.shape} | fields
        return {b"nd": False} | fields

    return msgpack.packb(value, default=encode)


def test_arrays_of_msgpack_numpy_are_read_and_answered_alike():
    message = packed_by_msgpack_numpy(OBSERVATION)
    found, packing = protocol.read(message)
    assert_same(found, OBSERVATION)
    assert packing == "msgpack-numpy"
    assert msgpack.unpackb(protocol.pack(OBSERVATION, packing)) == msgpack.unpackb(message)
    assert protocol.read(protocol.pack(OBSERVATION))[1] == "openpi"


@pytest.mark.parametrize("packing", ["openpi-text", "msgpack-numpy-text"])
def test_arrays_with_text_for_names_are_read_and_answered_alike(packing):
    message = protocol.pack(OBSERVATION, packing)
    assert all(isinstance(name, str) for name in msgpack.unpackb(message)["image"])
    found, told = protocol.read(message)
    assert_same(found, OBSERVATION)
    assert told == packing
    assert protocol.unpack(protocol.pack({"nd": True, "type": "b"})) == {"nd": True, "type": "b"}


def test_an_array_out_of_order_in_memory_arrives_in_order():
    image = np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)[::-1]
    np.testing.assert_array_equal(protocol.unpack(protocol.pack({"p": image}))["p"], image)


@pytest.mark.parametrize(
    "value",
    [
        np.array([{}], object),
        np.ones(2, complex),
        np.zeros(1, [("a", "i4")]),
        np.array(["2026"], "M8"),
    ],
    ids=["object", "complex", "record", "time"],
)
def test_arrays_without_a_plain_dtype_are_not_sent(value):
    with pytest.raises(ValueError, match="cannot send dtype"):
        protocol.pack({"value": value})


def test_things_msgpack_does_not_know_are_not_sent():
    with pytest.raises(TypeError, match="cannot send a set"):
        protocol.pack({"value": {1, 2}})


def array(**changes):
    """A map that says it is an array, with something changed."""
    fields = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
    return msgpack.packb({"a": fields | {key.encode(): value for key, value in changes.items()}})


@pytest.mark.parametrize("name", ["bool", "uint8", "int64", "float16", "float32", "float64"])
def test_dtypes_may_have_numpys_names_as_for_openpi(name):
    size = 8 // np.dtype(name).itemsize
    found = protocol.unpack(array(dtype=name, shape=[size]))["a"]
    assert found.dtype == np.dtype(name)
    assert found.shape == (size,)


def scalar(data, dtype):
    return msgpack.packb({"a": {b"__npgeneric__": True, b"data": data, b"dtype": dtype}})


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return msgpack.packb({"a": value})


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (b"", "not a readable msgpack"),
        (b"\xc1", "not a readable msgpack"),
        (protocol.pack(OBSERVATION)[:-1], "incomplete input"),
        (protocol.pack(OBSERVATION) + b"\x00", "extra data"),
        (b"\xdd\xff\xff\xff\xff", "exceeds max_array_len"),
        (b"\xdf\xff\xff\xff\xff", "exceeds max_map_len"),
        (b"\xc6\xff\xff\xff\xff", "incomplete input"),
        (b"\x81\xa1a\xc4\x04abcd"[:-1], "incomplete input"),
        (b"\xa2\xff\xfe", "not a readable msgpack"),
        (msgpack.packb({1: 2}), "int is not allowed for map key"),
        (msgpack.packb({b"a": 2}), "names must be text"),
        (msgpack.packb(msgpack.Timestamp(5)), "Timestamp is refused"),
        (msgpack.packb(msgpack.ExtType(4, b"os.system")), "extension type 4 is refused"),
        (array(dtype="|O"), "dtype '|O' is refused"),
        (array(dtype="O8"), "is refused"),
        (array(dtype="object"), "is refused"),
        (array(dtype="<V4"), "is refused"),
        (array(dtype="<c8"), "is refused"),
        (array(dtype="<M8"), "is refused"),
        (array(dtype="i4,f4"), "is refused"),
        (array(dtype=None), "dtype 'None' is refused"),
        (array(dtype="<U99999999"), "is refused"),
        (array(data="12345678"), "data must be bytes, got str"),
        (array(data=None), "data must be bytes, got NoneType"),
        (array(shape=[3]), r"shape \[3\] and dtype float32 needs 12 bytes, got 8"),
        (array(shape=[-2]), "shape must be"),
        (array(shape=[2.0]), "shape must be"),
        (array(shape=[True, 2]), "shape must be"),
        (array(shape="2"), "shape must be"),
        (array(shape=[2**40, 2**40]), "needs"),
        (array(shape=[1] * 9), "at most 8 lengths"),
        (msgpack.packb({"a": {b"nd": True, b"type": "|O", b"kind": b"O"}}), "'|O' is refused"),
        (msgpack.packb({"a": {b"nd": False, b"type": "<f4", b"data": b"1"}}), "needs 4 bytes"),
        (msgpack.packb({"a": {b"nd": 1, b"type": "<f4"}}), "packed as by openpi_client"),
        (msgpack.packb({"a": {b"numpy": True}}), "got b'numpy'; arrays are packed as by openpi"),
        (scalar("text", "<f4"), "a float32 scalar cannot hold a str"),
        (scalar(300, "|u1"), "a uint8 scalar cannot hold 300"),
        (scalar([1], "|O"), "is refused"),
        (msgpack.packb([0] * 70_000), "exceeds max_array_len"),
        (msgpack.packb([[0] * 40_000] * 2), "more than 65536 entries"),
        (msgpack.packb([{str(i): 0 for i in range(40_000)}] * 2), "more than 65536 entries"),
        (deep(17), "nested too deep"),
        (deep(400), "nested too deep"),
        (b"\x91" * 5000 + b"\x00", "not a readable msgpack"),
    ],
)
def test_a_bad_message_is_a_value_error_that_says_why(message, why):
    with pytest.raises(ValueError, match=why):
        protocol.unpack(message)


def test_what_is_just_small_enough_is_read():
    assert len(protocol.unpack(msgpack.packb([0] * 65_536))) == 65_536
    protocol.unpack(deep(15))


def test_no_mangled_message_is_anything_but_a_value_error():
    """Random bytes, every truncation, and random changes of a good message."""
    generator, good = np.random.default_rng(0), protocol.pack(OBSERVATION)
    mangled = [generator.bytes(int(n)) for n in generator.integers(1, 200, 3000)]
    mangled += [good[:n] for n in range(len(good))]
    for _ in range(6000):
        changed = bytearray(good)
        for place in generator.integers(0, len(good), 3):
            changed[place] = generator.integers(256)
        mangled.append(bytes(changed))
    refused = 0
    for message in mangled:
        try:
            protocol.unpack(message)
        except ValueError:
            refused += 1
    assert refused > len(mangled) / 3
