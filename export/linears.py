"""The linear layers of a step graph: products with a constant matrix, which are nearly all of its work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper


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


def initializer(model: onnx.ModelProto, name: str) -> np.ndarray:
    """A copy of a constant."""
    return numpy_helper.to_array(_find(model, name)).copy()


def set_initializer(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    """Replace a constant, or add it."""
    tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
    for item in model.graph.initializer:
        if item.name == name:
            item.CopyFrom(tensor)
            return
    model.graph.initializer.append(tensor)


def _find(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(item for item in model.graph.initializer if item.name == name)
