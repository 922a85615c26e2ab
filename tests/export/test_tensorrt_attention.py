"""What attention layers of a network become before it is built, computed with numpy."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

from framestep.export import tensorrt_attention  # noqa: E402
from framestep.export.tensorrt_attention import drop_unit_scales, split_by_tokens  # noqa: E402

HEADS, KV_HEADS, SLOTS, SIZE = 6, 2, 16, 8


def model(scale: float) -> onnx.ModelProto:
    """Grouped queries over a cache, under a mask."""
    shapes = {
        "query": ("S", HEADS, "T", SIZE),
        "keys": ("S", KV_HEADS, SLOTS, SIZE),
        "values": ("S", KV_HEADS, SLOTS, SIZE),
        "mask": ("S", 1, "T", SLOTS),
    }
    types = dict.fromkeys(shapes, TensorProto.FLOAT) | {"mask": TensorProto.BOOL}
    inputs = [helper.make_tensor_value_info(name, types[name], shape) for name, shape in shapes.items()]
    nodes = [
        helper.make_node("Attention", list(shapes), ["attended"], name="attention", scale=scale),
        helper.make_node("Neg", ["attended"], ["y"], name="after"),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, shapes["query"])]
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


class Interpreter:
    """Computes what a network of a few kinds of layers says.

    Attributes:
        single, several: shapes of the queries of the attention layer, and of those that are written out.
    """

    def __init__(self, network, feeds: dict[str, np.ndarray]) -> None:
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        self.makers = {layer.get_output(0).name: layer for layer in layers}
        self.values = dict(feeds)
        self.single = self.several = None

    def value(self, tensor) -> np.ndarray:
        if tensor.name not in self.values:
            layer = self.makers[tensor.name]
            given = [layer.get_input(index) for index in range(layer.num_inputs)]
            self.values[tensor.name] = getattr(self, layer.type.name.lower())(
                layer, [None if item is None else self.value(item) for item in given]
            )
        return self.values[tensor.name]

    def constant(self, layer, given):
        layer.__class__ = trt.IConstantLayer
        return np.array(layer.weights).reshape(tuple(layer.shape))

    def shape(self, layer, given):
        return np.array(given[0].shape)

    def cast(self, layer, given):
        return given[0].astype(trt.nptype(layer.get_output(0).dtype))

    def concatenation(self, layer, given):
        layer.__class__ = trt.IConcatenationLayer
        return np.concatenate(given, layer.axis)

    def elementwise(self, layer, given):
        layer.__class__ = trt.IElementWiseLayer
        of = {"SUM": np.add, "SUB": np.subtract, "PROD": np.multiply, "MAX": np.maximum, "MIN": np.minimum}
        return of[layer.op.name](*given)

    def unary(self, layer, given):
        layer.__class__ = trt.IUnaryLayer
        assert layer.op == trt.UnaryOperation.NEG
        return -given[0]

    def shuffle(self, layer, given):
        layer.__class__ = trt.IShuffleLayer
        sizes = given[1] if len(given) > 1 else np.array(tuple(layer.reshape_dims))
        return given[0].reshape(tuple(int(n) for n in sizes))

    def slice(self, layer, given):
        layer.__class__ = trt.ISliceLayer
        start = tuple(layer.start) if len(given) < 2 or given[1] is None else given[1]
        sizes = tuple(layer.shape) if len(given) < 3 or given[2] is None else given[2]
        places = zip(start, sizes, tuple(layer.stride), strict=True)
        return given[0][np.ix_(*(first + step * np.arange(size) for first, size, step in places))]

    def select(self, layer, given):
        return np.where(*given)

    def matrix_multiply(self, layer, given):
        layer.__class__ = trt.IMatrixMultiplyLayer
        first, second = given
        if layer.op1 == trt.MatrixOperation.TRANSPOSE:
            self.several, second = first.shape, second.swapaxes(2, 3)
        return first @ second

    def softmax(self, layer, given):
        layer.__class__ = trt.ISoftMaxLayer
        assert layer.axes == 1 << 3
        return self.softmax_of(given[0])

    def attention_input(self, layer, given):
        query, keys, values, mask = given
        self.single = query.shape
        keys, values = (np.repeat(x, query.shape[1] // x.shape[1], 1) for x in (keys, values))
        return self.softmax_of(np.where(mask, query @ keys.swapaxes(2, 3), -np.inf)) @ values

    def attention_output(self, layer, given):
        return given[0]

    @staticmethod
    def softmax_of(scores):
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize(
    ("tokens", "most_slots", "single", "several"),
    [(1, SLOTS, 1, 0), (2, SLOTS, 0, 2), (5, SLOTS, 0, 5), (1, SLOTS - 1, None, 1), (5, SLOTS - 1, None, 5)],
)
def test_split_attention_attends_to_the_same(tokens, most_slots, single, several, scale, monkeypatch) -> None:
    monkeypatch.setattr(tensorrt_attention, "MOST_SLOTS", most_slots)
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(model(scale).SerializeToString())
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    drop_unit_scales(trt, layers)
    kept = split_by_tokens(trt, network, layers)
    random = np.random.default_rng(0)
    feeds = {
        "query": random.standard_normal((2, HEADS, tokens, SIZE)).astype(np.float32),
        "keys": random.standard_normal((2, KV_HEADS, SLOTS, SIZE)).astype(np.float32),
        "values": random.standard_normal((2, KV_HEADS, SLOTS, SIZE)).astype(np.float32),
        "mask": np.concatenate([random.random((2, 1, tokens, SLOTS - 1)) < 0.5, np.ones((2, 1, tokens, 1), bool)], -1),
    }
    content = model(scale).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, feeds)
    interpreter = Interpreter(network, feeds)
    np.testing.assert_allclose(interpreter.value(network.get_output(0)), expected, atol=1e-5)
    assert interpreter.single == (None if single is None else (2, HEADS, single, SIZE))
    assert interpreter.several == (2, KV_HEADS, HEADS // KV_HEADS * several, SIZE)  # heads that share keys are rows
    assert kept
