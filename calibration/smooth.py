"""Outlier channels: moved out of activations into weights, where a scale per column can take them.

A layer norm whose output enters linear layers only may divide each channel by a number, when the rows of those layers'
weights are multiplied by it: nothing changes but the ranges (SmoothQuant, arXiv 2211.10438). The norm's own scale and
bias take the division, so it costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx

from ..export.linears import linears
from ..export.rewriting import initializer, set_initializer
from .observe import Activation

STRENGTH = 0.5  # how much of an outlier goes into the weights: 0 nothing, 1 all
SMALLEST = 1e-5


def smooth(model: onnx.ModelProto, activations: Mapping[str, Activation], shared: Collection[str] = ()) -> int:
    """Move outlier channels into the weights, in place.

    Args:
        model: the graph.
        activations: what enters its linear layers.
        shared: names of weights that another graph uses too; they stay as they are.

    Returns:
        How many layer norms were changed.
    """
    outputs = {item.name for item in model.graph.output}
    consumers: dict[str, list[str]] = {}
    for node in model.graph.node:
        for value in node.input:
            consumers.setdefault(value, []).append(node.name)
    by_input: dict[str, list[str]] = {}
    nodes: dict[str, set[str]] = {}
    for linear in linears(model):
        by_input.setdefault(linear.input, []).append(linear.weight)
        nodes.setdefault(linear.input, set()).add(linear.node)
    changed = 0
    for node in model.graph.node:
        if node.op_type != "LayerNormalization":
            continue
        value, (scale, bias) = node.output[0], node.input[1:3]
        weights = by_input.get(value, [])
        alone = value not in outputs and set(consumers.get(value, [])) == nodes.get(value, set())
        if not weights or not alone or {scale, bias, *weights} & set(shared):
            continue
        matrices = {name: initializer(model, name) for name in weights}
        rows = np.max([np.abs(matrix).max(1) for matrix in matrices.values()], axis=0)
        channels = activations[value].channels
        factor = np.maximum(channels, SMALLEST) ** STRENGTH / np.maximum(rows, SMALLEST) ** (1 - STRENGTH)
        factor = np.maximum(factor, SMALLEST).astype(np.float32)
        for name in (scale, bias):
            set_initializer(model, name, initializer(model, name) / factor)
        for name, matrix in matrices.items():
            set_initializer(model, name, matrix * factor[:, None])
        changed += 1
    return changed
