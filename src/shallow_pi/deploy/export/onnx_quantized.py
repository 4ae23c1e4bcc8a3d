"""Products in 8 bits as ONNX nodes: MatMul between QuantizeLinear and DequantizeLinear (Q/DQ).

The graph says what is rounded; TensorRT and ONNX Runtime find the pattern and multiply integers.
"""

from collections.abc import Sequence

import numpy as np

from shallow_pi.deploy.export import onnx_nodes
from shallow_pi.deploy.export.onnx_nodes import Value


def product(graph: onnx_nodes.Graph, inputs: Sequence[Value]) -> Value:
    """A product in 8 bits (`quantized.PRODUCT`) as MatMul of what is rounded and scaled back.

    QuantizeLinear and DequantizeLinear around the activations, DequantizeLinear with a scale for
    each column behind the int8 weights: the form that TensorRT and ONNX Runtime compute in int8.
    """
    rows, values, scales, *scale = inputs
    if not scale or values.dtype != np.int8:
        raise ValueError("ONNX export: products in 8 bits have int8 weights and activations")
    known = [value.numbers() for value in (values, scales, *scale)]
    weights, columns, step = (np.asarray(one) for one in known)
    with np.errstate(all="ignore"):
        columns, step = columns.astype(rows.dtype), step.astype(rows.dtype).reshape(())
    if min(columns.min(), step) < np.finfo(rows.dtype).tiny:
        raise ValueError(
            f"a scale of the products in 8 bits is too small for {rows.dtype}: give --dtype float32"
        )
    zero, name = graph.constant(np.zeros((), np.int8)), graph.constant(step)
    rounded = graph.node("QuantizeLinear", [rows.expanded(graph), name, zero], rows.shape, np.int8)
    left = graph.node("DequantizeLinear", [rounded.name, name, zero], rows.shape, rows.dtype)
    matrix = np.ascontiguousarray(weights.T)
    held = [graph.constant(array) for array in (matrix, columns, np.zeros(len(columns), np.int8))]
    right = graph.node("DequantizeLinear", held, matrix.shape, rows.dtype, axis=1)
    shape = (rows.shape[0], matrix.shape[1])
    return graph.node("MatMul", [left.name, right.name], shape, rows.dtype)
