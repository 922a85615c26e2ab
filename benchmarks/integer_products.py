"""The rate of a quantized bundle's integer products by ONNX Runtime within a step, against the same products alone.

    python benchmarks/integer_products.py INT8_BUNDLE [--steps 40] [--threads N]

For each distinct shape a model of one quantized layer runs with the same thread settings, its weight in the caches.
Times are medians of what ONNX Runtime's profiler gives for the integer products, in both. The share printed last is the
time that all products of a step would take alone over the time that they take.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from framestep.calibration.integer import BREAK_INTEGER_PRODUCTS, INTEGER_OPERATORS, optimised_graph
from framestep.runtime.bundle import Bundle
from framestep.runtime.cores import default_threads

RUNS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--threads", type=int, default=default_threads())
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.bundle)
    bundle = Bundle(bundle.path, bundle.manifest.at("int8"))
    within = time_within_step(bundle, arguments.steps, arguments.threads)
    print("| M x K x N | products | us in a step | us alone | Gop/s in a step | Gop/s alone |")
    print("| --- | --- | --- | --- | --- | --- |")
    spent = floor = 0.0
    for shape, times in sorted(within.items()):
        alone = time_alone(shape, arguments.threads)
        operations = 2 * shape[0] * shape[1] * shape[2]
        here = float(np.median(times))
        count = len(times) // arguments.steps
        spent, floor = spent + count * here, floor + count * alone
        rates = f"{operations / here / 1e3:.0f} | {operations / alone / 1e3:.0f}"
        print(f"| {'x'.join(map(str, shape))} | {count} | {here:.0f} | {alone:.0f} | {rates} |")
    print(f"\n{spent / 1e3:.1f} ms of integer products in a step, {floor / 1e3:.1f} ms alone: {floor / spent:.0%}")


def time_within_step(bundle: Bundle, steps: int, threads: int) -> dict[tuple[int, int, int], list[float]]:
    """Microseconds of every integer product of `steps` steps, by shape (rows, depth, columns)."""
    graph = bundle.manifest.graphs["backbone"]
    path = bundle.file(graph.file)
    shapes = product_shapes(path)
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = make_session(str(path), options)
        states = {state.name: state for state in bundle.manifest.states}
        feed: dict[str, np.ndarray] = {}
        for use in graph.states:
            feed[use.input] = np.zeros((1, *(int(n) for n in states[use.state].shape[1:])), np.float32)
        rng = np.random.default_rng(0)
        frame = bundle.manifest.frame
        binding = session.io_binding()
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feed.items()}
        for use in graph.states:
            binding.bind_ortvalue_input(use.input, values[use.input])
            if use.output is not None:
                binding.bind_ortvalue_output(use.output, values[use.input])
        for port in graph.outputs:
            binding.bind_output(port.name)
        for step in range(steps):
            pixels = rng.integers(0, 256, (1, frame.height, frame.width, 3), np.uint8)
            for port in graph.inputs:
                value = pixels if port.role == "frame" else np.array([step], np.int64)
                binding.bind_cpu_input(port.name, value)
            session.run_with_iobinding(binding)
        times = kernel_times(session)
    found: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for name, microseconds in times:
        found[shapes[name]].append(microseconds)
    return found


def product_shapes(path: Path) -> dict[str, tuple[int, int, int]]:
    """Rows, depth and columns of each integer product of the optimised graph, for one stream."""
    weights = {item.name: tuple(item.dims) for item in optimised_graph(path).graph.initializer}
    model = onnx.load(path, load_external_data=False)
    rows = {}
    patches = (
        next(item for item in model.graph.output if item.name == "features").type.tensor_type.shape.dim[1].dim_value
    )
    for node in optimised_graph(path).graph.node:
        if node.op_type in INTEGER_OPERATORS:
            depth, columns = weights[node.input[1]]
            single = "pooling" in node.name and "key" not in node.name and "value" not in node.name
            rows[node.name] = (1 if single else patches, depth, columns)
    return rows


def time_alone(shape: tuple[int, int, int], threads: int) -> float:
    """Median microseconds of one integer product, run again and again."""
    M, K, N = shape
    rng = np.random.default_rng(0)
    constants = {
        "weight": rng.integers(-127, 128, (K, N), np.int8),
        "weight_scale": np.full(N, 0.01, np.float32),
        "scale": np.array(0.02, np.float32),
        "zero": np.array(0, np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale"], ["b"], axis=1),
        helper.make_node("MatMul", ["a", "b"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, M, K])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, M, N])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = make_session(model.SerializeToString(), options)
        binding = session.io_binding()
        binding.bind_cpu_input("x", rng.standard_normal((1, M, K), np.float32))
        binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_shape_and_type([1, M, N], np.float32))
        for _ in range(RUNS):
            session.run_with_iobinding(binding)
        times = kernel_times(session)
    return float(np.median([time for _, time in times][RUNS // 3 :]))


def kernel_times(session: onnxruntime.InferenceSession) -> list[tuple[str, float]]:
    """Name and microseconds of every integer product that the profiler saw."""
    events = json.loads(Path(session.end_profiling()).read_text())
    return [
        (event["name"].removesuffix("_kernel_time"), event["dur"])
        for event in events
        if event.get("args", {}).get("op_name") in INTEGER_OPERATORS and event["name"].endswith("_kernel_time")
    ]


def session_options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options


def make_session(model: str | bytes, options: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    providers = ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(model, options, providers, disabled_optimizers=BREAK_INTEGER_PRODUCTS)


if __name__ == "__main__":
    main()
