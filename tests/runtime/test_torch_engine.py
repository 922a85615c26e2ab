"""The torch engine: the same behaviour and goldens as every engine, its precisions, its way on CUDA, and `prime`."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import shutil
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import cuda_graphs
import golden
import numpy as np
import onnx
import pytest
import torch

import framestep
from framestep.runtime.bundle import Bundle, file_entry
from framestep.runtime.engines import choosing
from framestep.runtime.engines.onnx_program import read_graph
from framestep.runtime.engines.torch import PREFILL_FRAMES
from framestep.runtime.engines.torch_program import Program
from framestep.runtime.errors import EngineError, FrameError
from framestep.runtime.manifest import graphs_for

SESSION_TESTS = importlib.util.spec_from_file_location("session_tests", Path(__file__).with_name("test_session.py"))
session_tests = importlib.util.module_from_spec(SESSION_TESTS)
SESSION_TESTS.loader.exec_module(session_tests)


@pytest.mark.parametrize(
    "name",
    [
        "test_every_frame_remembers_all_before",
        "test_a_window_forgets_what_is_older",
        "test_interleaved_streams_keep_their_own_clocks",
        "test_batched_streams_do_not_see_each_other",
        "test_reset_forgets_the_history",
        "test_a_new_stream_in_a_used_slot_starts_fresh",
        "test_a_saved_state_continues_in_another_session",
        "test_a_saved_state_is_an_ordinary_safetensors_file",
        "test_a_state_of_another_model_or_a_damaged_one_is_refused_and_nothing_is_lost",
        "test_a_non_finite_output_zeroes_that_stream_only",
        "test_frames_of_another_size_are_resized",
        "test_results_are_copies",
        "test_only_asked_outputs_are_fetched",
        "test_closed_and_foreign_streams_are_refused",
    ],
)
def test_behaves_as_every_engine(name, request, monkeypatch):
    monkeypatch.setattr(framestep, "load", functools.partial(framestep.load, engine="torch", device="cpu"))
    test = getattr(session_tests, name)
    fixed = {"pause": 16}
    test(**{part: fixed.get(part) or request.getfixturevalue(part) for part in inspect.signature(test).parameters})


def follow(stream, frames):
    return np.stack([stream.step(frame)["features"] for frame in frames])


@pytest.fixture
def arrays():
    return golden.load()


def test_the_state_stays_where_it_is_and_only_one_slot_changes(golden_bundle, arrays):
    with framestep.load(golden_bundle, engine="torch", device="cpu", streams=2) as session:
        engine = session._engine
        stream, other = session.open_stream(), session.open_stream()
        addresses = [engine.state_address(name) for name in engine.state_names()]
        for frame in arrays["frames"][:20]:
            session.step({stream: frame, other: frame})
        before = engine.read_state("layer0.key", 0), engine.read_state("layer0.key", 1)
        stream.step(arrays["frames"][20])
        after = engine.read_state("layer0.key", 0), engine.read_state("layer0.key", 1)
        assert np.flatnonzero((before[0] != after[0]).any(axis=(0, 2))).tolist() == [20 % 16]
        assert np.array_equal(before[1], after[1])
        assert addresses == [engine.state_address(name) for name in engine.state_names()]


@pytest.mark.parametrize(("arithmetic", "limit"), [("fp32", 1e-5), ("tf32", 1e-5), ("fp16", 5e-3), ("bf16", 3e-2)])
def test_precisions_agree_with_the_goldens_within_their_rounding(golden_bundle, arrays, arithmetic, limit):
    with framestep.load(golden_bundle, engine=f"torch:{arithmetic}", device="cpu") as session:
        assert f"torch on cpu in {arithmetic}" in session.engine_choice
        found = follow(session.open_stream(), arrays["frames"])
    expected = arrays["window_last_hidden_state"]
    assert found.dtype == np.float32
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) <= limit


@pytest.mark.parametrize("engine", ["torch", "torch:fp16"])
def test_a_state_moves_between_engines(golden_bundle, arrays, tmp_path, engine):
    frames, expected = arrays["frames"], arrays["window_last_hidden_state"]
    with framestep.load(golden_bundle, engine=engine, device="cpu") as session, session.open_stream() as stream:
        follow(stream, frames[:20])
        stream.save_state(tmp_path / "state")
    with framestep.load(golden_bundle, engine="onnxruntime", device="cpu") as session, session.open_stream() as stream:
        stream.load_state(tmp_path / "state")
        found = follow(stream, frames[20:24])
    assert np.linalg.norm(found - expected[20:24]) / np.linalg.norm(expected[20:24]) <= (
        5e-3 if "fp16" in engine else 1e-5
    )


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_priming_leaves_a_stream_as_if_it_had_stepped(golden_bundle, arrays, engine):
    frames, expected = arrays["frames"], arrays["window_last_hidden_state"]
    with framestep.load(golden_bundle, engine=engine, device="cpu", streams=2) as session:
        other, stream = session.open_stream(), session.open_stream()
        other.step(frames[7])
        stream.prime(frames[:3])
        result = stream.prime(frame for frame in frames[3:38])
        assert len(frames[3:38]) > PREFILL_FRAMES
        assert result.position == 37
        golden.assert_close(result["features"], expected[37])
        golden.assert_close(follow(stream, frames[38:]), expected[38:])
        assert stream.position == 40
        assert other.position == 1


def test_priming_leaves_the_ring_as_steps_do(golden_bundle, arrays):
    with framestep.load(golden_bundle, engine="torch", device="cpu", streams=2) as session:
        stepped, primed = session.open_stream(), session.open_stream()
        follow(stepped, arrays["frames"][:21])
        primed.prime(arrays["frames"][:21])
        for name in session._engine.state_names():
            found, expected = (session._engine.read_state(name, stream.slot) for stream in (primed, stepped))
            np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("engine", ["onnxruntime", "torch"])
def test_a_bad_frame_or_none_does_not_advance_a_primed_stream(golden_bundle, arrays, engine):
    with framestep.load(golden_bundle, engine=engine, device="cpu") as session, session.open_stream() as stream:
        with pytest.raises(FrameError, match="expected at least one frame"):
            stream.prime([])
        with pytest.raises(FrameError, match="found grey"):
            stream.prime([arrays["frames"][0], np.zeros((8, 8), np.uint8)])
        assert stream.position == 0


def test_a_primed_stream_that_gives_nan_is_zeroed(golden_bundle, arrays):
    with framestep.load(golden_bundle, engine="torch", device="cpu") as session, session.open_stream() as stream:
        stream.prime(arrays["frames"][:5])
        poisoned = session._engine.read_state("layer1.value", 0)
        poisoned[:, 2] = np.nan
        session._engine.write_state("layer1.value", 0, poisoned)
        with pytest.raises(framestep.NonFiniteOutputError):
            stream.prime(arrays["frames"][5:8])
        assert stream.position == 0
        assert not session._engine.read_state("layer1.value", 0).any()


def test_scores_agree_with_onnx_runtime(golden_bundle, arrays):
    bundle = Bundle.open(golden_bundle)
    names = ("pooled", "scores", "patch_scores")
    generator = np.random.default_rng(0)
    hidden = arrays["window_pooler_output"].shape[-1]
    embeddings = generator.normal(size=(2, 5, hidden)).astype(np.float32)
    values = {"text_embeddings": embeddings[0], "patch_text_embeddings": embeddings[1]}
    values |= {"logit_scale": np.float32(2.0), "logit_bias": np.float32(-1.0)}
    found = []
    for name in ("onnxruntime", "torch", "torch:fp16"):
        choice = choosing.choose_engine(bundle.manifest, name, "cpu")
        engine = choosing.make_engine(choice, bundle, graphs_for(bundle.manifest, names), names, 2, 1)
        with pytest.raises(EngineError, match="needs labels"):
            engine.step({0: arrays["frames"][0]})
        engine.set_constants(values)
        assert engine.step(dict(enumerate(arrays["frames"][:2]))) == {}
        outputs = [engine.output(slot) for slot in (0, 1)]
        found.append({name: np.stack([of_slot[name] for of_slot in outputs]) for name in names})
        engine.close()
    assert found[0]["patch_scores"].shape == (2, 5, 4, 4)
    for name in names:
        np.testing.assert_allclose(found[1][name], found[0][name], atol=2e-5)
        np.testing.assert_allclose(found[2][name], found[0][name], atol=2e-2)


def edited(bundle, folder, edit) -> Path:
    """A copy of a bundle whose backbone graph was edited."""
    copy = folder / "edited.bundle"
    shutil.copytree(bundle, copy)
    path = copy / "backbone.onnx"
    model = onnx.load(path, load_external_data=False)
    edit(model)
    onnx.save(model, path)
    manifest = json.loads((copy / "manifest.json").read_text())
    entry = file_entry(path)
    manifest["files"]["backbone.onnx"] = {"bytes": entry.bytes, "sha256": entry.sha256}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def disguise_the_mask(model) -> None:
    """Let the mask pass through an operator that changes nothing, so that it is not plainly a ring's."""
    at = next(index for index, node in enumerate(model.graph.node) if node.op_type == "LessOrEqual")
    node = model.graph.node[at]
    name = node.output[0]
    node.output[0] = "disguised"
    model.graph.node.insert(at + 1, onnx.helper.make_node("Identity", ["disguised"], [name], name="disguise"))


def test_every_temporal_attention_is_taken_by_our_operator(golden_bundle):
    with framestep.load(golden_bundle, engine="torch", device="cpu") as session:
        assert [program.rings for program in session._engine._programs] == [3]
        assert session._engine.can_prefill()


def test_a_graph_with_another_mask_runs_its_own_operators(golden_bundle, arrays, tmp_path):
    copy = edited(golden_bundle, tmp_path, disguise_the_mask)
    with framestep.load(copy, engine="torch", device="cpu") as session, session.open_stream() as stream:
        assert [program.rings for program in session._engine._programs] == [0]
        assert not session._engine.can_prefill()
        golden.assert_close(follow(stream, arrays["frames"]), arrays["window_last_hidden_state"])
        stream.reset()
        golden.assert_close(stream.prime(arrays["frames"][:20])["features"], arrays["window_last_hidden_state"][19])


def test_an_unknown_operator_is_named_with_its_node(golden_bundle, tmp_path):
    def edit(model):
        disguise_the_mask(model)
        node = next(node for node in model.graph.node if node.op_type == "Identity")
        node.op_type = "BitwiseNot"

    copy = edited(golden_bundle, tmp_path, edit)
    with pytest.raises(
        EngineError, match=r"backbone.onnx: node 'disguise' is a BitwiseNot, which the torch engine does"
    ):
        framestep.load(copy, engine="torch", device="cpu")


def test_an_unknown_form_of_an_operator_is_named(golden_bundle, tmp_path):
    def edit(model):
        node = next(node for node in model.graph.node if "spatial_attention" in node.name)
        node.attribute.append(onnx.helper.make_attribute("softcap", 3.0))

    copy = edited(golden_bundle, tmp_path, edit)
    with pytest.raises(EngineError, match=r"spatial_attention' is a Attention with the attribute softcap"):
        framestep.load(copy, engine="torch", device="cpu")


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"),
    [
        ("Clip", {"x": (3, 4), "low": -0.5, "high": 0.5}, {}),
        ("Gather", {"x": (5, 4), "indices": [[4, 0], [1, 1]]}, {"axis": 0}),
        ("Gather", {"x": (5, 4), "indices": [3, 0]}, {"axis": -1}),
        ("Gather", {"x": (5, 4), "indices": -1}, {"axis": 1}),
        ("Gemm", {"x": (3, 4), "weight": (5, 4), "bias": (5,)}, {"transB": 1}),
        ("Gemm", {"x": (4, 3), "weight": (4, 5)}, {"transA": 1}),
        ("Mod", {"x": [-7, 7], "y": [3, 3]}, {}),
        ("Mod", {"x": (6,), "y": (6,)}, {"fmod": 1}),
        ("LayerNormalization", {"x": (2, 3, 8), "weight": (8,)}, {"axis": -1}),
        ("LayerNormalization", {"x": (2, 3, 8), "weight": (1,), "bias": (1,)}, {"axis": -2}),
        ("RMSNormalization", {"x": (2, 3, 8), "weight": (8,)}, {"axis": -1, "epsilon": 0.01}),
        ("RMSNormalization", {"x": (2, 3, 8), "weight": (1,)}, {}),
        ("RotaryEmbedding", {"x": (2, 3, 5, 8), "cos": (2, 5, 4), "sin": (2, 5, 4)}, {}),
        ("RotaryEmbedding", {"x": (2, 5, 24), "cos": (2, 5, 4), "sin": (2, 5, 4)}, {"num_heads": 3}),
        ("Slice", {"x": (6, 7), "starts": [1, -3], "stops": [5, 99], "axes": [0, 1]}, {}),
        ("Slice", {"x": (6, 7), "starts": [1], "stops": [-1], "axes": [1], "steps": [2]}, {}),
        ("Softplus", {"x": (9,)}, {}),
        ("HardSwish", {"x": (9,)}, {}),
        ("LeakyRelu", {"x": (9,)}, {"alpha": 0.2}),
        ("Mish", {"x": (9,)}, {}),
        ("Abs", {"x": (9,)}, {}),
        ("Erf", {"x": (9,)}, {}),
        ("Gelu", {"x": (9,)}, {}),
        ("ReduceL2", {"x": (3, 4), "axes": [-1]}, {"keepdims": 0}),
        ("ReduceMax", {"x": (3, 4, 5), "axes": [0, 2]}, {"keepdims": 0}),
        ("ReduceMean", {"x": (3, 4, 5), "axes": [-1]}, {}),
        ("Expand", {"x": (3, 1), "shape": [2, 1, 4]}, {}),
        ("Reshape", {"x": (2, 3, 4), "shape": [0, -1]}, {}),
        ("Squeeze", {"x": (2, 1, 3, 1), "axes": [1, -1]}, {}),
        ("Unsqueeze", {"x": (2, 3), "axes": [0, -1]}, {}),
        ("QuantizeLinear", {"x": (3, 4), "scale": [0.1, 0.2, 0.05], "zero": [0, 3, -4]}, {"axis": 0}),
        ("DequantizeLinear", {"x8": (3, 4), "scale": [0.1, 0.2, 0.05], "zero": [0, 3, -4]}, {"axis": 0}),
        ("DequantizeLinear", {"x8": (6, 2), "scale": [[0.1, 0.2], [0.3, 0.05]]}, {"axis": 0, "block_size": 3}),
        ("Attention", {"q": (2, 6, 3, 8), "k": (2, 2, 5, 8), "v": (2, 2, 5, 8)}, {"scale": 0.3}),
        ("Attention", {"q": (2, 3, 12), "k": (2, 5, 6), "v": (2, 5, 6)}, {"q_num_heads": 4, "kv_num_heads": 2}),
        ("TensorScatter", {"past": (2, 3, 6, 4), "new": (2, 3, 2, 4), "first": [1, 4]}, {"axis": 2}),
        ("TensorScatter", {"past": (2, 3, 6, 4), "new": (2, 3, 5, 4)}, {"axis": 2}),
        ("TensorScatter", {"past": (2, 6, 4), "new": (2, 2, 4), "first": [5, 4]}, {"axis": 1, "mode": "circular"}),
    ],
)
def test_operators_agree_with_onnx_runtime(op, inputs, attributes, tmp_path):
    import onnxruntime

    generator = np.random.default_rng(0)
    values = {}
    for name, value in inputs.items():
        if isinstance(value, tuple):
            values[name] = generator.normal(size=value).astype(np.float32)
            if name == "x8":
                values[name] = (values[name] * 40).astype(np.int8)
        else:
            kind = np.int8 if name == "zero" else np.int64 if np.asarray(value).dtype.kind == "i" else np.float32
            values[name] = np.asarray(value, kind)
    steering = ("shape", "axes", "low", "high", "starts", "stops", "steps")
    given = {name: value for name, value in values.items() if name not in steering}
    number = onnx.helper.np_dtype_to_tensor_dtype
    kind = {"QuantizeLinear": np.int8, "Mod": next(iter(values.values())).dtype}.get(op, np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(op, list(values), ["out"], name="node", **attributes)],
        "one",
        [onnx.helper.make_tensor_value_info(n, number(v.dtype), v.shape) for n, v in given.items()],
        [onnx.helper.make_tensor_value_info("out", number(np.dtype(kind)), None)],
        [onnx.numpy_helper.from_array(values[name], name) for name in values if name in steering],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    model.ir_version = 11
    onnx.save(model, tmp_path / "one.onnx")
    (expected,) = onnxruntime.InferenceSession(str(tmp_path / "one.onnx")).run(None, given)
    program = Program(read_graph(tmp_path / "one.onnx"), None, [], None, torch.device("cpu"))
    found = program({name: torch.tensor(value) for name, value in given.items()}, None)["out"].numpy()
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("op", "width", "weights"),
    [
        ("LayerNormalization", 40, 40),
        ("LayerNormalization", 40, 1),
        ("RMSNormalization", 40, 40),
        ("RMSNormalization", 40, 1),
        ("RMSNormalization", 8200, 8200),
    ],
)
def test_a_sum_and_its_norm_of_any_width_agree_with_onnx_runtime(op, width, weights, tmp_path):
    import onnxruntime

    generator = np.random.default_rng(0)
    given = {name: generator.normal(size=(1, 3, width)).astype(np.float32) for name in ("x", "update")}
    held = ["weight", "bias"] if op == "LayerNormalization" else ["weight"]
    make, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", list(given), ["sum"]), onnx.helper.make_node(op, ["sum", *held], ["normed"])],
        "norm",
        [make(name, kind, value.shape) for name, value in given.items()],
        [make(name, kind, None) for name in ("sum", "normed")],
        [onnx.numpy_helper.from_array(generator.normal(size=weights).astype(np.float32), name) for name in held],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)])
    model.ir_version = 11
    onnx.save(model, tmp_path / "norm.onnx")
    expected = onnxruntime.InferenceSession(str(tmp_path / "norm.onnx")).run(["sum", "normed"], given)
    program = Program(read_graph(tmp_path / "norm.onnx"), None, [], None, torch.device("cpu"))
    found = program({name: torch.tensor(value) for name, value in given.items()}, None)
    for name, right in zip(("sum", "normed"), expected, strict=True):
        np.testing.assert_allclose(found[name].numpy(), right, atol=1e-5, rtol=1e-5)


@pytest.fixture
def cuda_session(golden_bundle, monkeypatch):
    """A session whose engine goes the CUDA way, with copies of its inputs and a stand-in for the driver."""
    with framestep.load(golden_bundle, engine="torch", device="cpu", streams=3) as session:
        yield session, cuda_graphs.Driver(session._engine, monkeypatch)


def test_on_cuda_a_frame_is_one_launch_and_one_synchronisation(cuda_session, arrays):
    session, driver = cuda_session
    stream = session.open_stream()
    found = [stream.step(arrays["frames"][0])["features"]]
    assert driver.calls == ["wait", "step", "step", "step", "synchronize", "capture", "step", "replay", "synchronize"]
    driver.calls.clear()
    found += [stream.step(frame)["features"] for frame in arrays["frames"][1:]]
    assert driver.calls == ["replay", "synchronize"] * (len(arrays["frames"]) - 1)
    golden.assert_close(np.stack(found), arrays["window_last_hidden_state"])


def test_on_cuda_each_range_of_slots_is_captured_once_and_labels_capture_again(cuda_session, arrays):
    session, driver = cuda_session
    frames = arrays["frames"]
    streams = [session.open_stream() for _ in range(3)]
    for _ in range(2):
        session.step({streams[0]: frames[0]})
        session.step({streams[1]: frames[0], streams[2]: frames[1]})
    assert driver.calls.count("capture") == 2
    assert list(session._engine._captured) == [(0, 1), (1, 3)]
    assert streams[2].position == 2
    hidden = arrays["window_pooler_output"].shape[-1]
    session._engine.set_constants({"text_embeddings": np.zeros((1, hidden), np.float32)})
    assert not session._engine._captured
    session.step({streams[0]: frames[1]})
    assert driver.calls.count("capture") == 3


def test_on_cuda_the_precision_of_products_is_set_to_capture_and_not_to_launch(golden_bundle, arrays, monkeypatch):
    asked = []
    with framestep.load(golden_bundle, engine="torch:tf32", device="cpu") as session:
        cuda_graphs.Driver(session._engine, monkeypatch)
        monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
        stream = session.open_stream()
        for frame in arrays["frames"][:3]:
            stream.step(frame)
    assert asked == ["high", "highest"]


def test_on_cuda_sessions_capture_in_turns(golden_bundle, arrays, monkeypatch):
    at_work, most = [], []
    with ExitStack() as stack:
        sessions = [stack.enter_context(framestep.load(golden_bundle, engine="torch", device="cpu")) for _ in range(2)]
        for session in sessions:
            cuda_graphs.Driver(session._engine, monkeypatch)

        class Graph:
            def replay(self) -> None: ...
            def pool(self) -> None: ...

        class Capture:
            def __init__(self, graph, **options) -> None: ...

            def __enter__(self) -> None:
                at_work.append(None)
                most.append(len(at_work))
                time.sleep(0.05)

            def __exit__(self, *error) -> None:
                at_work.pop()

        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        steps = [threading.Thread(target=s.open_stream().step, args=(arrays["frames"][0],)) for s in sessions]
        for thread in steps:
            thread.start()
        for thread in steps:
            thread.join()
    assert most == [1, 1]


def test_on_cuda_priming_runs_without_a_capture(cuda_session, arrays):
    session, driver = cuda_session
    result = session.open_stream().prime(arrays["frames"][:20])
    golden.assert_close(result["features"], arrays["window_last_hidden_state"][19])
    assert driver.calls == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "torch:int4"}, "engine 'torch:int4' is unknown; with ':' expected torch:fp32, torch:tf32"),
        ({"engine": "onnxruntime:fp16"}, "engine 'onnxruntime:fp16' is unknown"),
        ({"engine": "onnxruntime:"}, "engine 'onnxruntime:' is unknown"),
        ({"engine": "torch", "device": "tpu"}, "device 'tpu' is unknown"),
    ],
)
def test_bad_options_are_named(golden_bundle, options, message):
    with pytest.raises(EngineError, match=message):
        framestep.load(golden_bundle, **options)


def test_a_gpu_that_is_not_there_is_named(golden_bundle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="device 'cuda' is not available to PyTorch here"):
        framestep.load(golden_bundle, engine="torch", device="cuda")


def test_auto_takes_onnx_runtime_and_torch_only_without_it(golden_bundle, monkeypatch):
    manifest = Bundle.open(golden_bundle).manifest
    assert choosing.choose_engine(manifest, "auto", "cpu").engine == "onnxruntime"
    monkeypatch.setattr(choosing, "find_spec", lambda name: None if name == "onnxruntime" else object())
    choice = choosing.choose_engine(manifest, "auto", "cpu")
    assert (choice.engine, choice.reason) == ("torch", "torch on cpu (ONNX Runtime is not installed)")


@pytest.mark.parametrize("missing", ["torch", "onnx"])
def test_a_missing_package_is_named_with_what_to_install(golden_bundle, tmp_path, missing):
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {missing!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import framestep
try:
    framestep.load({str(golden_bundle)!r}, engine="torch", device="cpu")
except framestep.FramestepError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'framestep[torch]'" in done.stdout
    assert done.stdout.count("\n") == 1


def test_the_engine_runs_on_a_gpu(golden_bundle, arrays):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    with framestep.load(golden_bundle, engine="torch:fp32", device="cuda", streams=2) as session:
        stream = session.open_stream()
        golden.assert_close(follow(stream, arrays["frames"]), arrays["window_last_hidden_state"])
        stream.reset()
        golden.assert_close(stream.prime(arrays["frames"])["features"], arrays["window_last_hidden_state"][-1])
