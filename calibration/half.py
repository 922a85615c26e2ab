"""Writing FP16 into a step graph: weights, state and arithmetic in half precision, what enters and leaves in float32.

Layer norms keep their float32 inside (`stash_type`), as their operator does by default.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from .errors import CalibrationError

LARGEST = 65504.0


def to_half(model: onnx.ModelProto, states: Collection[str]) -> None:
    """Turn a float32 graph, quantized or not, into FP16, in place.

    Args:
        model: the graph.
        states: names of the inputs and outputs that are state; they become FP16.

    Raises:
        CalibrationError: a constant that FP16 cannot hold.
    """
    for item in model.graph.initializer:
        if item.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(item)
            if np.abs(array).max(initial=0) > LARGEST:
                raise CalibrationError(f"graph {model.graph.name}: the constant {item.name} is too large for FP16")
            item.CopyFrom(numpy_helper.from_array(array.astype(np.float16), item.name))
    for node in model.graph.node:
        if node.op_type == "Cast":
            for attribute in node.attribute:
                if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                    attribute.i = TensorProto.FLOAT16
    before: list[onnx.NodeProto] = []
    for item in model.graph.input:
        if item.type.tensor_type.elem_type != TensorProto.FLOAT:
            continue
        if item.name in states:
            item.type.tensor_type.elem_type = TensorProto.FLOAT16
            continue
        half = f"{item.name}/half"
        _rename_inputs(model, item.name, half)
        before.append(helper.make_node("Cast", [item.name], [half], name=half, to=TensorProto.FLOAT16))
    after: list[onnx.NodeProto] = []
    for item in model.graph.output:
        if item.type.tensor_type.elem_type != TensorProto.FLOAT:
            continue
        if item.name in states:
            item.type.tensor_type.elem_type = TensorProto.FLOAT16
            continue
        half = f"{item.name}/half"
        _rename_inputs(model, item.name, half)
        for node in model.graph.node:
            node.output[:] = [half if name == item.name else name for name in node.output]
        after.append(helper.make_node("Cast", [half], [item.name], name=f"{item.name}/float", to=TensorProto.FLOAT))
    nodes = [*before, *[onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node], *after]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]


def _rename_inputs(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def round_as_half(model: onnx.ModelProto) -> None:
    """Make a float32 graph, quantized or not, round every value to FP16, in place: what FP16 with wide sums gives.

    ONNX Runtime's CPU provider runs FP16 graphs without rounding between operators, so it shows neither their error nor
    their overflow. This graph does.
    """
    for item in model.graph.initializer:
        if item.data_type == TensorProto.FLOAT:
            rounded = numpy_helper.to_array(item).astype(np.float16).astype(np.float32)
            item.CopyFrom(numpy_helper.from_array(rounded, item.name))
    floats = _float_values(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        # products of integers are scaled in float32; a state's update only copies
        rounds = node.op_type not in ("DequantizeLinear", "TensorScatter") and node.output[0] in floats
        if rounds:
            name = node.output[0]
            node.output[0] = f"{name}/exact"
            half = f"{name}/half"
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        if rounds:
            nodes.append(helper.make_node("Cast", [f"{name}/exact"], [half], name=half, to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [half], [name], name=f"{name}/rounded", to=TensorProto.FLOAT))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]


def _float_values(model: onnx.ModelProto) -> set[str]:
    inferred = onnx.shape_inference.infer_shapes(model)
    infos = [*inferred.graph.value_info, *inferred.graph.output]
    return {info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT}
