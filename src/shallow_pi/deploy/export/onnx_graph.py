"""A function of arrays as an ONNX graph: traced to a jaxpr, and each primitive made into nodes.

Equations with known inputs only (weights, constants) are evaluated here and become weights. Calls
are inlined, broadcasts are left to the operators that read them, the parts of a softmax become one
`Softmax`, and unused nodes are dropped. `onnx_nodes` holds the table of primitives. Weights go into
one file next to the graphs (`Weights`), each once.
"""

import hashlib
import pathlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import jax
import numpy as np
import numpy.typing as npt
from jax.extend import core
from jaxtyping import PyTree

from shallow_pi.deploy.export import onnx_nodes, onnx_quantized
from shallow_pi.deploy.export.onnx_nodes import Value
from shallow_pi.models import quantized

# A protocol buffer of the `onnx` package, which is optional and untyped.
Proto = Any
# TensorRT 10 reads up to 20; below 17 operators specify axes differently.
OPSETS = (17, 18, 19, 20)
# Primitives that only call another jaxpr, by the name of the parameter that holds it.
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# Runtimes memory-map large weights from page boundaries; small ones need no alignment.
_PAGE, _INLINE_BYTES = 4096, 256


class Weights:
    """The file of weights that graphs in the same folder share; equal ones are written once."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._places: dict[bytes, tuple[int, int]] = {}

    def __enter__(self) -> "Weights":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def tensor(self, array: np.ndarray, name: str) -> Proto:
        """An initializer: inline if small, else a reference into the file."""
        import onnx

        found = onnx.TensorProto(name=name, data_type=onnx_nodes.type_of(array.dtype))
        found.dims.extend(array.shape)
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if data.nbytes <= _INLINE_BYTES:
            found.raw_data = data.tobytes()
            return found
        offset, length = self._place(data)
        found.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            found.external_data.add(key=key, value=str(value))
        return found

    def _place(self, data: np.ndarray) -> tuple[int, int]:
        digest = hashlib.blake2b(data.data).digest()
        if digest not in self._places:
            self._file.write(bytes(-self._file.tell() % _PAGE))
            self._places[digest] = self._file.tell(), data.nbytes
            self._file.write(data.data)
        return self._places[digest]


def convert(
    function: Callable[..., Sequence[jax.Array]],
    known: PyTree,
    inputs: dict[str, jax.ShapeDtypeStruct],
    outputs: Sequence[str],
    weights: Weights,
    opset: int = OPSETS[0],
) -> Proto:
    """The ONNX model of `function(known, *inputs)`, with batch and all other sizes fixed.

    Args:
      function: pure, of a tree of known arrays and of one array an input; returns a sequence.
      known: a tree of arrays, the weights.
      inputs: shape and dtype of each input, by name in the order of the arguments.
      outputs: names of the results.
      weights: the file that takes them.
      opset: version of ONNX's operators.

    Raises:
      ValueError: a primitive that ONNX lacks.
    """
    import onnx

    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), known)
    closed = jax.make_jaxpr(function)(shapes, *inputs.values())
    graph = onnx_nodes.Graph(opset)
    leaves = [Value.of(np.asarray(leaf)) for leaf in jax.tree.leaves(known)]
    given = [Value(spec.shape, np.dtype(spec.dtype), name) for name, spec in inputs.items()]
    found = _inline(graph, closed.jaxpr, closed.consts, leaves + given)
    for name, value in zip(outputs, found, strict=True):
        graph.node("Identity", [value.expanded(graph)], value.shape, value.dtype, name=name)
    nodes = _read(graph.nodes, set(outputs))
    needed = {name for node in nodes for name in node.input}
    helper = onnx.helper
    made = helper.make_graph(
        nodes,
        "shallow_pi",
        [_info(value.name, value.shape, value.dtype) for value in given],
        [_info(name, value.shape, value.dtype) for name, value in zip(outputs, found, strict=True)],
        [weights.tensor(a, name) for name, a in graph.constants.items() if name in needed],
    )
    return helper.make_model(
        made,
        opset_imports=[helper.make_opsetid("", opset)],
        # The IR version of opset 17; older runtimes refuse a newer one.
        ir_version=8 if opset < 19 else 9,
        producer_name="shallow_pi",
    )


def write_in_float32(source: pathlib.Path, target: pathlib.Path) -> None:
    """Write a copy of a bfloat16 graph that computes in float32, its weights in a file of its own.

    One weight is in memory at a time.
    """
    import onnx

    model = onnx.load(source, load_external_data=False)
    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    graph, widened = model.graph, []
    with Weights(target.with_suffix(".bin")) as weights:
        for one in graph.initializer:
            array = onnx.numpy_helper.to_array(one, str(source.parent))
            array = array.astype(np.float32) if one.data_type == narrow else array
            widened.append(weights.tensor(array, one.name))
    del graph.initializer[:]
    graph.initializer.extend(widened)
    for value in (*graph.input, *graph.output):
        kind = value.type.tensor_type
        kind.elem_type = wide if kind.elem_type == narrow else kind.elem_type
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == narrow:
                attribute.i = wide
    onnx.save_model(model, target)


def operators(model: Proto) -> dict[str, int]:
    """Number of nodes of each operator in a model."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def _info(name: str, shape: Sequence[int], dtype: np.dtype) -> Proto:
    import onnx

    return onnx.helper.make_tensor_value_info(name, onnx_nodes.type_of(dtype), shape)


def _inline(
    graph: onnx_nodes.Graph,
    jaxpr: core.Jaxpr,
    consts: Sequence[npt.ArrayLike],
    arguments: Sequence[Value],
    line: str = "",
) -> list[Value]:
    """Add a jaxpr's equations to the graph; the values it returns."""
    values: dict[core.Var, Value] = dict(zip(jaxpr.invars, arguments, strict=True))
    for variable, const in zip(jaxpr.constvars, consts, strict=True):
        values[variable] = Value.of(np.asarray(const))

    def read(atom: core.Var | core.Literal) -> Value:
        if isinstance(atom, core.Literal):
            return Value.of(np.asarray(atom.val, getattr(atom.aval, "dtype", None)))
        return values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        inner = next((equation.params[n] for n in _CALLS if n in equation.params), None)
        if equation.params.get("name") == quantized.PRODUCT:
            results = [onnx_quantized.product(graph, inputs)]
        elif inner is not None and equation.primitive.name not in ("scan", "while"):
            body, constants = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
            at = onnx_nodes.line_of(equation) or line
            results = _inline(graph, body, constants, inputs, at)
        else:
            results = onnx_nodes.add(graph, equation, inputs, line)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _read(nodes: Sequence[Proto], wanted: set[str]) -> list[Proto]:
    """The nodes that the wanted results need, in order."""
    kept, needed = [], set(wanted)
    for node in reversed(nodes):
        if needed & set(node.output):
            kept.append(node)
            needed.update(node.input)
    return kept[::-1]
