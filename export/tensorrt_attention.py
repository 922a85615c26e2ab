"""Attention layers of a TensorRT network, rewritten before it is built.

TensorRT has two fused attentions. The one for a single row of queries reads caches where they are, and knows query
heads that share a key head. The one for several rows wants a copy of the caches, repeated for each query head; and it
sums the products of queries and keys in FP16, unless these sums are cast to float32 before the softmax, which an
attention layer cannot say.

Sizes in shape comments: S streams, T new tokens, C slots of a cache, H query heads, G key and value heads, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

QUERY, KEY, VALUE, MASK = range(4)  # inputs of an attention layer
# of a cache; the attention for a single row has 48 KiB for its scores, and keeps those of a longer cache in FP16
MOST_SLOTS = 12000


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


def split_by_tokens(trt: Any, network: Any, layers: Sequence[Any]) -> list[Any]:
    """Attend in one way for a single token and in another for several, where T is not fixed.

    The attention layer keeps the first 2 - T rows, but not less than none: the only one, or none of several. The others
    attend in layers written out, with float32 scores, and the query heads of a key head as rows of one head:
    [S, G, H / G * T, d]. In an optimisation profile with T fixed to 1, and in one with T from 2 on, one of the two has
    no rows, and TensorRT leaves it out.

    Args:
        layers: of the network.

    Returns:
        The arrays that the network refers to: keep them until it is built.
    """
    writer = _Writer(trt, network)
    readers: dict[str, list[tuple[Any, int]]] = {}
    for layer in layers:
        for index in range(layer.num_inputs):
            if (tensor := layer.get_input(index)) is not None:
                readers.setdefault(tensor.name, []).append((layer, index))
    splits: dict[tuple[str, int], _Split] = {}
    for layer in layers:
        if layer.type != trt.LayerType.ATTENTION_INPUT or layer.num_inputs <= MASK:
            continue
        query, key, value, mask = (layer.get_input(index) for index in range(MASK + 1))
        (_, H, T, d), (_, G, C, _) = query.shape, key.shape
        if mask is None or mask.shape[1] != 1 or T != -1 or min(H, C, d) < 1:
            continue
        if G < 2:  # written out for one head, it is not fused
            continue
        split = splits[mask.name, H // G] = splits.get((mask.name, H // G)) or _Split(writer, mask, H // G, C)
        layer.__class__ = trt.IAttentionInputLayer  # the bindings give every layer as its base class
        made = layer.attention.get_output(0)
        several = split.several(query, key, value)
        whole = several
        if C <= MOST_SLOTS:
            layer.set_input(QUERY, split.single(query))
            layer.set_input(MASK, split.single(mask))
            whole = writer.join(made, several, axis=2)
        for reader, index in readers[made.name]:
            reader.set_input(index, whole)
    return writer.arrays


class _Split:
    """The rows under one mask: which are a single token's, and attention of the others.

    Args:
        mask: bool [S, 1, T, C].
        R: query heads for each key head.
    """

    def __init__(self, writer: _Writer, mask: Any, R: int, C: int) -> None:
        self.writer, self.R = writer, R
        ops = writer.trt.ElementWiseOperation
        of = writer.shape(mask)
        self.streams, tokens = writer.size(of, 0), writer.size(of, 2)
        self.one = writer.sizes(0)
        if C <= MOST_SLOTS:
            self.one = writer.apply(ops.MAX, writer.apply(ops.SUB, writer.sizes(2), tokens), writer.sizes(0))
        self.others = writer.apply(ops.SUB, tokens, self.one)
        self.rows = writer.apply(ops.PROD, self.others, writer.sizes(R))
        seen = self._rows(mask, self.one, self.others)
        seen = writer.join(*[seen] * R, axis=2)  # [S, 1, R * others, C]
        self.bias = writer.select(seen, 0.0, -np.inf)

    def single(self, tensor: Any) -> Any:
        """[S, H or 1, T, d or C], only its row where T is 1."""
        return self._rows(tensor, self.writer.sizes(0), self.one)

    def several(self, query: Any, key: Any, value: Any) -> Any:
        """The others of query [S, H, T, d] attend to key and value [S, G, C, d]."""
        writer, trt = self.writer, self.writer.trt
        (_, H, _, d), G = query.shape, key.shape[1]
        q = writer.reshape(self._rows(query, self.one, self.others), self.streams, G, self.rows, d)
        scores = writer.cast(writer.product(q, key, trt.MatrixOperation.TRANSPOSE), trt.float32)
        scores = writer.apply(trt.ElementWiseOperation.SUM, scores, self.bias)
        weights = writer.cast(writer.softmax(scores), query.dtype)
        y = writer.product(weights, value, trt.MatrixOperation.NONE)
        return writer.reshape(y, self.streams, H, self.others, d)

    def _rows(self, tensor: Any, first: Any, count: Any) -> Any:
        """Rows [S, heads, count, width] of [S, heads, T, width]."""
        writer, (_, heads, _, width) = self.writer, tensor.shape
        layer = writer.network.add_slice(tensor, (0, 0, 0, 0), (0, 0, 0, 0), (1, 1, 1, 1))
        layer.set_input(1, writer.join(writer.sizes(0, 0), first, writer.sizes(0), axis=0))
        layer.set_input(2, writer.join(self.streams, writer.sizes(heads), count, writer.sizes(width), axis=0))
        return layer.get_output(0)


class _Writer:
    """Adds layers to a network."""

    def __init__(self, trt: Any, network: Any) -> None:
        self.trt, self.network = trt, network
        self.arrays: list[Any] = []

    def sizes(self, *numbers: int) -> Any:
        return self._constant(np.array(numbers, np.int64))

    def shape(self, tensor: Any) -> Any:
        return self.network.add_shape(tensor).get_output(0)

    def size(self, shape: Any, axis: int) -> Any:
        return self.network.add_slice(shape, (axis,), (1,), (1,)).get_output(0)

    def apply(self, operation: Any, first: Any, second: Any) -> Any:
        return self.network.add_elementwise(first, second, operation).get_output(0)

    def join(self, *tensors: Any, axis: int) -> Any:
        layer = self.network.add_concatenation(list(tensors))
        layer.axis = axis
        return layer.get_output(0)

    def reshape(self, tensor: Any, *sizes: Any) -> Any:
        layer = self.network.add_shuffle(tensor)
        layer.set_input(1, self.join(*(self.sizes(n) if isinstance(n, int) else n for n in sizes), axis=0))
        return layer.get_output(0)

    def cast(self, tensor: Any, dtype: Any) -> Any:
        return tensor if tensor.dtype == dtype else self.network.add_cast(tensor, dtype).get_output(0)

    def select(self, condition: Any, first: float, second: float) -> Any:
        numbers = (self._constant(np.full((1, 1, 1, 1), number, np.float32)) for number in (first, second))
        return self.network.add_select(condition, *numbers).get_output(0)

    def product(self, first: Any, second: Any, operation: Any) -> Any:
        none = self.trt.MatrixOperation.NONE
        return self.network.add_matrix_multiply(first, none, second, operation).get_output(0)

    def softmax(self, scores: Any) -> Any:
        layer = self.network.add_softmax(scores)
        layer.axes = 1 << 3
        return layer.get_output(0)

    def _constant(self, array: Any) -> Any:
        self.arrays.append(array)
        return self.network.add_constant(array.shape, array).get_output(0)
