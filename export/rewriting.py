"""Changing an ONNX graph in place: its constants and its nodes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import numpy_helper


def initializer(model: onnx.ModelProto, name: str) -> np.ndarray:
    """A copy of a constant."""
    return numpy_helper.to_array(next(item for item in model.graph.initializer if item.name == name)).copy()


def set_initializer(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    """Replace a constant, or add it."""
    tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
    for item in model.graph.initializer:
        if item.name == name:
            item.CopyFrom(tensor)
            return
    model.graph.initializer.append(tensor)


def replace_nodes(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Let these be all nodes of a graph, in this order; some may be its own. What was inferred of values is dropped."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
    del model.graph.value_info[:]
