"""Attention layers of a TensorRT network, rewritten before it is built so that no step copies a cache needlessly.

Sizes in shape comments: S streams, T new tokens, C slots of a cache, H query heads, G key and value heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

QUERY, KEY, VALUE, MASK = range(4)  # inputs of an attention layer


def drop_unit_scales(trt: Any, layers: Sequence[Any]) -> None:
    """Let attentions whose scale is 1 read queries and keys themselves, not these times 1.

    The parser multiplies both by the scale's root. TensorRT drops the multiplication, but leaves a copy in its
    place: every key cache would be read and written once more in every step.
    """
    kinds = trt.LayerType
    makers = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}

    def is_one(name: str) -> bool:
        maker = makers.get(name)
        while maker is not None and maker.type == kinds.CAST:
            maker = makers.get(maker.get_input(0).name)
        if maker is None or maker.type != kinds.CONSTANT:
            return False
        maker.__class__ = trt.IConstantLayer  # the bindings give every layer as its base class
        return np.asarray(maker.weights).ravel().tolist() == [1.0]

    for layer in layers:
        if layer.type == kinds.ATTENTION_INPUT:
            for index in (QUERY, KEY):
                maker = makers.get(layer.get_input(index).name)
                if maker is None or maker.type != kinds.ELEMENTWISE or not is_one(maker.get_input(1).name):
                    continue
                maker.__class__ = trt.IElementWiseLayer
                if maker.op == trt.ElementWiseOperation.PROD:
                    layer.set_input(index, maker.get_input(0))


def fold_query_groups(trt: Any, network: Any, layers: Sequence[Any], also_single: bool) -> list[Any]:
    """Let the query heads that share a key head be rows of one head, [S, G, H / G * T, d], where T is not fixed.

    TensorRT has two fused attentions. For a single row of queries one reads the caches where they are, and knows
    shared heads. For several rows the other one wants a copy of the caches, and does not: keys and values would be
    written once for each query head in every step. So several tokens are folded and a single one is not.

    Which of the two it is depends on T, in the shapes alone: 2 - T, but not less than 0, is 1 for a single token.
    An optimisation profile with T fixed to 1 and one with T from 2 on each have that number as a constant.

    Args:
        layers: of the network.
        also_single: fold a single token's heads too, for caches that are too long for the attention of one row.

    Returns:
        The arrays that the network refers to: keep them until it is built.
    """
    writer = _ShapeWriter(trt, network)
    readers: dict[str, list[tuple[Any, int]]] = {}
    for layer in layers:
        for index in range(layer.num_inputs):
            if (tensor := layer.get_input(index)) is not None:
                readers.setdefault(tensor.name, []).append((layer, index))
    folds: dict[tuple[str, int, int], _Fold] = {}
    for layer in layers:
        if layer.type != trt.LayerType.ATTENTION_INPUT or layer.num_inputs <= MASK:
            continue
        query, key, value, mask = (layer.get_input(index) for index in range(MASK + 1))
        if mask is None or len(query.shape) != 4 or mask.shape[1] != 1:
            continue
        (_, H, T, d), (_, G, C, _) = query.shape, key.shape
        if T != -1 or min(H, G, C, d) < 1 or H == G:
            continue
        sizes = (mask.name, H, G)
        fold = folds[sizes] = folds.get(sizes) or _Fold(writer, mask, H, G, C, also_single)
        for index, cache in ((KEY, key), (VALUE, value)):
            layer.set_input(index, writer.reshape(cache, fold.streams, fold.groups, C, d))
        layer.set_input(MASK, fold.mask)
        layer.set_input(QUERY, writer.reshape(query, fold.streams, fold.heads, fold.rows, d))
        layer.__class__ = trt.IAttentionInputLayer  # the bindings give every layer as its base class
        made = layer.attention.get_output(0)
        unfolded = writer.reshape(made, fold.streams, H, fold.tokens, d)
        for reader, index in readers[made.name]:
            reader.set_input(index, unfolded)
    return writer.arrays


class _Fold:
    """Sizes of folded attentions under one mask, and that mask.

    Attributes:
        streams, tokens: S and T.
        heads, rows: of queries: H and T, or G and H / G * T.
        groups: G, as a number that the network does not know: it checks that H is a multiple of it, and cannot for
            `heads`, which it does not know either.
        mask: bool [S, 1, rows, C].
    """

    def __init__(self, writer: _ShapeWriter, mask: Any, H: int, G: int, C: int, also_single: bool) -> None:
        R = H // G
        ops = writer.trt.ElementWiseOperation
        of = writer.shape(mask)
        self.streams, self.tokens = writer.size(of, 0), writer.size(of, 2)
        left = writer.constant(0) if also_single else writer.apply(ops.SUB, 2, self.tokens)
        single = writer.apply(ops.MAX, left, 0)
        together = writer.apply(ops.SUB, R, writer.apply(ops.PROD, single, R - 1))  # query heads: R, or 1
        self.heads = writer.apply(ops.SUM, G, writer.apply(ops.PROD, single, H - G))
        self.groups = writer.apply(ops.PROD, writer.apply(ops.MIN, self.tokens, 1), G)
        self.rows = writer.apply(ops.PROD, together, self.tokens)
        repeated = writer.network.add_slice(mask, (0, 0, 0, 0), (0, 0, 0, 0), (1, 0, 1, 1))
        repeated.set_input(2, writer.join(self.streams, together, self.tokens, C))
        self.mask = writer.reshape(repeated.get_output(0), self.streams, 1, self.rows, C)


class _ShapeWriter:
    """Adds arithmetic of shapes to a network. A size is a number, or a tensor of one."""

    def __init__(self, trt: Any, network: Any) -> None:
        self.trt, self.network = trt, network
        self.arrays: list[Any] = []

    def constant(self, number: int) -> Any:
        self.arrays.append(np.array([number], np.int64))
        return self.network.add_constant((1,), self.arrays[-1]).get_output(0)

    def shape(self, tensor: Any) -> Any:
        return self.network.add_shape(tensor).get_output(0)

    def size(self, shape: Any, axis: int) -> Any:
        return self.network.add_slice(shape, (axis,), (1,), (1,)).get_output(0)

    def apply(self, operation: Any, first: Any, second: Any) -> Any:
        return self.network.add_elementwise(self._tensor(first), self._tensor(second), operation).get_output(0)

    def join(self, *sizes: Any) -> Any:
        layer = self.network.add_concatenation([self._tensor(size) for size in sizes])
        layer.axis = 0
        return layer.get_output(0)

    def reshape(self, tensor: Any, *sizes: Any) -> Any:
        layer = self.network.add_shuffle(tensor)
        layer.set_input(1, self.join(*sizes))
        return layer.get_output(0)

    def _tensor(self, size: Any) -> Any:
        return self.constant(size) if isinstance(size, int) else size
