"""Writing ONNX graphs: a small builder over `onnx.helper`, with weights in external files.

Graphs are standard ONNX, opset 24, default domain only. Weights go into a `WeightFile`; several graphs may name the
same bytes of one file, so a weight that two graphs use is stored once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

OPSET = 24
ALIGNMENT = 64  # bytes; a mapped weight then starts on a cache line
INLINE_BYTES = 1024  # smaller tensors (shapes, scalars) stay in the graph file, where shape inference can read them

Shape = Sequence[int | str]


class WeightFile:
    """Tensors by name in one raw little-endian file next to the graphs that use them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, tuple[int, int]] = {}  # name -> (offset, length) in bytes
        self._file = path.open("wb")

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def add(self, name: str, array: np.ndarray) -> None:
        offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.write(b"\0" * (offset - self._file.tell()))
        content = _packed(array)
        self._file.write(content.data)
        self._places[name] = (offset, content.nbytes)

    def tensor(self, name: str, array: np.ndarray) -> TensorProto:
        """The initializer that names this file's bytes; `array` gives dtype and shape."""
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype))
        tensor.dims.extend(array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        offset, length = self._places[name]
        for key, value in (("location", self.path.name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor

    def close(self) -> None:
        self._file.close()
        if not self._places:  # an empty file would look like a damaged one
            self.path.unlink()


def save_graph(model: onnx.ModelProto, path: Path, weights: WeightFile) -> None:
    """Write a graph; equal constants of all graphs that share `weights` are stored once."""
    for item in model.graph.initializer:
        array = onnx.numpy_helper.to_array(item)
        if array.nbytes < INLINE_BYTES:
            continue
        content = hashlib.sha256(array.tobytes()).hexdigest()
        key = f"{content}/{array.dtype}/{'x'.join(map(str, array.shape))}"
        if key not in weights:
            weights.add(key, array)
        tensor = weights.tensor(key, array)
        tensor.name = item.name
        item.CopyFrom(tensor)
    model.producer_name = "framestep"
    onnx.save(model, path)


class GraphBuilder:
    """Builds one graph. Values are named by strings; `node` returns the name of its (first) output.

    Args:
        name: name of the graph.
        weights: where new weights go.
        shared: weight files of other graphs; a weight found there by name is used from there.

    Attributes:
        file: what the graph's file is called in a bundle.
    """

    def __init__(self, name: str, weights: WeightFile, shared: Iterable[WeightFile] = ()) -> None:
        self.name, self.file = name, f"{name}.onnx"
        self._files = (*shared, weights)
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._scope = ""

    def scope(self, name: str) -> None:
        """Prefix the names of the nodes and values that follow."""
        self._scope = f"{name}/" if name else ""

    def input(self, name: str, dtype: str, shape: Shape) -> str:
        self._inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, value: str, name: str, dtype: str, shape: Shape) -> str:
        """Declare `value` as the graph's output `name`, and return that name, under which it is now made."""
        for node in self._nodes:
            node.output[:] = [name if output == value else output for output in node.output]
            node.input[:] = [name if used == value else used for used in node.input]
        self._outputs.append(_value_info(name, dtype, shape))
        return name

    def weight(self, name: str, array: np.ndarray, stored: str | None = None) -> str:
        """A constant.

        Args:
            stored: name of its bytes in the weight files, where other constants have the same; None for `name`.
        """
        if name in self._initializers:
            return name
        if array.nbytes < INLINE_BYTES:
            self._initializers[name] = onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
            return name
        stored = stored or name
        for file in self._files:
            if stored in file:
                break
        else:
            file = self._files[-1]
            file.add(stored, array)
        self._initializers[name] = file.tensor(stored, array)
        self._initializers[name].name = name
        return name

    def constant(self, values: Any, dtype: type = np.int64) -> str:
        """A small unnamed constant, such as a shape or an axis."""
        array: np.ndarray = np.asarray(values, dtype)
        text = "x".join(map(str, array.ravel().tolist()))
        return self.weight(f"const/{array.dtype}/{'s' if array.ndim == 0 else ''}{text}", array)

    def node(self, op: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        base = f"{self._scope}{name or op}"
        output = base
        taken = {o for n in self._nodes for o in n.output}
        count = 1
        while output in taken:
            count += 1
            output = f"{base}_{count}"
        self._nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def linear(self, value: str, name: str, weight: np.ndarray, bias: np.ndarray | None) -> str:
        """value [..., in] @ weight [in, out] + bias [out]"""
        product = self.node("MatMul", value, self.weight(f"{name}.weight", weight), name=f"{name}.MatMul")
        if bias is None:
            return product
        return self.node("Add", product, self.weight(f"{name}.bias", bias), name=f"{name}.Add")

    def layer_norm(self, value: str, name: str, weight: np.ndarray, bias: np.ndarray, epsilon: float) -> str:
        return self.node(
            "LayerNormalization",
            value,
            self.weight(f"{name}.weight", weight),
            self.weight(f"{name}.bias", bias),
            name=name,
            axis=-1,
            epsilon=epsilon,
        )

    def activation(self, value: str, kind: str) -> str:
        """The activation that `transformers` calls `kind`."""
        if kind not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            raise ValueError(f"hidden_act '{kind}' is not supported; supported are {known}")
        return ACTIVATIONS[kind](self, value)

    def scalar(self, value: float) -> str:
        return self.constant(value, np.float32)

    def save(self, path: Path) -> None:
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, list(self._initializers.values())
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="framestep")
        model.ir_version = 11
        onnx.save(model, path)
        for file in self._files:
            file._file.flush()  # the checker reads the weight files
        onnx.checker.check_model(str(path), full_check=True)


def _packed(array: np.ndarray) -> np.ndarray:
    """An array as ONNX stores it: two INT4 in a byte, the first one low."""
    array = np.ascontiguousarray(array)
    if array.dtype != ml_dtypes.int4:
        return array
    nibbles = array.reshape(-1).view(np.uint8) & 0xF
    if nibbles.size % 2:
        nibbles = np.append(nibbles, np.uint8(0))
    return nibbles[0::2] | (nibbles[1::2] << 4)


def _value_info(name: str, dtype: str, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), list(shape))


def _gelu_tanh(g: GraphBuilder, x: str) -> str:
    return g.node("Gelu", x, approximate="tanh")


def _gelu(g: GraphBuilder, x: str) -> str:
    return g.node("Gelu", x, approximate="none")


def _times_sigmoid(g: GraphBuilder, x: str, slope: float) -> str:
    inner = x if slope == 1.0 else g.node("Mul", x, g.scalar(slope))
    return g.node("Mul", x, g.node("Sigmoid", inner))


def _clip(g: GraphBuilder, x: str, low: float, high: float) -> str:
    return g.node("Clip", x, g.scalar(low), g.scalar(high))


def _squared_relu(g: GraphBuilder, x: str) -> str:
    positive = g.node("Relu", x)
    return g.node("Mul", positive, positive)


def _laplace(g: GraphBuilder, x: str) -> str:
    """0.5 * (1 + erf((x - mu) / (sigma * sqrt(2)))) with the constants of MEGA (arXiv 2209.10655)"""
    mu, sigma = 0.707107, 0.282095
    scaled = g.node("Div", g.node("Sub", x, g.scalar(mu)), g.scalar(sigma * 2.0**0.5))
    return g.node("Mul", g.node("Add", g.node("Erf", scaled), g.scalar(1.0)), g.scalar(0.5))


ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_python": _gelu,
    "gelu_10": lambda g, x: _clip(g, _gelu(g, x), -10.0, 10.0),
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_accurate": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_python_tanh": _gelu_tanh,
    "quick_gelu": lambda g, x: _times_sigmoid(g, x, 1.702),
    "silu": lambda g, x: _times_sigmoid(g, x, 1.0),
    "swish": lambda g, x: _times_sigmoid(g, x, 1.0),
    "mish": lambda g, x: g.node("Mish", x),
    "hardswish": lambda g, x: g.node("HardSwish", x),
    "relu": lambda g, x: g.node("Relu", x),
    "relu2": _squared_relu,
    "relu6": lambda g, x: _clip(g, x, 0.0, 6.0),
    "leaky_relu": lambda g, x: g.node("LeakyRelu", x, alpha=0.01),
    "sqrtsoftplus": lambda g, x: g.node("Sqrt", g.node("Softplus", x)),
    "laplace": _laplace,
    "sigmoid": lambda g, x: g.node("Sigmoid", x),
    "tanh": lambda g, x: g.node("Tanh", x),
    "linear": lambda g, x: x,
}
