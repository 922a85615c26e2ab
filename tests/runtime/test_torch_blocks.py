"""Weights in blocks on the torch engine as it runs on CUDA: packed, and multiplied by in Triton's interpreter."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import cuda_graphs
import decoder_models
import golden
import interpreted_products
import numpy as np
import onnx
import pytest
import torch

import framestep
from framestep.export.decoder_checkpoint import read_decoder_checkpoint
from framestep.export.decoder_export import DecoderOptions, write_bundle
from framestep.kernels import block_linear, operators, reference
from framestep.runtime.bundle import Bundle, BundleWriter
from framestep.runtime.engines import torch_program
from framestep.runtime.engines.onnx_blocks import keep_blocks
from framestep.runtime.engines.onnx_program import Node, OnnxGraph, rewrite
from framestep.runtime.engines.torch import WARM_UPS

CAPACITY = 128
PROMPT = operators.MOST_TOKENS + 6


def write(folder, model, precision: str, **options) -> Path:
    decoder_models.save(model, folder / "checkpoint")
    checkpoint = read_decoder_checkpoint(str(folder / "checkpoint"))
    with BundleWriter(folder / "out.bundle") as writer:
        write_bundle(checkpoint, writer, DecoderOptions(precision, CAPACITY, **options))
    return folder / "out.bundle"


def say(stream, count: int, at: int) -> np.ndarray:
    tokens = np.random.default_rng(at).integers(0, decoder_models.VOCABULARY, count)
    embeddings = stream.run("embed", {"tokens": tokens})["embeddings"]
    inputs = {"embeddings": embeddings, "position_ids": at + np.arange(count)[None], "write_index": np.array(at)}
    return stream.run("decoder", {**inputs, "slot_mask": np.arange(CAPACITY) < at})["logits"]


def talk(session) -> np.ndarray:
    with session.open_stream() as stream:
        return np.stack([say(stream, PROMPT, 0), say(stream, 1, PROMPT), say(stream, 5, PROMPT + 1)])


@pytest.fixture
def packed(monkeypatch):
    """Weights stay packed on this CPU too, and the operators run their kernels, interpreted."""
    if torch.cuda.is_available():
        pytest.skip("Triton compiles here, for the GPU alone")
    monkeypatch.setattr(torch_program, "keeps_integers", lambda device: True)
    monkeypatch.setattr(reference, "block_linear", block_linear.launch)
    monkeypatch.setattr(reference, "widen_blocks", block_linear.widen)
    with interpreted_products.bfloat16_products():
        yield


MODELS = {"w4": decoder_models.qwen2, "w8": decoder_models.llama, "fp16+w4": decoder_models.qwen2}


@pytest.mark.parametrize(
    ("precision", "engine", "limit"),
    [("w4", "torch", 1e-5), ("w8", "torch", 1e-5), ("fp16+w4", "torch", 5e-3), ("w4", "torch:fp16", 5e-3)],
)
def test_says_what_widened_weights_say(tmp_path, request, precision, engine, limit):
    path = write(tmp_path, MODELS[precision](vocab_size=decoder_models.VOCABULARY + 3), precision)
    with framestep.load(path, engine=engine, device="cpu") as session:
        expected = talk(session)
    request.getfixturevalue("packed")
    with framestep.load(path, engine=engine, device="cpu") as session:
        found = talk(session)
    assert np.linalg.norm(found - expected) <= limit * np.linalg.norm(expected)
    assert not np.array_equal(found, expected)  # sums in another order


@pytest.mark.parametrize(("precision", "bits"), [("w4", 4), ("w8", 8), ("fp16+w4", 4)])
def test_every_matrix_of_a_decoder_stays_packed_and_is_one_product_a_token(
    tmp_path, packed, monkeypatch, precision, bits
):
    few, ours = [], operators.block_linear
    monkeypatch.setattr(operators, "block_linear", lambda *given: few.append(given[1]) or ours(*given))
    bundle = Bundle.open(write(tmp_path, decoder_models.llama(), precision))
    layers = decoder_models.SIZES["num_hidden_layers"]
    with framestep.load(bundle.path, engine="torch", device="cpu") as session, session.open_stream() as stream:
        program = session._engine._own_programs["decoder"]
        calls = Counter(call.node.op for call in program._calls)
        assert (calls["BlockLinearGroup"], calls["BlockLinear"], calls["Linear"]) == (2 * layers, 2 * layers + 1, 0)
        held = [
            value
            for name, value in program._constants.items()
            if torch.is_tensor(value) and name != torch_program.WIDENED
        ]
        say(stream, 1, 0)
        assert len(few) == 4 * layers + 1
    file = onnx.load(bundle.file(bundle.manifest.graphs["decoder"].file), load_external_data=False)
    integers = {onnx.TensorProto.INT4, onnx.TensorProto.INT8}
    shapes = [tuple(item.dims) for item in file.graph.initializer if item.data_type in integers]
    unit = 256 // bits
    assert len(shapes) == 7 * layers + 1
    expected = sum(-(-inputs // unit) * unit * outputs * bits // 8 for inputs, outputs in shapes)
    assert sum(value.nbytes for value in held if value.dtype == torch.int32) == expected
    kind = torch.float16 if precision == "fp16+w4" else torch.float32
    scales = sum(math.prod(item.dims) for item in file.graph.initializer if item.name.endswith(".scale"))
    floats = [value for value in held if value.is_floating_point() and value.dim() == 2 and value.dtype == kind]
    tables = 2 * 512 * decoder_models.SIZES["hidden_size"] // decoder_models.SIZES["num_attention_heads"] // 2
    assert sum(value.numel() for value in floats) == scales + tables  # of rotations; and no matrix


@pytest.mark.parametrize(("precision", "kind"), [("fp16+w4", torch.float16), ("w4", torch.int8)])
def test_the_table_of_embeddings_keeps_its_type_and_gives_the_same_rows(tmp_path, precision, kind):
    path, tokens, found = write(tmp_path, decoder_models.qwen2(), precision), np.arange(0, 300, 7), []
    for engine in ("torch:fp16", "onnxruntime"):
        with framestep.load(path, engine=engine, device="cpu") as session, session.open_stream() as stream:
            if engine != "onnxruntime":
                constants = session._engine._own_programs["embed"]._constants.values()
                table = max((value for value in constants if torch.is_tensor(value)), key=torch.Tensor.numel)
                assert table.dtype == kind
            found.append(stream.run("embed", {"tokens": tokens})["embeddings"])
    assert found[0].dtype == np.float32 and np.array_equal(*found)


def test_the_vision_tower_of_integers_sees_the_same(tmp_path, request):
    path, results = write(tmp_path, decoder_models.qwen2_5_vl(), "w8", frame_size=(56, 84)), []
    for way in ("widened", "packed"):
        if way == "packed":
            request.getfixturevalue("packed")
        with framestep.load(path, engine="torch:fp16", device="cpu") as session, session.open_stream() as stream:
            frame = np.random.default_rng(1).integers(0, 256, (session.frame.height, session.frame.width, 3), np.uint8)
            results.append(stream.step(frame)["visual"])
            programs = session._engine._programs
            products = sum(call.node.op.startswith("BlockLinear") for one in programs for call in one._calls)
        assert (products > 0) == (way == "packed")
    golden.assert_close(*results)


def test_on_cuda_tokens_and_prompts_of_packed_weights_are_captured(tmp_path, monkeypatch):
    path = write(tmp_path, decoder_models.qwen2(), "w4")
    load = functools.partial(framestep.load, path, engine="torch", device="cpu")
    monkeypatch.setattr(torch_program, "keeps_integers", lambda device: True)
    with load() as session, load() as eager:
        calls = cuda_graphs.Driver(session._engine, monkeypatch).calls
        streams = session.open_stream(), eager.open_stream()
        for count in (PROMPT, 1):
            for _ in range(WARM_UPS + 2):
                golden.assert_close(*(say(stream, count, 7) for stream in streams))
            assert calls[-4:] == ["replay", "synchronize"] * 2


def test_no_number_of_a_device_is_needed_on_the_host(tmp_path):
    """Neither for few rows (the head, what sees) nor for many (a prompt)."""
    path = write(tmp_path, decoder_models.qwen2_5_vl(), "w8", frame_size=(56, 84))
    script = Path(__file__).parents[1] / "pretend_device.py"
    command = [sys.executable, script, "float16", str(PROMPT), path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*Bundle.open(path).manifest.graphs]


def graph(block: int = 32, axis: int = 0, zero: bool = False, kind=np.int8) -> OnnxGraph:
    """Two products of one input, `a` with a bias, by matrices [64, 5] and [64, 6] in blocks."""
    random = np.random.default_rng(0)
    constants = {"bias": np.ones(5, np.float32)}
    nodes = []
    for name, outputs in (("a", 5), ("b", 6)):
        constants[f"{name}.weight"] = random.integers(-8, 8, (64, outputs)).astype(kind)
        constants[f"{name}.scale"] = random.normal(size=(64 // block, outputs)).astype(np.float32)
        constants[f"{name}.zero"] = np.zeros((64 // block, outputs), kind)
        inputs = (f"{name}.weight", f"{name}.scale", *([f"{name}.zero"] if zero else []))
        attributes = {"axis": axis, "block_size": block}
        nodes.append(Node("DequantizeLinear", name, inputs, (f"{name}.wide",), attributes))
        nodes.append(Node("MatMul", name, ("x", f"{name}.wide"), (f"{name}.product",)))
    nodes.append(Node("Add", "add", ("a.product", "bias"), ("a.sum",)))
    return OnnxGraph(Path("graph"), tuple(nodes), constants, ("x",), ("a.sum", "b.product"))


def test_products_of_one_input_become_one_with_a_bias_for_all():
    found = rewrite(keep_blocks(graph()), "", [])
    assert [node.op for node in found.nodes] == ["BlockLinearGroup"]
    assert found.nodes[0].attributes == {"bits": 4, "sizes": [5, 6]}
    shapes = [found.constants[name].shape for name in found.nodes[0].inputs[1:]]
    assert shapes == [(64, 11), (2, 11), (11,)]
    assert found.constants[found.nodes[0].inputs[3]].tolist() == [1] * 5 + [0] * 6


def test_products_whose_integers_differ_in_size_stay_apart():
    mixed = graph()
    mixed.constants["b.weight"][3, 3] = -9
    found = rewrite(keep_blocks(mixed), "", [])
    assert [(node.op, node.attributes["bits"]) for node in found.nodes] == [("BlockLinear", 4), ("BlockLinear", 8)]


def test_a_step_of_frames_widens_its_weights_once(packed):
    """It has hundreds of rows: packed matrices would be widened anew for each frame."""
    ops = []
    for position in ("position", None):
        program = torch_program.Program(graph(), position, [], None, torch.device("cpu"))
        ops.append([call.node.op for call in program._calls])
    assert ops == [["LinearGroup"], ["BlockLinearGroup"]]


@pytest.mark.parametrize("change", [{"block": 16}, {"axis": 1}, {"zero": True}, {"kind": np.uint8}])
def test_what_the_kernel_does_not_have_is_widened(change):
    assert keep_blocks(graph(**change)).nodes == graph(**change).nodes
