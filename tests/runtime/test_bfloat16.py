"""`onnxruntime:bf16`: products with constant matrices in bfloat16, all else in float32."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import golden
import ml_dtypes
import numpy as np
import onnx
import pytest
from native_parts import cpu_has, own_operators
from onnx import TensorProto, helper, numpy_helper

import framestep
from framestep.export.half import add_half
from framestep.export.linears import linears
from framestep.runtime.bundle import Bundle, file_entry
from framestep.runtime.errors import EngineError

HAS_BFLOAT16 = cpu_has("avx512_bf16")

LIMIT = 3e-2  # of bfloat16, as the torch engine's

needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no AVX512-BF16")


def write_nodes(source: Path, folder: Path, change: Callable[[onnx.GraphProto, onnx.NodeProto], list]) -> Path:
    """The bundle with other nodes in the place of its products with constant matrices: `change(graph, product)`."""
    shutil.copytree(source, folder)
    bundle = Bundle.open(folder)
    file = bundle.manifest.graphs["backbone"].file
    model = onnx.load(folder / file)
    found = {linear.node for linear in linears(model)}
    nodes = []
    for node in model.graph.node:
        copy = onnx.NodeProto.FromString(node.SerializeToString())
        nodes += change(model.graph, copy) if node.name in found else [copy]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, folder / file)
    files = {**bundle.manifest.files, file: file_entry(folder / file)}
    bundle.rewrite_manifest(replace(bundle.manifest, files=files))
    return folder


def matrix_of(graph: onnx.GraphProto, product: onnx.NodeProto) -> onnx.TensorProto:
    return next(item for item in graph.initializer if item.name == product.input[1])


def rounded(graph: onnx.GraphProto, product: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Both operands are rounded, in standard operators."""
    matrix = matrix_of(graph, product)
    half = numpy_helper.to_array(matrix).astype(ml_dtypes.bfloat16).astype(np.float32)
    matrix.CopyFrom(numpy_helper.from_array(half, matrix.name))
    half, back = f"{product.name}/half", f"{product.name}/back"
    nodes = [
        helper.make_node("Cast", [product.input[0]], [half], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", [half], [back], to=TensorProto.FLOAT),
    ]
    product.input[0] = back
    return [*nodes, product]


def written_as_gemm(transposed: bool, scaled: bool = False) -> Callable[[onnx.GraphProto, onnx.NodeProto], list]:
    """The same as `Gemm`, which takes two axes; `scaled`: by 1, which it says."""

    def change(graph: onnx.GraphProto, product: onnx.NodeProto) -> list[onnx.NodeProto]:
        matrix = matrix_of(graph, product)
        inputs, outputs = matrix.dims
        if transposed:
            stored = np.ascontiguousarray(numpy_helper.to_array(matrix).T)
            matrix.CopyFrom(numpy_helper.from_array(stored, matrix.name))
        x = product.input[0]
        rows, flat, leading, shape, y = (f"{product.name}/{part}" for part in ("rows", "flat", "leading", "shape", "y"))
        sizes = {rows: [-1, inputs], f"{product.name}/outputs": [outputs]}
        graph.initializer.extend(numpy_helper.from_array(np.array(size), name) for name, size in sizes.items())
        attributes = {"transB": 1} if transposed else {}
        return [
            helper.make_node("Reshape", [x, rows], [flat]),
            helper.make_node("Gemm", [flat, matrix.name], [y], **attributes, **({"alpha": 1.0} if scaled else {})),
            helper.make_node("Shape", [x], [leading], start=0, end=-1),
            helper.make_node("Concat", [leading, f"{product.name}/outputs"], [shape], axis=0),
            helper.make_node("Reshape", [y, shape], list(product.output)),
        ]

    return change


def features(bundle: Path, frames: np.ndarray, engine: str) -> np.ndarray:
    with framestep.load(bundle, engine=engine, outputs=["features"]) as session, session.open_stream() as stream:
        return np.stack([np.array(stream.step(frame)["features"]) for frame in frames])


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return golden.load()["frames"]


@needs_bfloat16
def test_both_operands_of_a_product_are_rounded_and_nothing_else(golden_bundle, frames, tmp_path) -> None:
    found = features(golden_bundle, frames[:20], "onnxruntime:bf16")
    expected = features(
        write_nodes(golden_bundle, tmp_path / "rounded.bundle", rounded), frames[:20], "onnxruntime:plain"
    )
    exact = features(golden_bundle, frames[:20], "onnxruntime")
    # sums are taken in another order, which moves a number over the edge of its rounding now and then
    assert error(found, expected) < 0.4 * error(found, exact)
    assert 3e-3 < error(found, exact) < LIMIT


@needs_bfloat16
def test_it_agrees_with_the_goldens_within_its_rounding_over_streams(golden_bundle, frames) -> None:
    expected = golden.load()["window_last_hidden_state"]
    with framestep.load(golden_bundle, engine="onnxruntime:bf16", streams=3) as session:
        assert session.engine_choice.startswith("onnxruntime:bf16 on cpu")
        assert session.precision == "fp32"
        streams = [session.open_stream() for _ in range(3)]
        alone = [np.array(streams[1].step(frame)["features"]) for frame in frames[:5]]
        for index in range(20):
            results = session.step({stream: frames[index] for stream in streams if stream is not streams[1]})
            for result in results.values():
                assert error(result["features"], expected[index]) < LIMIT
                assert index >= 5 or error(result["features"], alone[index]) < 1e-6


@needs_bfloat16
def test_products_are_counted_as_operators_of_ours(golden_bundle) -> None:
    counts = {}
    for engine in ("onnxruntime", "onnxruntime:bf16", "onnxruntime:plain"):
        with framestep.load(golden_bundle, engine=engine) as session:
            counts[engine] = own_operators(session)["backbone"]
    all_of_them = 3 + 36  # layers and products; a processor with AVX512-BF16 has what those in float32 need
    assert counts == {"onnxruntime": all_of_them, "onnxruntime:bf16": all_of_them, "onnxruntime:plain": 0}


@needs_bfloat16
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precision": "int8"},
            r"'onnxruntime:bf16' computes the precisions fp32 and fp32\+kv8 in bfloat16, not 'int8'",
        ),
        (
            {"precision": "fp16"},
            r"'onnxruntime:bf16' computes the precisions fp32 and fp32\+kv8 in bfloat16, not 'fp16'",
        ),
    ],
)
def test_it_refuses_other_precisions(golden_bundle, tmp_path, options, message) -> None:
    path = tmp_path / "out.bundle"
    shutil.copytree(golden_bundle, path)
    bundle = add_half(Bundle.open(path))
    half = bundle.manifest.variants["fp16"]
    variants = {**bundle.manifest.variants, "int8": half}
    bundle.rewrite_manifest(replace(bundle.manifest, variants=variants))
    with framestep.load(path, engine="onnxruntime:bf16", device="cpu") as session:
        assert session.precision == "fp32"  # where nothing else is asked for
    with pytest.raises(EngineError, match=message):
        framestep.load(path, engine="onnxruntime:bf16", device="cpu", **options)


@needs_bfloat16
@pytest.mark.parametrize("transposed", [False, True])
def test_products_that_are_written_as_gemm_are_computed_likewise(golden_bundle, frames, tmp_path, transposed) -> None:
    bundle = write_nodes(golden_bundle, tmp_path / "gemm.bundle", written_as_gemm(transposed))
    exact = features(golden_bundle, frames[:3], "onnxruntime")
    assert error(features(bundle, frames[:3], "onnxruntime"), exact) < 1e-5
    expected = features(golden_bundle, frames[:3], "onnxruntime:bf16")
    assert error(features(bundle, frames[:3], "onnxruntime:bf16"), expected) < 0.4 * error(expected, exact)
    with framestep.load(bundle, engine="onnxruntime:bf16") as session:
        assert own_operators(session)["backbone"] == 3 + 36


@needs_bfloat16
def test_graphs_without_such_products_are_refused(golden_bundle, frames, tmp_path) -> None:
    bundle = write_nodes(golden_bundle, tmp_path / "gemm.bundle", written_as_gemm(False, scaled=True))
    found = features(bundle, frames[:1], "onnxruntime")
    assert error(found, features(golden_bundle, frames[:1], "onnxruntime")) < 1e-5
    with pytest.raises(EngineError, match=r"gemm\.bundle: has nothing that the engine 'onnxruntime:bf16' computes"):
        framestep.load(bundle, engine="onnxruntime:bf16")


@pytest.mark.skipif(HAS_BFLOAT16, reason="this processor has AVX512-BF16")
def test_a_processor_without_the_instructions_is_told_so(golden_bundle) -> None:
    with pytest.raises(EngineError, match=r"needs AVX512-BF16, which this processor does not have"):
        framestep.load(golden_bundle, engine="onnxruntime:bf16")
