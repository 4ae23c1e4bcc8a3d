"""The table from JAX's primitives to ONNX's operators.

It covers the primitives of π0 and π0.5 at any size; any other primitive is an error that names it
and its source line. No control flow, no float64; 64-bit integers appear only in shapes and slices,
where ONNX requires them. A cumulative sum is a product with a triangle of ones, because TensorRT
has no cumulative sum of integers.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.extend import core

Shape = tuple[int, ...]
# Parameters of a JAX primitive: each has its own, of its own types.
Params = Mapping[str, Any]


class Spec(Protocol):
    """Shape and dtype of an equation's result: an abstract value of JAX's."""

    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> np.dtype: ...


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the graph: a tensor's name, or its numbers if they are known."""

    shape: Shape
    dtype: np.dtype
    name: str = ""
    # Shape of the tensor of that name, or of `array`: 1 along axes still to be broadcast.
    held: Shape | None = None
    array: np.ndarray | None = None
    # The equation that computes it, and the inputs of that equation.
    primitive: str = ""
    inputs: Sequence["Value"] = ()
    params: Params = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.held = self.shape if self.held is None else self.held

    @classmethod
    def of(cls, array: np.ndarray) -> "Value":
        """A known value."""
        return cls(array.shape, array.dtype, array=array)

    def compact(self, graph: "Graph") -> str:
        """Its tensor, for an operator that broadcasts its inputs."""
        if not self.name:
            assert self.array is not None, "a value has a name or an array"
            self.name = graph.constant(self.array)
        return self.name

    def expanded(self, graph: "Graph") -> str:
        """Its tensor in its full shape."""
        if self.held != self.shape:
            if self.array is not None:
                self.array, self.name = np.broadcast_to(self.array, self.shape), ""
            else:
                self.name = graph.node(
                    "Expand", [self.name, graph.integers(self.shape)], self.shape, self.dtype
                ).name
            self.held = self.shape
        return self.compact(graph)

    def numbers(self) -> np.ndarray | None:
        """The known numbers in full shape, None where they depend on an input."""
        return None if self.array is None else np.broadcast_to(self.array, self.shape)


class Graph:
    """The nodes and constants of a graph under construction."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self._integers: dict[Shape, str] = {}

    def constant(self, array: np.ndarray) -> str:
        """Add a constant; returns its name."""
        name = f"w{len(self.constants)}"
        self.constants[name] = array
        return name

    def integers(self, values: Sequence[int]) -> str:
        """Add a shape, axes or bounds, which ONNX reads as int64."""
        key = tuple(int(value) for value in values)
        if key not in self._integers:
            self._integers[key] = self.constant(np.array(key, np.int64))
        return self._integers[key]

    def node(
        self,
        operator: str,
        inputs: Sequence[str],
        shape: Shape,
        dtype: npt.DTypeLike,
        *,
        held: Shape | None = None,
        name: str = "",
        **attributes: Any,
    ) -> Value:
        """Add a node with one output."""
        import onnx

        name = name or f"t{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(operator, inputs, [name], **attributes))
        return Value(tuple(shape), np.dtype(dtype), name, held)


def type_of(dtype: npt.DTypeLike) -> int:
    """ONNX's number of a dtype."""
    import onnx

    return int(onnx.TensorProto.DataType.Value(_TYPES[np.dtype(dtype).name]))


_TYPES = {
    "float32": "FLOAT",
    "float16": "FLOAT16",
    "bfloat16": "BFLOAT16",
    "int32": "INT32",
    "int64": "INT64",
    "int8": "INT8",
    "uint8": "UINT8",
    "bool": "BOOL",
}


def add(graph: Graph, equation: core.JaxprEqn, inputs: list[Value], line: str = "") -> list[Value]:
    """Add one equation: evaluated here if all of its inputs are known, else as nodes.

    Args:
      graph: the graph to extend.
      equation: of a jaxpr.
      inputs: values of the equation's inputs.
      line: where the equation that calls this one was traced (`line_of`).

    Raises:
      ValueError: no operator for the primitive; names it and its source line.
    """
    name, out = equation.primitive.name, [v.aval for v in equation.outvars]
    if name != "broadcast_in_dim" and (folded := _fold(equation, inputs)) is not None:
        return folded
    if name not in _TABLE:
        where = line_of(equation) or line
        raise ValueError(
            f"ONNX export: no operator for JAX's primitive {name!r}{where}. Write the "
            "function with others, or add it to the table in deploy/export/onnx_nodes.py"
        )
    results = _TABLE[name](graph, inputs, out[0], equation.params)
    results = results if isinstance(results, list) else [results]
    for result in results:
        # An identity keeps the history of its input.
        if not result.primitive:
            result.primitive, result.inputs, result.params = name, inputs, equation.params
    return results


def _fold(equation: core.JaxprEqn, inputs: Sequence[Value]) -> list[Value] | None:
    arrays = [value.numbers() for value in inputs]
    if any(array is None for array in arrays):
        return None
    found = equation.primitive.bind(*map(jnp.asarray, arrays), **equation.params)
    found = found if equation.primitive.multiple_results else [found]
    return [Value.of(np.asarray(one)) for one in found]


def line_of(equation: core.JaxprEqn) -> str:
    """Source line of an equation, if JAX knows it."""
    frames = getattr(getattr(equation.source_info, "traceback", None), "frames", ())
    for frame in frames:
        if "site-packages" not in frame.file_name and "<" not in frame.file_name:
            return f" ({frame.file_name}:{frame.line_num}, in {frame.function_name})"
    return ""


def _elementwise(operator: str) -> Callable[..., Value]:
    def make(graph: Graph, inputs: Sequence[Value], out: Spec, _: Params) -> Value:
        held = np.broadcast_shapes(*(value.held or () for value in inputs))
        names = [value.compact(graph) for value in inputs]
        return graph.node(operator, names, out.shape, out.dtype, held=held)

    return make


def _rsqrt(graph: Graph, inputs: Sequence[Value], out: Spec, _: Params) -> Value:
    (x,) = inputs
    root = graph.node("Sqrt", [x.compact(graph)], out.shape, out.dtype, held=x.held)
    return graph.node("Reciprocal", [root.name], out.shape, out.dtype, held=x.held)


def _power(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> Value:
    (x,), power = inputs, params.get("y", 2)
    if power not in (2, 3):
        raise ValueError(f"ONNX export: integer_pow by {power}; there are 2 and 3")
    name = x.compact(graph)
    found = graph.node("Mul", [name, name], out.shape, out.dtype, held=x.held)
    if power == 3:
        found = graph.node("Mul", [found.name, name], out.shape, out.dtype, held=x.held)
    return found


def _divide(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> Value:
    above, below = inputs
    if (logits := _softmaxed(above, below)) is not None:
        value, axis = logits
        return graph.node(
            "Softmax", [value.expanded(graph)], out.shape, out.dtype, axis=axis - len(out.shape)
        )
    return _elementwise("Div")(graph, inputs, out, params)


def _softmaxed(above: Value, below: Value) -> tuple[Value, int] | None:
    """x and the axis where above / below is exp(x − max x) / sum of it."""
    total = _behind(below, "broadcast_in_dim", "reshape")
    if above.primitive != "exp" or total.primitive != "reduce_sum" or total.inputs[0] is not above:
        return None
    (difference,) = above.inputs
    if difference.primitive != "sub":
        return None
    x, largest = difference.inputs
    largest = _behind(largest, "broadcast_in_dim", "reshape", "stop_gradient", "max")
    axes = tuple(total.params["axes"])
    if largest.primitive != "reduce_max" or largest.inputs[0] is not x or len(axes) != 1:
        return None
    return x, axes[0]


def _behind(value: Value, *primitives: str) -> Value:
    while value.primitive in primitives:
        value = next(one for one in reversed(value.inputs) if one.array is None)
    return value


def _select(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> Value:
    which, no, yes = inputs
    return _elementwise("Where")(graph, (which, yes, no), out, params)


def _cast(graph: Graph, inputs: Sequence[Value], out: Spec, _: Params) -> Value:
    (x,) = inputs
    if x.dtype == out.dtype:
        return x
    to = type_of(out.dtype)
    return graph.node("Cast", [x.compact(graph)], out.shape, out.dtype, held=x.held, to=to)


def _broadcast(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> Value:
    x, held = inputs[0], [1] * len(out.shape)
    for axis, size in zip(params["broadcast_dimensions"], x.held or (), strict=True):
        held[axis] = size
    if x.array is not None:
        return Value(out.shape, np.dtype(out.dtype), held=tuple(held), array=x.array.reshape(held))
    return _reshaped(graph, x.compact(graph), x.held or (), tuple(held), out)


def _reshaped(graph: Graph, name: str, given: Shape, held: Shape, out: Spec) -> Value:
    if given == held:
        return Value(out.shape, np.dtype(out.dtype), name, held)
    return graph.node("Reshape", [name, graph.integers(held)], out.shape, out.dtype, held=held)


def _reshape(graph: Graph, inputs: Sequence[Value], out: Spec, _: Params) -> Value:
    (x,) = inputs
    return _reshaped(graph, x.expanded(graph), x.shape, out.shape, out)


def _transpose(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> Value:
    (x,), order = inputs, [int(axis) for axis in params["permutation"]]
    if (known := x.numbers()) is not None:
        return Value.of(np.transpose(known, order))
    return graph.node("Transpose", [x.expanded(graph)], out.shape, out.dtype, perm=order)


def _concatenate(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> Value:
    names = [value.expanded(graph) for value in inputs]
    axis = int(params["dimension"])
    return graph.node("Concat", names, out.shape, out.dtype, axis=axis)


def _stack(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> Value:
    axis = int(params["axis"])
    shape = (*out.shape[:axis], 1, *out.shape[axis + 1 :])
    parts = [_reshape(graph, [value], _spec(shape, out.dtype), {}) for value in inputs]
    return _concatenate(graph, parts, out, {"dimension": axis})


def _cut(
    graph: Graph, x: Value, starts: Sequence[int], ends: Sequence[int], steps: Sequence[int]
) -> Value:
    if (known := x.numbers()) is not None:
        return Value.of(known[tuple(map(slice, starts, ends, steps))])
    axes = [i for i, n in enumerate(x.shape) if (starts[i], ends[i], steps[i]) != (0, n, 1)]
    shape = tuple(-(-(e - s) // n) for s, e, n in zip(starts, ends, steps, strict=True))
    if not axes:
        return x
    bounds = [graph.integers([of[axis] for axis in axes]) for of in (starts, ends)]
    names = [x.expanded(graph), *bounds, graph.integers(axes)]
    if any(steps[axis] != 1 for axis in axes):
        names.append(graph.integers([steps[axis] for axis in axes]))
    return graph.node("Slice", names, shape, x.dtype)


def _slice(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> Value:
    (x,) = inputs
    steps = params["strides"] or (1,) * len(x.shape)
    return _cut(graph, x, params["start_indices"], params["limit_indices"], steps)


def _split(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> list[Value]:
    (x,), axis, results, start = inputs, params["axis"], [], 0
    for size in params["sizes"]:
        starts, ends = [0] * len(x.shape), list(x.shape)
        starts[axis], ends[axis] = start, start + size
        results.append(_cut(graph, x, starts, ends, [1] * len(x.shape)))
        start += size
    return results


def _known_starts(values: Sequence[Value], what: str) -> list[int]:
    if any(value.array is None for value in values):
        raise ValueError(f"ONNX export: {what} at a place that depends on an input")
    return [int(value.numbers()) for value in values]  # type: ignore[arg-type]


def _dynamic_slice(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> Value:
    x, *places = inputs
    starts = _known_starts(places, "dynamic_slice")
    ends = [start + size for start, size in zip(starts, params["slice_sizes"], strict=True)]
    return _cut(graph, x, starts, ends, [1] * len(starts))


def _update(graph: Graph, inputs: Sequence[Value], out: Spec, _: Params) -> Value:
    """The slice before the new part, the new part, and the slice after it, concatenated."""
    x, new, *places = inputs
    starts = _known_starts(places, "dynamic_update_slice")
    axes = [i for i, (a, b) in enumerate(zip(x.shape, new.shape, strict=True)) if a != b]
    if not axes:
        return new
    if len(axes) > 1:
        raise ValueError("ONNX export: dynamic_update_slice of a part smaller along two axes")
    (axis,), parts = axes, []
    for start, end in ((0, starts[axis]), (starts[axis] + new.shape[axis], x.shape[axis])):
        if start < end:
            low, high = [0] * len(x.shape), list(x.shape)
            low[axis], high[axis] = start, end
            parts.append(_cut(graph, x, low, high, [1] * len(x.shape)))
        if start == 0:
            parts.append(new)
    return _concatenate(graph, parts, out, {"dimension": axis})


def _pad(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> Value:
    x, filling = inputs
    for axis, (low, high, inside) in enumerate(params["padding_config"]):
        if inside or low < 0 or high < 0 or filling.array is None:
            raise ValueError("ONNX export: pad with gaps, cuts or an unknown value")
        shape, parts = list(x.shape), [x]
        for size, place in ((low, 0), (high, len(parts) + bool(low))):
            if size:
                shape[axis] = int(size)
                parts.insert(place, Value.of(np.full(shape, filling.array, x.dtype)))
        if len(parts) > 1:
            shape[axis] = sum(part.shape[axis] for part in parts)
            x = _concatenate(graph, parts, _spec(tuple(shape), x.dtype), {"dimension": axis})
    return x


def _gather(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> Value:
    table, indices = inputs
    found = params["dimension_numbers"]
    rows = (1, *table.shape[1:])
    simple = tuple(found.start_index_map) == tuple(found.collapsed_slice_dims) == (0,)
    if not simple or tuple(params["slice_sizes"]) != rows or indices.shape[-1] != 1:
        raise ValueError("ONNX export: gather of anything but rows of a table")
    rows_of = _reshape(graph, [indices], _spec(indices.shape[:-1], indices.dtype), {})
    names = [table.expanded(graph), rows_of.expanded(graph)]
    return graph.node("Gather", names, out.shape, out.dtype, axis=0)


def _running_sum(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> Value:
    (x,), axis = inputs, params["axis"]
    if axis != len(x.shape) - 1 or params["reverse"]:
        raise ValueError("ONNX export: cumsum along another than the last axis, or reversed")
    wide = graph.node("Cast", [x.expanded(graph)], x.shape, np.float32, to=type_of(np.float32))
    ones = graph.constant(np.triu(np.ones((x.shape[axis],) * 2, np.float32)))
    total = graph.node("MatMul", [wide.name, ones], x.shape, np.float32)
    return graph.node("Cast", [total.name], out.shape, out.dtype, to=type_of(out.dtype))


def _reduce(operator: str) -> Callable[..., Value]:
    def make(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> Value:
        (x,), axes = inputs, [int(axis) for axis in params["axes"]]
        names, as_attribute = [x.expanded(graph)], operator != "ReduceSum" and graph.opset < 18
        if x.dtype.kind in "biu":  # TensorRT sums only floats; token counts stay exact in them.
            wide = graph.node("Cast", names, x.shape, np.float32, to=type_of(np.float32))
            names = [wide.name]
        if not as_attribute:
            names.append(graph.integers(axes))
        more: Params = {"axes": axes} if as_attribute else {}
        found = graph.node(operator, names, out.shape, out.dtype, keepdims=0, **more)
        if x.dtype.kind in "biu":
            found = graph.node("Cast", [found.name], out.shape, out.dtype, to=type_of(out.dtype))
        return found

    return make


def _product(graph: Graph, inputs: Sequence[Value], out: Spec, params: Params) -> Value:
    """`dot_general` as MatMul: (batch, rows, inner) by (batch, inner, columns)."""
    (left_inner, right_inner), (left_batch, right_batch) = params["dimension_numbers"]
    left, right = inputs
    parts = []
    for x, batch, inner, last in ((left, left_batch, left_inner, True),
                                  (right, right_batch, right_inner, False)):  # fmt: skip
        free = [i for i in range(len(x.shape)) if i not in (*batch, *inner)]
        order = [*batch, *free, *inner] if last else [*batch, *inner, *free]
        kept = tuple(x.shape[i] for i in batch)
        rows, summed = (int(np.prod([x.shape[i] for i in axes])) for axes in (free, inner))
        if order != list(range(len(order))):
            spec = _spec(tuple(x.shape[i] for i in order), x.dtype)
            x = _transpose(graph, [x], spec, {"permutation": order})
        spec = _spec((*kept, *((rows, summed) if last else (summed, rows))), x.dtype)
        parts.append(_reshape(graph, [x], spec, {}))
    shape = (*parts[0].shape[:-1], parts[1].shape[-1])
    names = [part.expanded(graph) for part in parts]
    found = graph.node("MatMul", names, shape, left.dtype)
    return _cast(graph, [_reshape(graph, [found], _spec(out.shape, left.dtype), {})], out, {})


def _spec(shape: Shape, dtype: npt.DTypeLike) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _same(graph: Graph, inputs: Sequence[Value], out: Spec, _: Params) -> Value:
    return inputs[0]


_TABLE: dict[str, Callable[..., Value | list[Value]]] = {
    **{
        name: _elementwise(operator)
        for name, operator in {
            **{"add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul"},
            **{"max": "Max", "min": "Min", "exp": "Exp", "sin": "Sin", "cos": "Cos"},
            **{"neg": "Neg", "sqrt": "Sqrt", "tanh": "Tanh", "logistic": "Sigmoid", "pow": "Pow"},
            **{"lt": "Less", "gt": "Greater", "ge": "GreaterOrEqual", "le": "LessOrEqual"},
            **{"eq": "Equal", "and": "And", "or": "Or", "not": "Not"},
        }.items()
    },
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "convert_element_type": _cast,
    "copy": _same,
    "cumsum": _running_sum,
    "div": _divide,
    "dot_general": _product,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _update,
    "gather": _gather,
    "integer_pow": _power,
    "pad": _pad,
    "reduce_max": _reduce("ReduceMax"),
    "reduce_sum": _reduce("ReduceSum"),
    "reshape": _reshape,
    "rsqrt": _rsqrt,
    "select_n": _select,
    "slice": _slice,
    "split": _split,
    "square": _power,
    "squeeze": _reshape,
    "stack": _stack,
    "stop_gradient": _same,
    "transpose": _transpose,
}
