"""ONNX operators that TensorRT supports, among those that a policy may need.

From the support matrix of ONNX-TensorRT (docs/operators.md at TensorRT 8.5, opset 17; TensorRT 10
reads all of them and more). `LayerNormalization`, `Einsum` and control flow are left out: norms are
written as reductions and attention as MatMul and Softmax, which TensorRT fuses.
"""

from collections.abc import Iterable

SUPPORTED = frozenset(
    {
        "Add",
        "And",
        "Cast",
        "Concat",
        "Cos",
        "DequantizeLinear",
        "Div",
        "Equal",
        "Exp",
        "Expand",
        "Gather",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "Less",
        "LessOrEqual",
        "MatMul",
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pow",
        "QuantizeLinear",
        "Reciprocal",
        "ReduceMax",
        "ReduceSum",
        "Reshape",
        "Sigmoid",
        "Sin",
        "Slice",
        "Softmax",
        "Sqrt",
        "Sub",
        "Tanh",
        "Transpose",
        "Where",
    }
)


def check(operators: Iterable[str], graph: str) -> None:
    """Raise ValueError if a graph has an operator that is not in the list."""
    if unknown := sorted(set(operators) - SUPPORTED):
        raise ValueError(
            f"{graph} has operators outside the list of those that TensorRT reads: "
            f"{', '.join(unknown)} (deploy/export/tensorrt_operators.py); nothing was kept"
        )
