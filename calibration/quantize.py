"""Writing INT8 into a step graph: explicit QuantizeLinear and DequantizeLinear around linear layers.

Weights are INT8 with a symmetric scale for each output channel; activations are INT8 with one static, symmetric scale
(TensorRT knows no zero points). Every linear layer gets a quantizer of its own, also where several share an input: ONNX
Runtime does not fuse a shared one, and a layer left in float keeps the exact value. (`onnxruntime.quantization`'s own
writer hands the rounded value to the float layers too, which is why it is not used here.)
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import helper

from ..export.linears import Linear, linears
from ..export.rewriting import initializer, replace_nodes, set_initializer
from .errors import CalibrationError
from .observe import Activation

LEVELS = 127


def weight_scale(weight: np.ndarray) -> np.ndarray:
    """Scale for each output channel of weight [in, out], float32 [out]."""
    largest = np.abs(weight).max(0)
    return np.where(largest > 0, largest / LEVELS, 1.0).astype(np.float32)


def round_to_int8(array: np.ndarray, scale: np.ndarray | float) -> np.ndarray:
    return np.clip(np.rint(array / scale), -LEVELS - 1, LEVELS).astype(np.int8)


def quantize(model: onnx.ModelProto, activations: Mapping[str, Activation], keep: Collection[str] = ()) -> list[Linear]:
    """Quantize the linear layers of a graph, in place.

    Args:
        model: a float32 graph.
        activations: what enters its linear layers, by value.
        keep: names of linear layers that stay in float.

    Returns:
        The layers that were quantized.
    """
    check_float(model)
    chosen = [linear for linear in linears(model) if linear.name not in keep]
    by_node = {linear.node: linear for linear in chosen}
    nodes: list[onnx.NodeProto] = []
    dequantized: dict[str, str] = {}  # weight -> its value after DequantizeLinear
    for node in model.graph.node:
        linear = by_node.get(node.name)
        if linear is not None:
            if linear.weight not in dequantized:
                dequantized[linear.weight] = _quantize_weight(model, linear, nodes)
            node.input[0] = _quantize_input(model, linear, activations[linear.input].amax, nodes)
            node.input[1] = dequantized[linear.weight]
        nodes.append(node)
    replace_nodes(model, nodes)
    _drop_unused(model)
    return chosen


def check_float(model: onnx.ModelProto) -> None:
    """Raise CalibrationError for a graph that is quantized already."""
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        raise CalibrationError(f"graph {model.graph.name}: is quantized already; calibrate the float32 bundle")


def _quantize_weight(model: onnx.ModelProto, linear: Linear, nodes: list[onnx.NodeProto]) -> str:
    weight = initializer(model, linear.weight)
    scale = weight_scale(weight)
    names = [f"{linear.weight}.{part}" for part in ("int8", "scale")]
    set_initializer(model, names[0], round_to_int8(weight, scale))
    set_initializer(model, names[1], scale)
    output = f"{linear.weight}/dequantized"
    nodes.append(helper.make_node("DequantizeLinear", names, [output], name=output, axis=1))
    return output


def _quantize_input(model: onnx.ModelProto, linear: Linear, amax: float, nodes: list[onnx.NodeProto]) -> str:
    scale, zero = f"{linear.name}.input_scale", "zero_int8"
    set_initializer(model, scale, np.array(amax / LEVELS, np.float32))
    if not any(item.name == zero for item in model.graph.initializer):
        set_initializer(model, zero, np.array(0, np.int8))
    quantized, output = f"{linear.node}/quantized", f"{linear.node}/dequantized"
    nodes.append(helper.make_node("QuantizeLinear", [linear.input, scale, zero], [quantized], name=quantized))
    nodes.append(helper.make_node("DequantizeLinear", [quantized, scale, zero], [output], name=output))
    return output


def _drop_unused(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in node.input}
    kept = [item for item in model.graph.initializer if item.name in used]
    copies = [onnx.TensorProto.FromString(item.SerializeToString()) for item in kept]
    del model.graph.initializer[:]
    model.graph.initializer.extend(copies)
