"""Whether ONNX Runtime computes the quantized layers with integers: a look at its optimised graph.

A quantized graph is no proof. Where ONNX Runtime does not recognise the pattern it widens weights and activations back
to float, and is slower than before. On most x86-64 processors the engine has products of its own for that pattern.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from ..export.linears import Linear

# As in runtime/native/onnxruntime_engine.cpp. MatMulAddFusion makes a Gemm with a float bias, no integer product;
# CommonSubexpressionElimination merges the quantizers of layers that share an input, and a shared one is not fused.
BREAK_INTEGER_PRODUCTS = ("MatMulAddFusion", "CommonSubexpressionElimination")
INTEGER_OPERATORS = ("MatMulIntegerToFloat", "QLinearMatMul", "MatMulInteger", "QGemm")


@dataclass(frozen=True)
class IntegerProducts:
    """What became of the quantized layers of a graph in ONNX Runtime's optimised graph.

    Attributes:
        graph: its name.
        quantized: number of quantized layers.
        integer: number of integer products.
        in_float: quantized layers that run in float all the same.
    """

    graph: str
    quantized: int
    integer: int
    in_float: tuple[str, ...]


def integer_products(path: Path, graph: str, quantized: Sequence[Linear]) -> IntegerProducts:
    """Load a graph as the engine `onnxruntime:plain` does, and count."""
    optimised = optimised_graph(path)
    integer = sum(node.op_type in INTEGER_OPERATORS for node in optimised.graph.node)
    left = {node.name for node in optimised.graph.node if node.op_type in ("MatMul", "Gemm", "FusedMatMul")}
    in_float = tuple(linear.name for linear in quantized if linear.node in left)
    return IntegerProducts(graph, len(quantized), integer, in_float)


def optimised_graph(path: Path, disabled: Sequence[str] = BREAK_INTEGER_PRODUCTS) -> onnx.ModelProto:
    """What ONNX Runtime's CPU provider runs for a graph, without its weights."""
    import onnxruntime

    with tempfile.TemporaryDirectory(prefix="framestep-") as folder:
        target = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(target)
        options.log_severity_level = 3  # it warns that such a file fits this machine only
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"], disabled_optimizers=list(disabled))
        return onnx.load(target, load_external_data=False)
