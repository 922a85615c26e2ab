"""The linear layers of a step graph: products with a constant matrix, which are nearly all of its work."""

from __future__ import annotations

from dataclasses import dataclass

import onnx


@dataclass(frozen=True)
class Linear:
    """x [..., in] @ weight [in, out].

    Attributes:
        name: what reports call it, such as `layer3.mlp.fc1`.
        node: name of the MatMul.
        input: name of the value that enters.
        weight: name of the matrix.
    """

    name: str
    node: str
    input: str
    weight: str


def linears(model: onnx.ModelProto) -> list[Linear]:
    """The linear layers of a graph, in the order in which they run."""
    weights = {
        item.name
        for item in model.graph.initializer
        if len(item.dims) == 2 and item.data_type == onnx.TensorProto.FLOAT
    }
    return [
        Linear(node.input[1].removesuffix(".weight"), node.name, node.input[0], node.input[1])
        for node in model.graph.node
        if node.op_type == "MatMul" and node.input[1] in weights
    ]
