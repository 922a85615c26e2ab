"""The floor of a step: what its arithmetic and its memory traffic must take on this machine.

    python benchmarks/roofline.py BUNDLE [--report report/report.json] [--threads N] [--json]

Operations and bytes are counted from the bundle's step graph, with ONNX shape inference at one stream. The machine is
measured on the graph's own terms:

- for each distinct matrix product of the graph, one-operator models with a constant weight run on ONNX Runtime with the
  session's own thread settings. A run is a series of products in a row, so that its time is a sustained one; the best
  of several runs, of the 3-D MatMul and of the 2-D Gemm form, counts. The weight stays in the caches there, which it
  cannot in a step: the floor errs to the fast side.
- read bandwidth: every thread searches its own part of a large array for a byte that is not in it (`memchr`); the
  best of several runs.

The floor is the sum over the operators that cannot be left out, one after another, as a step's are:

    matrix product   max(best measured time of its shape, bytes of its weight / bandwidth)
    Attention        max(operations / best measured GEMM rate of any shape, bytes of state that it reads / bandwidth)
    TensorScatter    bytes written / bandwidth

Layer norms, activations, biases, residuals and layout changes count nothing: they could all be fused into their
neighbours. Inputs and outputs of operators other than weights and state count nothing: they could stay in the caches.
Efficiency is the floor over the measured p50.

The same arithmetic with published peak rates in place of measured ones predicts other machines; such a line is marked
as a prediction. It is a bound that no program reaches, not a promise.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from framestep.apps.bench.report import read_report
from framestep.runtime.bundle import Bundle
from framestep.runtime.cores import default_threads
from framestep.runtime.errors import FramestepError

RUNS = 7
RUN_S = 0.25  # seconds that a run of products in a row takes, about
READ_BYTES = 1 << 30
MATRIX_PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class Operator:
    """An operator of the step graph that the floor counts.

    Attributes:
        shape: (M, K, N) of a matrix product, else ().
        operations: floating-point operations, a multiplication and an addition being two.
        memory_bytes: of weights, state read or state written.
        constant: one factor of the product is a weight.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    operations: int
    memory_bytes: int
    constant: bool = False


@dataclass(frozen=True)
class Rates:
    """What a machine can do.

    Attributes:
        product_s: best seconds of each shape (M, K, N).
        flops: best operations a second of any of them.
        bandwidth: bytes a second read.
    """

    product_s: dict[tuple[int, ...], float]
    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Floor:
    """Milliseconds of the floor and its parts."""

    total_ms: float
    products_ms: float
    attention_ms: float
    state_ms: float


@dataclass(frozen=True)
class Device:
    """Published peak rates.

    Attributes:
        flops: dense float16 tensor operations a second.
        bandwidth: bytes a second.
        source: where they are published, and how the dense float16 rate follows from it.
    """

    name: str
    flops: float
    bandwidth: float
    source: str


DEVICES = (
    Device(
        "Jetson Orin Nano 8GB (Super)",
        17e12,
        102e9,
        "NVIDIA Jetson Orin Nano Super Developer Kit: 67 TOPS INT8 sparse, hence 33 dense and 17 TFLOPS FP16; 102 GB/s",
    ),
    Device(
        "Jetson AGX Orin 64GB",
        42.5e12,
        204.8e9,
        "NVIDIA Jetson AGX Orin Series Technical Brief v1.2: GPU 170 TOPS INT8 sparse, hence 85 dense and 42.5 TFLOPS"
        " FP16; 204.8 GB/s",
    ),
    Device(
        "Jetson AGX Thor (T5000)",
        258e12,
        273e9,
        "NVIDIA Jetson Thor product page: 2070 TFLOPS FP4 sparse, hence 1035 dense, 517 FP8, 258 FP16; 273 GB/s",
    ),
    Device(
        "H200 SXM",
        989e12,
        4.8e12,
        "NVIDIA H200 data sheet: 1,979 TFLOPS FP16 with sparsity, hence 989 dense; 4.8 TB/s",
    ),
)


def count(bundle: Bundle) -> list[Operator]:
    """The operators of the step graph that the floor counts, for one stream.

    Raises:
        FramestepError: no step graph, or a shape that inference does not find.
    """
    import onnx

    graph = next((graph for graph in bundle.manifest.graphs.values() if graph.states), None)
    if graph is None:
        raise FramestepError(f"{bundle.path}: no graph with states, so there is no step to count")
    model = onnx.load(bundle.file(graph.file), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == "S":
                size.dim_value = 1
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    shapes: dict[str, tuple[int, ...]] = {}
    widths: dict[str, int] = {}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        kind = value.type.tensor_type
        shapes[value.name] = tuple(size.dim_value for size in kind.shape.dim)
        widths[value.name] = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    weights = {tensor.name for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        shapes[tensor.name] = tuple(tensor.dims)
        widths[tensor.name] = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    states = {use.input for use in graph.states} | {use.output for use in graph.states}

    def shape_of(name: str, node: onnx.NodeProto) -> tuple[int, ...]:
        shape = shapes.get(name, ())
        if not shape or 0 in shape:
            raise FramestepError(f"{graph.file}: {node.name or node.op_type}: the shape of '{name}' is not known")
        return shape

    def size_of(name: str, node: onnx.NodeProto) -> int:
        return int(np.prod(shape_of(name, node))) * widths[name]

    found = []
    for node in model.graph.node:
        if node.op_type in MATRIX_PRODUCTS:
            found.append(_product(node, shape_of, size_of, weights))
        elif node.op_type == "Attention":
            queries, keys = shape_of(node.input[0], node), shape_of(node.input[1], node)
            heads = {a.name: a.i for a in node.attribute}
            # [S, H, L, d], or [S, L, H * d] with the heads in an attribute
            rows = queries[1] * queries[2] if len(queries) == 4 else heads["q_num_heads"] * queries[1]
            length = keys[2] if len(keys) == 4 else keys[1]
            head_dim = queries[3] if len(queries) == 4 else queries[2] // heads["q_num_heads"]
            read = sum(size_of(name, node) for name in node.input[1:3] if name in states)
            found.append(Operator(node.name, "Attention", (), 4 * queries[0] * rows * length * head_dim, read))
        elif node.op_type == "TensorScatter":
            found.append(Operator(node.name, "TensorScatter", (), 0, size_of(node.input[1], node)))
        elif node.op_type in ("Conv", "ConvTranspose", "Einsum") or "Quant" in node.op_type:
            raise FramestepError(f"{graph.file}: {node.name}: {node.op_type} is not counted by this script")
    return found


def _product(
    node: Any,
    shape_of: Callable[[str, Any], tuple[int, ...]],
    size_of: Callable[[str, Any], int],
    weights: set[str],
) -> Operator:
    left, right = shape_of(node.input[0], node), shape_of(node.input[1], node)
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if attributes.get("transA"):
        left = left[::-1]
    if attributes.get("transB"):
        right = right[::-1]
    constant = [name for name in node.input[:2] if name in weights]
    if len(right) > 2:
        batch = int(np.prod(left[:-2]))
        shape: tuple[int, ...] = (left[-2], left[-1], right[-1])
    else:
        batch, shape = 1, (int(np.prod(left[:-1])), left[-1], right[-1])
    operations = 2 * batch * int(np.prod(shape))
    memory = sum(size_of(name, node) for name in constant)
    return Operator(node.name, node.op_type, shape, operations, memory, bool(constant))


def measure(operators: Sequence[Operator], threads: int, runs: int = RUNS, run_s: float = RUN_S) -> Rates:
    """Measure this machine on the shapes of these operators."""
    shapes = sorted({operator.shape for operator in operators if operator.shape})
    seconds = {shape: measure_product(shape, threads, runs, run_s) for shape in shapes}
    flops = max(2 * int(np.prod(shape)) / took for shape, took in seconds.items())
    return Rates(seconds, flops, measure_bandwidth(threads, runs))


def measure_product(shape: tuple[int, ...], threads: int, runs: int, run_s: float) -> float:
    """Best seconds of [M, K] @ [K, N] with a constant right side on ONNX Runtime."""
    best = float("inf")
    for form in MATRIX_PRODUCTS:
        session, binding = _product_session(form, shape, threads)
        session.run_with_iobinding(binding)
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        once = max(time.perf_counter() - start, 1e-7)
        in_a_row = max(3, int(run_s / once))
        for _ in range(runs):
            start = time.perf_counter()
            for _ in range(in_a_row):
                session.run_with_iobinding(binding)
            best = min(best, (time.perf_counter() - start) / in_a_row)
    return best


def _product_session(form: str, shape: tuple[int, ...], threads: int) -> tuple[Any, Any]:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    sys.path.insert(0, str(Path(__file__).parent))
    from python_loop import session_options

    M, K, N = shape
    generator = np.random.default_rng(0)
    left = generator.standard_normal((M, K), np.float32).reshape((1, M, K) if form == "MatMul" else (M, K))
    right = generator.standard_normal((K, N), np.float32)
    y_shape = (*left.shape[:-1], N)
    graph = helper.make_graph(
        [helper.make_node(form, ["x", "w"], ["y"])],
        form,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, left.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)],
        [onnx.numpy_helper.from_array(right, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])
    model.ir_version = 11
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(onnxruntime, threads), providers=["CPUExecutionProvider"]
    )
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(left))
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_shape_and_type(y_shape, np.float32))
    return session, binding


def measure_bandwidth(threads: int, runs: int = RUNS, size: int = READ_BYTES) -> float:
    """Best bytes a second that the threads together read from an array far larger than the caches."""
    libc = ctypes.CDLL(None)
    libc.memchr.restype = ctypes.c_void_p
    libc.memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
    array = np.ones(size, np.uint8)
    part = size // threads
    parts = [array.ctypes.data + index * part for index in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(runs):
            start = time.perf_counter()
            # a ctypes call lets go of the interpreter's lock
            if any(pool.map(lambda address: libc.memchr(address, 0, part), parts)):
                raise AssertionError("the byte is not in the array")
            best = max(best, part * threads / (time.perf_counter() - start))
    return best


def floor(operators: Sequence[Operator], rates: Rates) -> Floor:
    """The floor on the measured machine; see the top of this file."""
    products = attention = state = 0.0
    for operator in operators:
        memory_s = operator.memory_bytes / rates.bandwidth
        if operator.shape:
            batch = operator.operations / (2 * int(np.prod(operator.shape)))
            products += max(batch * rates.product_s[operator.shape], memory_s)
        elif operator.kind == "Attention":
            attention += max(operator.operations / rates.flops, memory_s)
        else:
            state += memory_s
    parts = [part * 1e3 for part in (products, attention, state)]
    return Floor(sum(parts), *parts)


def predict(operators: Sequence[Operator], device: Device) -> Floor:
    """The floor in float16 at published peak rates: a prediction, and a bound."""
    products = attention = state = 0.0
    for operator in operators:
        # bytes were counted in the bundle's float32
        took = max(operator.operations / device.flops, operator.memory_bytes / 2 / device.bandwidth)
        if operator.shape:
            products += took
        elif operator.kind == "Attention":
            attention += took
        else:
            state += took
    parts = [part * 1e3 for part in (products, attention, state)]
    return Floor(sum(parts), *parts)


def describe(operators: Sequence[Operator], rates: Rates, p50_ms: float | None) -> dict[str, Any]:
    """Everything found, for JSON."""
    least = floor(operators, rates)
    by_shape: dict[tuple[int, ...], list[Operator]] = {}
    for operator in operators:
        if operator.shape:
            by_shape.setdefault(operator.shape, []).append(operator)
    return {
        "operations": sum(operator.operations for operator in operators),
        "weight_bytes": sum(operator.memory_bytes for operator in operators if operator.shape),
        "state_bytes": sum(operator.memory_bytes for operator in operators if not operator.shape),
        "bandwidth": rates.bandwidth,
        "flops": rates.flops,
        "products": [
            {
                "shape": list(shape),
                "count": len(found),
                "operations": sum(operator.operations for operator in found),
                "best_ms": rates.product_s[shape] * 1e3,
                "flops": 2 * int(np.prod(shape)) / rates.product_s[shape],
            }
            for shape, found in sorted(by_shape.items())
        ],
        "floor": asdict(least),
        "p50_ms": p50_ms,
        "efficiency": None if p50_ms is None else least.total_ms / p50_ms,
        "predictions": [
            {
                "device": device.name,
                "source": device.source,
                "precision": "float16",
                **asdict(predict(operators, device)),
            }
            for device in DEVICES
        ],
    }


def text(found: dict[str, Any]) -> str:
    """The findings as Markdown."""
    least = found["floor"]
    lines = [
        f"Step, one stream: {found['operations'] / 1e9:.1f} GFLOP, {found['weight_bytes'] / 1e6:.1f} MB of weights,"
        f" {found['state_bytes'] / 1e6:.1f} MB of state read and written.",
        f"Machine: at best {found['flops'] / 1e9:.0f} GFLOP/s in this model's matrix products,"
        f" {found['bandwidth'] / 1e9:.1f} GB/s read.",
        "",
        "| product M x K x N | count | best, ms | GFLOP/s |",
        "| --- | ---: | ---: | ---: |",
    ]
    for product in found["products"]:
        size = " x ".join(map(str, product["shape"]))
        lines.append(f"| {size} | {product['count']} | {product['best_ms']:.4f} | {product['flops'] / 1e9:.0f} |")
    lines += [
        "",
        f"Floor: {least['total_ms']:.2f} ms = matrix products {least['products_ms']:.2f}"
        f" + attention {least['attention_ms']:.2f} + state update {least['state_ms']:.3f}.",
    ]
    if found["p50_ms"] is not None:
        lines.append(f"Measured p50: {found['p50_ms']:.2f} ms. Efficiency: {found['efficiency']:.3f}.")
    lines += [
        "",
        "Predictions (float16 at published peak rates; a bound, not measured):",
        "",
        "| device | floor, ms | source |",
        "| --- | ---: | --- |",
    ]
    lines += [f"| {item['device']} | {item['total_ms']:.3f} | {item['source']} |" for item in found["predictions"]]
    return "\n".join(lines) + "\n"


def measured_p50(report: Path, bundle: Bundle) -> float:
    """framestep's p50 at the last position of a report, whose ring is full.

    Raises:
        FramestepError: a report of another bundle, or without framestep's latency.
    """
    found = read_report(report)
    graph = next(graph for graph in bundle.manifest.graphs.values() if graph.states)
    if found.bundle.backbone_sha256 != bundle.manifest.files[graph.file].sha256:
        raise FramestepError(f"{report}: is of another bundle ({found.bundle.path}) than {bundle.path}")
    path = found.path("framestep")
    if path is None or not path.positions:
        raise FramestepError(f"{report}: has no latency of framestep")
    full = [entry for entry in path.positions if entry.position >= found.bundle.window] or path.positions
    return full[0].latency_ms.p50


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The floor of a step, and how near to it the measured step comes.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--report", type=Path, help="report.json of 'framestep bench', for the efficiency")
    parser.add_argument("--threads", type=int, default=default_threads(), help="default: every core")
    parser.add_argument("--runs", type=int, default=RUNS, help="runs of which the best counts (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    options = parser.parse_args(arguments)
    try:
        bundle = Bundle.open(options.bundle)
        p50_ms = measured_p50(options.report, bundle) if options.report else None
        operators = count(bundle)
        found = describe(operators, measure(operators, options.threads, options.runs), p50_ms)
    except FramestepError as error:
        print(f"roofline: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found, indent=1) if options.json else text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
