"""Weights of 4 or 8 bits in blocks, kept as they are where an engine multiplies by them without widening them first."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from .onnx_program import BLOCK_LINEAR, Node, OnnxGraph, without_unused

BLOCKS = (32, 64, 128)  # inputs that share a scale


def keep_blocks(graph: OnnxGraph) -> OnnxGraph:
    """Let each `MatMul` by a constant matrix of integers in blocks be a `BlockLinear`: of x, integers and scales.

    That is a blocked `DequantizeLinear` over the inputs, without zero points. Anything else stays as it is.
    """
    makers = {output: node for node in graph.nodes for output in node.outputs}
    uses = Counter(name for node in graph.nodes for name in node.inputs)
    nodes = []
    for node in graph.nodes:
        matrix = makers.get(node.inputs[1]) if node.op == "MatMul" else None
        bits = None if matrix is None or node.inputs[0] in graph.constants else _bits(graph, matrix)
        if matrix is not None and bits is not None and uses[matrix.inputs[0]] == 1:
            inputs = (node.inputs[0], *matrix.inputs[:2])
            node = Node(BLOCK_LINEAR, node.name, inputs, node.outputs, {"bits": bits})
        nodes.append(node)
    return without_unused(replace(graph, nodes=tuple(nodes)))


def _bits(graph: OnnxGraph, node: Node) -> int | None:
    """How many bits the integers of a matrix in blocks need, 4 or 8; None where a node is no such matrix."""
    if node.op != "DequantizeLinear" or any(node.inputs[2:]) or node.attributes.get("axis", 1) not in (0, -2):
        return None
    integers, scales = (graph.constants.get(name) for name in node.inputs[:2])
    block = node.attributes.get("block_size", 0)
    if block not in BLOCKS or integers is None or scales is None or integers.ndim != 2 or integers.dtype != np.int8:
        return None
    inputs, outputs = integers.shape
    if inputs % block or scales.shape != (inputs // block, outputs) or scales.dtype not in (np.float16, np.float32):
        return None
    return 4 if integers.min(initial=0) >= -8 and integers.max(initial=0) <= 7 else 8
