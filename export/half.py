"""Writing FP16 into a step graph: weights, state and arithmetic in half precision, what enters and leaves in float32.

Products of integers leave in float32 and are cast after that. TensorRT writes their sums in the product's type and
scales them in the next kernel: a sum over 768 inputs may be 12 million, and FP16 ends at 65,504.

Pixels are centred first: sums over numbers from 0 to 255 that a bias takes away again lose twice as much in FP16.

Layer norms keep their float32 inside (`stash_type`), as their operator does by default.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..runtime.bundle import Bundle, file_entry
from ..runtime.errors import BundleError, OutputError
from ..runtime.manifest import Variant
from .graph import WeightFile, save_graph
from .linears import linears
from .rewriting import initializer, replace_nodes, set_initializer

LARGEST = 65504.0
PIXEL_OFFSET = 128.0  # brings pixels 0..255 to -128..127, where INT8 too holds every one of them exactly
HALF = "fp16"
FLOAT = "fp32"


def add_half(bundle: Bundle) -> Bundle:
    """Derive the precision fp16 from fp32 and add it to a bundle on disk.

    Raises:
        BundleError: it has no fp32, or a constant that FP16 cannot hold.
        OutputError: the bundle cannot be written.
    """
    if FLOAT not in bundle.manifest.precisions:
        found = ", ".join(bundle.manifest.precisions)
        raise BundleError(
            f"{bundle.path}: fp16 is derived from fp32, and this bundle has {found}; take the bundle that it was"
            " calibrated from, or calibrate that with --precision fp16+int8 and build with the same"
        )
    old = bundle.manifest.at(FLOAT)
    graphs = {}
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=bundle.path) as staged:
            folder = Path(staged)
            weights = WeightFile(folder / f"{HALF}.bin")
            for name, graph in old.graphs.items():
                if any(port.role == "input_ids" for port in graph.inputs):
                    continue
                model = onnx.load(bundle.file(graph.file))
                if not graph.states and not linears(model):  # scores depend on small differences, and cost nothing
                    continue
                centre_pixels(model)
                to_half(model, [port for use in graph.states for port in (use.input, use.output) if port])
                graphs[name] = replace(graph, file=f"{name}.{HALF}.onnx")
                save_graph(model, folder / graphs[name].file, weights)
            weights.close()
            written = sorted(folder.iterdir())
            entries = {file.name: file_entry(file) for file in written}
            for file in written:
                file.replace(bundle.path / file.name)
    except OSError as error:
        raise OutputError(f"{bundle.path}: cannot be written: {error.strerror or error}") from None
    states = tuple(replace(state, dtype="float16") if state.dtype == "float32" else state for state in old.states)
    manifest = Bundle.open(bundle.path, verify=False).manifest  # it may have been labelled meanwhile
    variants = {**manifest.variants, HALF: Variant(graphs, states)}
    return bundle.rewrite_manifest(replace(manifest, variants=variants, files={**manifest.files, **entries}))


def to_half(model: onnx.ModelProto, states: Collection[str]) -> None:
    """Turn a float32 graph, quantized or not, into FP16, in place.

    Args:
        model: the graph.
        states: names of the inputs and outputs that are state; they become FP16.

    Raises:
        BundleError: a constant that FP16 cannot hold.
    """
    wide = _widen_integer_products(model)
    for item in model.graph.initializer:
        if item.data_type == TensorProto.FLOAT and item.name not in wide:
            array = numpy_helper.to_array(item)
            if np.abs(array).max(initial=0) > LARGEST:
                raise BundleError(f"graph {model.graph.name}: the constant {item.name} is too large for FP16")
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
    replace_nodes(model, [*before, *model.graph.node, *after])


def _widen_integer_products(model: onnx.ModelProto) -> set[str]:
    """Cast behind each product of two dequantized operands, in place. Returns the scales that stay float32."""
    rounded = _quantizer_scales(model)
    products = _integer_products(model)
    wide: set[str] = set()
    for dequantizer in (item for pair in products.values() for item in pair):
        scale = dequantizer.input[1]
        if scale in rounded:  # the very number that the quantizer divides by
            dequantizer.input[1] = f"{scale}/float"
            same = initializer(model, scale).astype(np.float16).astype(np.float32)
            set_initializer(model, dequantizer.input[1], same)
        wide.add(dequantizer.input[1])
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        product = node.output[0]
        if product in products:
            exact = node.output[0] = f"{product}/float"
            nodes.append(helper.make_node("Cast", [exact], [product], name=f"{product}/half", to=TensorProto.FLOAT16))
    replace_nodes(model, nodes)
    return wide


def _integer_products(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """The products of two dequantized operands, each with what dequantizes these."""
    dequantizers = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return {
        node.output[0]: [dequantizers[name] for name in node.input]
        for node in model.graph.node
        if node.op_type == "MatMul" and all(name in dequantizers for name in node.input)
    }


def _quantizer_scales(model: onnx.ModelProto) -> set[str]:
    return {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}


def centre_pixels(model: onnx.ModelProto) -> str | None:
    """Subtract `PIXEL_OFFSET` from the pixels, and add what that takes away to the next layer's bias, in place.

    Returns:
        The name of the value that enters that layer, which then is from -128 to 127; None where there is no such layer.
    """
    casts = {
        node.input[0]: node
        for node in model.graph.node
        if node.op_type == "Cast"
        and any(i.name == node.input[0] and _kind(i) == TensorProto.UINT8 for i in model.graph.input)
    }
    if len(casts) != 1:
        return None
    cast = next(iter(casts.values()))
    value = cast.output[0]
    path = {value}
    for node in model.graph.node:  # in topological order
        if node.op_type in ("Reshape", "Transpose") and node.input[0] in path:
            path.add(node.output[0])
    entered = [linear for linear in linears(model) if linear.input in path]
    users = [
        node for node in model.graph.node if set(node.input) & path and node.op_type not in ("Reshape", "Transpose")
    ]
    if len(entered) != 1 or [node.name for node in users] != [entered[0].node]:
        return None
    product = users[0].output[0]
    added = [node for node in model.graph.node if product in node.input]
    if len(added) != 1 or added[0].op_type != "Add":
        return None
    bias = added[0].input[1] if added[0].input[0] == product else added[0].input[0]
    weight = initializer(model, entered[0].weight)
    set_initializer(model, bias, initializer(model, bias) + np.float32(PIXEL_OFFSET) * weight.sum(0))
    set_initializer(model, "pixel_offset", np.array(PIXEL_OFFSET, np.float32))
    centred = f"{value}/centred"
    for node in model.graph.node:
        node.input[:] = [centred if name == value else name for name in node.input]
    at = list(model.graph.node).index(cast) + 1
    model.graph.node.insert(at, helper.make_node("Sub", [value, "pixel_offset"], [centred], name=centred))
    return entered[0].input


def _rename_inputs(model: onnx.ModelProto, old: str, new: str) -> None:
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


def round_as_half(model: onnx.ModelProto) -> None:
    """Make a float32 graph, quantized or not, round every value to FP16, in place: what FP16 with wide sums gives.

    ONNX Runtime's CPU provider runs FP16 graphs without rounding between operators, so it shows neither their error nor
    their overflow. This graph does.
    """
    scaling = {item.input[1] for pair in _integer_products(model).values() for item in pair}
    wide = scaling - _quantizer_scales(model)
    for item in model.graph.initializer:
        if item.data_type == TensorProto.FLOAT and item.name not in wide:
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
        nodes.append(node)
        if rounds:
            nodes.append(helper.make_node("Cast", [f"{name}/exact"], [half], name=half, to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [half], [name], name=f"{name}/rounded", to=TensorProto.FLOAT))
    replace_nodes(model, nodes)


def _float_values(model: onnx.ModelProto) -> set[str]:
    inferred = onnx.shape_inference.infer_shapes(model)
    infos = [*inferred.graph.value_info, *inferred.graph.output]
    return {info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT}


def _kind(item: onnx.ValueInfoProto) -> int:
    return int(item.type.tensor_type.elem_type)
