"""INT8 memory: scales by head, the engines over int8 rings, and who refuses it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace

import golden
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from native_parts import cpu_has
from torch import Tensor

import framestep
from framestep.apps.inspect import describe
from framestep.calibration import calibrate as calibrate_module
from framestep.calibration.calibrate import CalibrationOptions, calibrate
from framestep.calibration.clips import Clip
from framestep.calibration.compare import compare, long_clip
from framestep.calibration.errors import CalibrationError
from framestep.calibration.memory import head_scales
from framestep.export.checkpoint import read_checkpoint
from framestep.export.rewriting import initializer, set_initializer
from framestep.export.streamformer import StreamFormer
from framestep.export.tensorrt import build
from framestep.export.tensorrt_network import BuildOptions
from framestep.runtime.bundle import Bundle, BundleWriter, file_entry
from framestep.runtime.engines.choosing import choose_engine, choose_precision
from framestep.runtime.engines.onnxruntime import shared_library
from framestep.runtime.errors import EngineError, StateError
from framestep.runtime.library import library
from framestep.runtime.manifest import Manifest
from framestep.runtime.schema import to_json

WINDOW = 16
HEADS, HEAD_DIM = 4, 24
MEMORY = ("fp32+kv8", "fp16+kv8", "int8+kv8")


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    frames = golden.load()["frames"]
    return [Clip("first", frames[:24]), Clip("second", frames[20:])]


@pytest.fixture(scope="module")
def calibrated(golden_bundle, clips, tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "all.bundle"
    options = CalibrationOptions(("fp16", *MEMORY), keep_float=True, drift_frames=0)
    return path, calibrate(Bundle.open(golden_bundle), clips, clips[:1], path, options)


@pytest.fixture
def frames() -> np.ndarray:
    return golden.load()["frames"]


def scales_of(path, precision: str = "fp32+kv8") -> dict[str, np.ndarray]:
    bundle = Bundle.open(path)
    model = onnx.load(bundle.file(bundle.manifest.at(precision).graphs["backbone"].file))
    return {state.name: initializer(model, f"{state.name}/scale") for state in bundle.manifest.states}


def caching(model: StreamFormer, keep: Callable[[str, Tensor], Tensor]) -> StreamFormer:
    """Let a model cache what `keep` makes of each name and of its keys or values [N, H, T, d].

    The graph caches them without biases: a key's changes no softmax, a value's goes around it.
    """
    for index, layer in enumerate(model.encoder.layer):
        attention = layer.temporal_attention
        biases = attention.attention.qkv.bias.detach().unflatten(0, (3, HEADS, 1, HEAD_DIM))

        def project(x: Tensor, index=index, biases=biases, project=attention.project):
            query, *parts = project(x)
            kept = []
            for name, part, bias in zip((f"layer{index}.key", f"layer{index}.value"), parts, biases[1:], strict=True):
                kept.append(keep(name, part - bias) + bias)
            return query, *kept

        attention.project = project
    return model


def run_and_read(path, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, Tensor]]:
    """Features, pooled, and what each frame left in memory, [N, H, T, d]."""
    results, slots = [], []
    with framestep.load(path, engine="torch", device="cpu", precision="fp32+kv8", threads=1) as session:
        engine, stream = session._engine, session.open_stream()
        for index, frame in enumerate(frames):
            results.append(stream.step(frame))
            slots.append({name: engine.read_state(name, 0)[:, index % WINDOW] for name in engine.state_names()})
    held = {name: torch.from_numpy(np.stack([slot[name] for slot in slots])) for name in slots[0]}  # [T, N * H, d]
    memory = {name: steps.unflatten(1, (-1, HEADS)).permute(1, 2, 0, 3) for name, steps in held.items()}
    return np.stack([r["features"] for r in results]), np.stack([r["pooled"] for r in results]), memory


def follow(path, frames, precision: str, engine: str = "torch", output: str = "features") -> np.ndarray:
    with framestep.load(path, engine=engine, device="cpu", precision=precision, threads=1) as session:
        stream = session.open_stream()
        return np.stack([stream.step(frame)[output] for frame in frames])


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return (left * right).sum(-1) / np.linalg.norm(left, axis=-1) / np.linalg.norm(right, axis=-1)


def test_scales_are_the_largest_cached_values_of_each_head(calibrated, clips) -> None:
    largest: dict[str, np.ndarray] = {}

    def note(name: str, x: Tensor) -> Tensor:
        largest[name] = np.maximum(largest.get(name, 0), x.abs().amax((0, 2, 3)).numpy())
        return x

    model = caching(read_checkpoint(str(golden.CHECKPOINT)).model, note)
    with torch.inference_mode():
        for clip in clips:
            model(torch.from_numpy(clip.frames)[None], None, WINDOW, 0)
    for precision in MEMORY:
        found = scales_of(calibrated[0], precision)
        assert found.keys() == largest.keys()
        for name, scale in found.items():
            assert scale.dtype == np.float32
            np.testing.assert_allclose(scale, largest[name] / 127, rtol=1e-3)


def test_the_engine_is_plain_pytorch_with_rounded_keys_and_values(calibrated, frames) -> None:
    assert len(frames) > 2 * WINDOW
    found, found_pooled, memory = run_and_read(calibrated[0], frames)
    scales = {name: torch.from_numpy(scale)[:, None, None] for name, scale in scales_of(calibrated[0]).items()}

    def round_it(name: str, x: Tensor) -> Tensor:
        # taken from the engine, for sums in another order may round to the other side; but it must be a rounding of x
        exact = (x / scales[name]).clamp(-127, 127)
        assert float((exact - memory[name]).abs().max()) <= 0.5 + 1e-2
        return memory[name] * scales[name]

    model = caching(read_checkpoint(str(golden.CHECKPOINT)).model, round_it)
    with torch.inference_mode():
        features, pooled, _ = model(torch.from_numpy(frames)[None], None, WINDOW, 0)
    golden.assert_close(found, features[0].numpy(), 1e-4)
    golden.assert_close(found_pooled, pooled[0].numpy(), 1e-4)
    assert np.abs(found - golden.load()["window_last_hidden_state"]).max() > 1e-3  # rounding does show


def run_graph(path, frames: np.ndarray, precision: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Features of the bundle's graph by ONNX Runtime's own operators, its states passed by hand; and the last states."""
    bundle = Bundle.open(path)
    graph = bundle.manifest.at(precision).graphs["backbone"]
    session = onnxruntime.InferenceSession(str(bundle.file(graph.file)), providers=["CPUExecutionProvider"])
    states = {
        item.name: np.zeros([1, *item.shape[1:]], np.int8) for item in session.get_inputs() if "past" in item.name
    }
    outputs = ["features", *(use.output for use in graph.states)]
    features = []
    for index, frame in enumerate(frames):
        fed = {"frame": frame[None], "position": np.array([index], np.int64)}
        found, *after = session.run(outputs, fed | states)
        states = {use.input: state for use, state in zip(graph.states, after, strict=True)}
        features.append(found[0])
    return np.stack(features), {use.state: states[use.input][0] for use in graph.states}


@pytest.mark.parametrize("precision", ["fp32+kv8", "int8+kv8"])
def test_on_a_cpu_the_session_does_what_the_graphs_own_operators_do(calibrated, frames, precision) -> None:
    frames = frames[: 2 * WINDOW + 3]
    expected, memory = run_graph(calibrated[0], frames, precision)
    with framestep.load(calibrated[0], device="cpu", precision=precision, streams=3) as session:
        assert session.engine_choice.startswith("onnxruntime on cpu")
        other, stream = session.open_stream(), session.open_stream()
        found = []
        for index, frame in enumerate(frames):
            both = {stream: frame, other: frames[-1]} if index % 5 == 2 else {stream: frame}
            found.append(session.step(both)[stream]["features"])
        held = {name: session._engine.read_state(name, stream.slot) for name in memory}
    # sums in another order round to the other side now and then: one of 255 steps of a key, and more behind INT8 layers
    limit = {"fp32+kv8": 1e-4, "int8+kv8": 2e-2}[precision]
    assert np.linalg.norm(np.stack(found) - expected) <= limit * np.linalg.norm(expected)
    for name, state in memory.items():
        assert held[name].dtype == np.int8 and state.shape == held[name].shape
        apart = np.abs(held[name].astype(int) - state)
        most, share = (1, 1e-3) if precision == "fp32+kv8" else (8, 0.5)
        assert apart.max() <= most and (apart != 0).mean() <= share, (apart.max(), (apart != 0).mean())
        assert np.abs(state).max() > 30  # the memory is used


def test_a_state_of_int8_goes_from_one_engine_to_the_other(calibrated, frames, tmp_path) -> None:
    file = tmp_path / "stream.state"

    def load(engine: str):
        return framestep.load(calibrated[0], engine=engine, device="cpu", precision="fp32+kv8")

    for begins, goes_on in (("torch", "onnxruntime"), ("onnxruntime", "torch")):
        with load(begins) as session, session.open_stream() as stream:
            for frame in frames[:20]:
                stream.step(frame)
            stream.save_state(file)
            expected = stream.step(frames[20])["features"]
        with load(goes_on) as session, session.open_stream() as stream:
            stream.load_state(file)
            assert stream.position == 20
            found = stream.step(frames[20])["features"]
        assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)


@pytest.mark.parametrize(("precision", "limit"), [("fp32+kv8", 1e-4), ("fp16+kv8", 4e-3)])
def test_the_graph_computes_the_same_by_its_own_operators(calibrated, frames, tmp_path, precision, limit) -> None:
    copy = tmp_path / "disguised.bundle"
    shutil.copytree(calibrated[0], copy)
    name = Bundle.open(copy).manifest.at(precision).graphs["backbone"].file
    model = onnx.load(copy / name, load_external_data=False)
    mask = next(node for node in model.graph.node if node.op_type == "LessOrEqual")
    at = list(model.graph.node).index(mask) + 1
    model.graph.node.insert(at, onnx.helper.make_node("Identity", ["disguised"], [mask.output[0]], name="disguise"))
    mask.output[0] = "disguised"  # no longer plainly a ring's
    onnx.save(model, copy / name)
    manifest = json.loads((copy / "manifest.json").read_text())
    entry = file_entry(copy / name)
    manifest["files"][name] = {"bytes": entry.bytes, "sha256": entry.sha256}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    rings = []
    for path in (calibrated[0], copy):
        with framestep.load(path, engine="torch", device="cpu", precision=precision) as session:
            rings.append([program.rings for program in session._engine._programs])
            assert {session._engine.read_state(name, 0).dtype for name in session._engine.state_names()} == {
                np.dtype(np.int8)
            }
    assert rings == [[3], [0]]
    found, expected = (follow(path, frames[:20], precision) for path in (copy, calibrated[0]))
    assert np.linalg.norm(found - expected) <= limit * np.linalg.norm(expected)


def test_pooled_stays_close_to_float_and_the_error_does_not_grow(calibrated, golden_bundle, clips) -> None:
    path, report = calibrated
    cosine = {item.precision: item.lowest_cosine for item in report.accuracy}
    assert all(cosine[precision] > 0.99 for precision in MEMORY)
    assert cosine["fp16"] > cosine["fp16+kv8"]
    bundle = Bundle.open(path)
    rounded = replace(bundle, manifest=bundle.manifest.at("fp32+kv8"))
    found = compare(Bundle.open(golden_bundle), rounded, [long_clip(clips, 8 * WINDOW)])
    full = found.cosine[WINDOW:]  # the ring has filled up
    assert full[-3 * WINDOW :].mean() > full[: 3 * WINDOW].mean() - 1e-5
    assert full.min() > 0.9999


def test_state_takes_a_quarter_of_float_and_the_weights_are_shared_with_fp16(calibrated) -> None:
    path, report = calibrated
    sizes = describe(Bundle.open(path))["bytes_per_stream_by_precision"]
    assert sizes["fp32"] == 4 * sizes["fp32+kv8"]
    assert sizes["fp16"] == 2 * sizes["fp16+kv8"]
    assert {item.precision: item.state_bytes for item in report.accuracy} == {
        name: size for name, size in sizes.items() if name != "fp32"
    }
    assert {item.reference_state_bytes for item in report.accuracy} == {sizes["fp32"]}
    weights = {name for name in Bundle.open(path).manifest.files if name.endswith(".bin")}
    assert weights == {"backbone.bin", "fp16.bin", "fp32.bin", "int8.bin"}
    assert "| fp16+kv8 |" in (path / "report.md").read_text()


@pytest.mark.parametrize("arithmetic", ["torch:fp16", "torch:bf16"])
def test_int8_memory_runs_in_other_arithmetic(calibrated, frames, arithmetic) -> None:
    found = follow(calibrated[0], frames[:20], "fp32+kv8", arithmetic, "pooled")
    expected = follow(calibrated[0], frames[:20], "fp32+kv8", "torch", "pooled")
    assert cosines(found, expected).min() > 0.999


def test_a_saved_state_is_int8_and_fits_its_own_precision_alone(calibrated, frames, tmp_path) -> None:
    path, file = calibrated[0], tmp_path / "stream.state"

    def load(precision: str):
        return framestep.load(path, engine="torch", device="cpu", precision=precision)

    with load("fp16+kv8") as session, session.open_stream() as stream:
        stream.prime(frames[:20])
        stream.save_state(file)
        expected = stream.step(frames[20])["features"]
        size = session.bundle.bytes_per_stream()
    assert size < file.stat().st_size < size + 2000
    with load("fp16+kv8") as session, session.open_stream() as stream:
        stream.load_state(file)
        assert stream.position == 20
        np.testing.assert_array_equal(stream.step(frames[20])["features"], expected)
    for other in ("fp32+kv8", "fp16"):
        with load(other) as session, session.open_stream() as stream, pytest.raises(StateError, match="another model"):
            stream.load_state(file)


def test_other_engines_refuse_it_with_their_reason(calibrated) -> None:
    path = calibrated[0]
    with pytest.raises(
        EngineError, match=r"'fp16\+kv8' keeps its memory as INT8.*: on a CPU it reads INT8 beside float32 alone"
    ):
        framestep.load(path, engine="onnxruntime", device="cpu", precision="fp16+kv8")
    for engine, device in (("onnxruntime:plain", "cpu"), ("onnxruntime", "cuda")):
        with pytest.raises(
            EngineError, match=r"'int8\+kv8' keeps its memory as INT8.* dequantize the whole memory in ever"
        ):
            framestep.load(path, engine=engine, device=device, precision="int8+kv8")
    manifest = Bundle.open(path).manifest
    for refuse in (
        lambda: choose_engine(manifest, "tensorrt", "auto", "fp32+kv8"),
        lambda: choose_precision(manifest, "fp32+kv8", "cuda", "tensorrt"),
        lambda: build(Bundle.open(path), BuildOptions("fp32+kv8"), print),
    ):
        with pytest.raises(
            EngineError,
            match=r"FP32 or FP16; use the engine 'torch' or, on a CPU, onnxruntime, or take .*\(fp16, fp32\)",
        ):
            refuse()


def test_auto_takes_it_where_it_comes_first_or_there_is_nothing_else(calibrated) -> None:
    path = calibrated[0]
    with framestep.load(path, device="cpu") as session:
        assert session.precision == "fp32"
        assert session.engine_choice.startswith("onnxruntime")
    with framestep.load(path, device="cpu", precision="fp16+kv8") as session:
        assert session.engine_choice == "torch on cpu (no other engine runs INT8 memory), fp16+kv8"
    manifest = Bundle.open(path).manifest
    assert choose_precision(manifest, "auto", "cuda", "torch") == "fp16"
    alone = manifest.at("fp16+kv8")
    assert choose_engine(alone, "auto", "cpu").engine == "torch"
    assert choose_precision(alone, "auto", "cpu", "torch") == "fp16+kv8"
    with pytest.raises(EngineError, match="use the engine 'torch'$"):
        choose_precision(alone, "auto", "cpu", "onnxruntime")
    for integers in (manifest.at("int8+kv8"), manifest.at("fp32+kv8")):
        assert choose_engine(integers, "auto", "cpu").engine == "onnxruntime"
        assert choose_precision(integers, "auto", "cpu", "onnxruntime") == integers.precision
    for main in ("fp32+kv8", "int8+kv8"):
        several = put_first(manifest, main)
        assert choose_precision(several, "auto", "cpu", "onnxruntime") == main
        assert choose_precision(several, "auto", "cpu", "torch") == main
        assert choose_precision(several, "auto", "cpu", "onnxruntime:plain") == "fp32"
        assert choose_precision(several, "auto", "cuda", "onnxruntime") == "fp32"
    assert choose_precision(put_first(manifest, "fp32+kv8"), "auto", "cpu", "onnxruntime:bf16") == "fp32+kv8"
    assert choose_precision(put_first(manifest, "int8+kv8"), "auto", "cpu", "onnxruntime:bf16") == "fp32"


def test_in_c_auto_takes_what_it_takes_in_python(calibrated) -> None:
    path = calibrated[0]
    whole = Bundle.open(path).manifest
    for main, other in (("fp16+kv8", "int8+kv8"), ("fp16+kv8", "fp32+kv8"), ("int8+kv8", "fp16+kv8")):
        manifest = replace(whole.at(main), variants={other: whole.variants[other]})
        taken = choose_precision(manifest, "auto", "cpu", "onnxruntime")
        assert precision_in_c(path, manifest) == taken != "fp16+kv8"
    assert precision_in_c(path, whole) == choose_precision(whole, "auto", "cpu", "onnxruntime") == "fp32"
    for main in ("fp32+kv8", "int8+kv8"):
        assert precision_in_c(path, put_first(whole, main)) == main
        assert precision_in_c(path, put_first(whole, main), "onnxruntime:plain") == "fp32"


@pytest.mark.skipif(not cpu_has("avx512_bf16"), reason="needs AVX512-BF16")
def test_in_c_products_in_bfloat16_run_beside_int8_memory_without_being_asked(calibrated) -> None:
    path = calibrated[0]
    manifest = Bundle.open(path).manifest
    assert precision_in_c(path, manifest, "onnxruntime:bf16") == "fp32"
    assert precision_in_c(path, manifest.at("fp32+kv8"), "onnxruntime:bf16") == "fp32+kv8"
    assert precision_in_c(path, put_first(manifest, "fp32+kv8"), "onnxruntime:bf16") == "fp32+kv8"
    assert precision_in_c(path, put_first(manifest, "int8+kv8"), "onnxruntime:bf16") == "fp32"


def put_first(manifest: Manifest, main: str) -> Manifest:
    """The same bundle with another main precision; the old one is left out."""
    variants = {name: variant for name, variant in manifest.variants.items() if name != main}
    return replace(manifest.at(main), variants=variants)


def precision_in_c(path, manifest: Manifest, engine: str = "onnxruntime") -> str:
    """The precision of a session that the C functions open where none is asked for."""
    native = library()
    options, session, info = (
        native.new("fs_session_options"),
        native.ffi.new("fs_session *"),
        native.new("fs_session_info"),
    )
    texts = {"engine": engine, "device": "cpu", "library": shared_library(), "manifest": json.dumps(to_json(manifest))}
    kept = {name: native.ffi.new("char[]", text.encode()) for name, text in texts.items()}
    for name, text in kept.items():
        setattr(options, name, text)
    output = native.ffi.new("char[]", b"pooled")
    outputs = native.ffi.new("char *[]", [output])
    options.outputs, options.output_count, options.trust_files = outputs, 1, 1
    native.check(native.functions.fs_session_open(os.fsencode(path), options, session))
    try:
        native.check(native.functions.fs_session_describe(session[0], info))
        return native.text(info.precision)
    finally:
        native.check(native.functions.fs_session_close(session[0]))


@pytest.fixture
def broken(golden_bundle, tmp_path) -> Callable[[str, float], Bundle]:
    """Writes a copy of the golden bundle whose weight of a name was changed in one head's columns."""

    def write(weight: str, value: float) -> Bundle:
        bundle = Bundle.open(golden_bundle)
        model = onnx.load(bundle.file("backbone.onnx"))
        array = initializer(model, weight)
        array[:, HEAD_DIM : 2 * HEAD_DIM] = value
        set_initializer(model, weight, array)
        with BundleWriter(tmp_path / "broken.bundle") as writer:
            onnx.save(model, writer.folder / "backbone.onnx", save_as_external_data=True, location="backbone.bin")
            graphs = {"backbone": bundle.manifest.graphs["backbone"]}
            writer.finish(replace(bundle.manifest, graphs=graphs))
        return Bundle.open(tmp_path / "broken.bundle")

    return write


def test_a_head_that_caches_only_zeros_gets_a_scale_that_keeps_them(broken, clips, tmp_path) -> None:
    options = CalibrationOptions(("fp32+kv8",), drift_frames=0)
    short = [Clip("short", clips[0].frames[:18])]
    report = calibrate(broken("layer1.temporal.value.weight", 0.0), short, short, tmp_path / "q.bundle", options)
    assert scales_of(tmp_path / "q.bundle")["layer1.value"][1] == 1.0
    assert report.accuracy[0].lowest_cosine > 0.999
    assert Bundle.open(tmp_path / "q.bundle").manifest.precisions == ("fp32+kv8",)


def test_nan_on_its_way_into_memory_names_the_state(broken, clips, tmp_path) -> None:
    bundle = broken("layer1.temporal.key.weight", np.nan)
    with pytest.raises(CalibrationError, match=r"step 0: NaN or infinity enters the state layer1\.key"):
        calibrate(bundle, clips, clips, tmp_path / "q.bundle", CalibrationOptions(("fp16+kv8",)))
    assert not (tmp_path / "q.bundle").exists()


def test_a_budget_counts_what_int8_memory_loses(golden_bundle, clips, tmp_path, monkeypatch) -> None:
    def coarse(*arguments):
        return {name: 16 * scale for name, scale in head_scales(*arguments).items()}

    monkeypatch.setattr(calibrate_module, "head_scales", coarse)
    bundle, lines = Bundle.open(golden_bundle), []
    options = CalibrationOptions(("int8", "int8+kv8"), min_cosine=0.999, drift_frames=0)
    with pytest.raises(CalibrationError, match=r"--min-cosine 0\.999: not reached"):
        calibrate(bundle, clips, clips[:1], tmp_path / "q.bundle", options, progress=lines.append)
    tried = [line.partition(",")[0] for line in lines if " in float: " in line]
    assert tried == ["int8", "int8+kv8"] * (len(tried) // 2)
