"""`onnxruntime:bf16`: products with constant matrices in bfloat16, all else in float32."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import golden
import ml_dtypes
import numpy as np
import onnx
import pytest
from native_parts import own_operators
from onnx import TensorProto, helper, numpy_helper

import framestep
from framestep.export.half import add_half
from framestep.export.linears import linears
from framestep.runtime.bundle import Bundle, file_entry
from framestep.runtime.errors import EngineError

CPU = Path("/proc/cpuinfo")
HAS_BFLOAT16 = CPU.is_file() and "avx512_bf16" in CPU.read_text("utf-8").split()

LIMIT = 3e-2  # of bfloat16, as the torch engine's

needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor has no AVX512-BF16")


def write_rounded(source: Path, folder: Path) -> Path:
    """The bundle with a graph that rounds both operands of its products with constant matrices, in standard operators."""
    shutil.copytree(source, folder)
    bundle = Bundle.open(folder)
    file = bundle.manifest.graphs["backbone"].file
    model = onnx.load(folder / file)
    found = {linear.node for linear in linears(model)}
    matrices = {node.input[1] for node in model.graph.node if node.name in found}
    for item in model.graph.initializer:
        if item.name in matrices:
            rounded = numpy_helper.to_array(item).astype(ml_dtypes.bfloat16).astype(np.float32)
            item.CopyFrom(numpy_helper.from_array(rounded, item.name))
    nodes = []
    for node in model.graph.node:
        if node.name in found:
            half, back = f"{node.name}/half", f"{node.name}/back"
            nodes.append(helper.make_node("Cast", [node.input[0]], [half], to=TensorProto.BFLOAT16))
            nodes.append(helper.make_node("Cast", [half], [back], to=TensorProto.FLOAT))
            node.input[0] = back
        nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, folder / file)
    files = {**bundle.manifest.files, file: file_entry(folder / file)}
    bundle.rewrite_manifest(replace(bundle.manifest, files=files))
    return folder


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
    expected = features(write_rounded(golden_bundle, tmp_path / "rounded.bundle"), frames[:20], "onnxruntime:plain")
    exact = features(golden_bundle, frames[:20], "onnxruntime")
    assert error(found[0], expected[0]) < 1e-4
    # attention adds up in another order, which moves a number over the edge of its rounding now and then
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
    layers, products = 3, 36
    assert counts == {"onnxruntime": layers, "onnxruntime:bf16": layers + products, "onnxruntime:plain": 0}


@needs_bfloat16
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, r"'onnxruntime:bf16' computes precision fp32 in bfloat16, not 'int8'"),
        ({"precision": "fp16"}, r"'onnxruntime:bf16' computes precision fp32 in bfloat16, not 'fp16'"),
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


@pytest.mark.skipif(HAS_BFLOAT16, reason="this processor has AVX512-BF16")
def test_a_processor_without_the_instructions_is_told_so(golden_bundle) -> None:
    with pytest.raises(EngineError, match=r"needs AVX512-BF16, which this processor does not have"):
        framestep.load(golden_bundle, engine="onnxruntime:bf16")
