"""The TensorRT engine through a recording stand-in for the driver and for TensorRT's runtime; real engines, built here.

What needs a GPU is in benchmarks/gpu/compiled.py, which runs this engine where there is one.
"""

from __future__ import annotations

import gc
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
import types
from dataclasses import replace
from pathlib import Path

import golden
import numpy as np
import pytest

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

from tensorrt_bundles import NoProgress  # noqa: E402

import framestep  # noqa: E402
from framestep.benchmarks.gpu import stand_in as stand_in_engine  # noqa: E402
from framestep.benchmarks.gpu.stand_in import stand_in  # noqa: E402
from framestep.export.tensorrt import build  # noqa: E402
from framestep.export.tensorrt_network import BuildOptions  # noqa: E402
from framestep.runtime.bundle import Bundle  # noqa: E402
from framestep.runtime.engines.cuda_driver import ALIGNMENT, CAPTURES, NON_BLOCKING, CudaDriver  # noqa: E402
from framestep.runtime.engines.tensorrt import MOST_GRAPHS, TensorRtEngine  # noqa: E402
from framestep.runtime.errors import EngineError  # noqa: E402

STREAMS = 3
PER_FRAME = ["Context.push", "cuGraphLaunch", "Stream.synchronize", "Context.pop"]


@pytest.fixture(scope="module")
def built(golden_bundle, tmp_path_factory) -> Path:
    """The goldens' model with engines in fp16 and fp32."""
    path = tmp_path_factory.mktemp("built") / "golden.bundle"
    shutil.copytree(golden_bundle, path)
    for precision in ("fp16", "fp32"):
        build(Bundle.open(path), BuildOptions(precision, STREAMS, compute_capabilities=("8.6",)), NoProgress())
    return path


@pytest.fixture
def copied(built, tmp_path) -> Path:
    path = tmp_path / "golden.bundle"
    shutil.copytree(built, path)
    return path


@pytest.fixture
def machine(built):
    with stand_in(built) as found:
        yield found


def load(path, **options):
    return framestep.load(path, engine="tensorrt", **{"streams": STREAMS, **options})


def assert_near(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """In the 2-norm, relative: the goldens have numbers around 3, of which FP16 knows three digits."""
    assert float(np.linalg.norm(found - expected) / np.linalg.norm(expected)) <= tolerance


def engine_of(path, precision="fp32", outputs=("pooled",)) -> TensorRtEngine:
    bundle = Bundle.open(path)
    return TensorRtEngine(replace(bundle, manifest=bundle.manifest.at(precision)), ["backbone"], outputs, STREAMS)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", golden.TOLERANCE), ("fp16", 5e-3)])
def test_interleaved_streams_give_the_goldens(built, machine, precision, tolerance) -> None:
    arrays = golden.load()
    frames = arrays["frames"]
    generator = np.random.default_rng(5)
    with load(built, precision=precision) as session:
        streams = [session.open_stream() for _ in range(STREAMS)]
        found = {stream: [] for stream in streams}
        while any(len(results) < len(frames) for results in found.values()):
            chosen = [s for s in streams if len(found[s]) < len(frames) and generator.random() < 0.6]
            for stream, result in session.step({stream: frames[len(found[stream])] for stream in chosen}).items():
                found[stream].append(result)
        for results in found.values():
            for name, key in (("features", "last_hidden_state"), ("pooled", "pooler_output")):
                assert_near(np.stack([r[name] for r in results]), arrays[f"window_{key}"], tolerance)


def test_a_frame_is_one_launch_and_one_wait(built, machine) -> None:
    with load(built) as session:
        streams = [session.open_stream() for _ in range(STREAMS)]
        frames = golden.load()["frames"]
        session.warm_up()
        addresses = {name: session._engine.state_address(name) for name in session._engine.state_names()}
        machine.calls.clear()
        for frame in frames[:20]:
            session.step(dict.fromkeys(streams, frame))
        assert machine.names() == PER_FRAME * 20
        assert addresses == {name: session._engine.state_address(name) for name in session._engine.state_names()}
        assert all(address % ALIGNMENT == 0 for address in addresses.values())


def test_only_the_asked_outputs_come_to_the_host(built, machine) -> None:
    engine = engine_of(built, outputs=("pooled",))
    machine.calls.clear()
    engine.run_range(0, 1)
    capture = machine.names()[machine.names().index("cuStreamBeginCapture") :]
    assert capture[1:5] == [
        "memcpy_htod_async",
        "memcpy_htod_async",
        "IExecutionContext.execute_async_v3",
        "memcpy_dtoh_async",
    ]
    assert engine.outputs.keys() == {"pooled"}
    engine.close()


def test_labels_are_scored_on_the_device_and_may_change(built, machine, copied) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    from framestep.runtime.engines.onnxruntime import OnnxRuntimeEngine

    bundle = Bundle.open(copied)
    flat = replace(bundle, manifest=bundle.manifest.at("fp32"))
    graphs, outputs = ["backbone", "label", "patch_label"], ["scores", "patch_scores"]
    assert {"label", "patch_label"} <= manifest["graphs"].keys()
    ours = TensorRtEngine(flat, graphs, outputs, STREAMS)
    other = OnnxRuntimeEngine(flat, outputs, STREAMS, "cpu", 1)
    hidden = flat.manifest.graphs["label"].inputs[1].shape[1]
    generator = np.random.default_rng(0)
    with pytest.raises(EngineError, match="needs labels"):
        ours.run_range(0, 1)
    held = len(machine.memory)
    for labels in (5, 2, 7):
        text = generator.standard_normal((labels, hidden)).astype(np.float32)
        constants = {"text_embeddings": text, "patch_text_embeddings": text * 0.5}
        constants |= {"logit_scale": np.array(2.0, np.float32), "logit_bias": np.array(-1.0, np.float32)}
        for engine in (ours, other):
            engine.set_constants(constants)
            for slot in range(STREAMS):
                engine.seek(slot, 0)
        frames = generator.integers(0, 256, ours.frames.shape, np.uint8)
        assert ours.step(dict(enumerate(frames))) == other.step(dict(enumerate(frames))) == {}
        for slot, name in itertools.product(range(STREAMS), outputs):
            assert ours.output(slot)[name].shape[0] == labels
            golden.assert_close(ours.output(slot)[name], other.output(slot)[name], 1e-4)
    assert len(machine.memory) == held + 4  # the constants; buffers of other sizes were given back
    with pytest.raises(EngineError, match=r"5000 labels are more than the 4096"):
        ours.set_constants({"text_embeddings": np.zeros((5000, hidden), np.float32)})
    ours.close()


def test_states_are_read_written_and_zeroed(built, machine) -> None:
    engine = engine_of(built)
    name = engine.state_names()[1]
    value = np.random.default_rng(0).standard_normal(engine.read_state(name, 0).shape).astype(np.float32)
    engine.write_state(name, 1, value)
    np.testing.assert_array_equal(engine.read_state(name, 1), value)
    assert not engine.read_state(name, 0).any() and not engine.read_state(name, 2).any()
    engine.zero_states(1)
    assert not engine.read_state(name, 1).any()
    engine.close()


def test_a_state_that_is_not_updated_in_place_is_copied_back(built) -> None:
    frames = golden.load()["frames"][:20]
    results = []
    for copies in ((), ("layer0.key.present", "layer1.value.present")):
        with stand_in(built, copies=copies) as machine, load(built, precision="fp32") as session:
            stream = session.open_stream()
            results.append(np.stack([stream.step(frame)["pooled"] for frame in frames]))
            assert ("memcpy_dtod_async" in machine.names()) == bool(copies)
    np.testing.assert_array_equal(*results)


def test_captured_ranges_are_bounded(built, machine, monkeypatch) -> None:
    monkeypatch.setattr("framestep.runtime.engines.tensorrt.MOST_GRAPHS", 2)
    engine = engine_of(built)
    for first, stop in ((0, 1), (0, 2), (0, 3), (1, 2), (0, 1)):
        engine.run_range(first, stop)
    assert machine.graphs == 2 < MOST_GRAPHS
    engine.close()


def test_compiled_kernels_are_kept_beside_the_bundle_and_found_again(copied) -> None:
    kept = copied.parent / "golden.bundle.kernels"
    with stand_in(copied) as machine:
        for content in (None, b"kernels", b"of another version"):
            if content is not None:
                content = kept.read_bytes() if content == b"kernels" else content
                kept.write_bytes(content)
            machine.calls.clear()
            with load(copied) as session:
                session.open_stream().step(golden.load()["frames"][0])
            given = [arguments for name, arguments in machine.calls if name == "IRuntimeCache.deserialize"]
            assert given == ([] if content is None else [(content,)])
            contexts = machine.names().count("ICudaEngine.create_execution_context")
            assert machine.names().count("IRuntimeConfig.set_runtime_cache") == contexts > 0
            assert kept.read_bytes().startswith(b"kernels")
        kept.unlink()
        kept.mkdir()  # where it cannot be written nothing else is lost
        with load(copied) as session:
            session.open_stream().step(golden.load()["frames"][0])


def test_everything_is_given_back(built, machine) -> None:
    free = machine.free
    with load(built) as session:
        session.warm_up()
        assert machine.free < free and machine.graphs
    assert (machine.free, machine.graphs, machine.contexts, machine.memory) == (free, 0, 0, {})
    session = load(built)  # and where nobody closes it
    del session
    gc.collect()
    assert (machine.free, machine.memory) == (free, {})


def test_everything_is_given_back_at_exit(built) -> None:
    script = """
import sys, framestep
from framestep.benchmarks.gpu.stand_in import stand_in
context = stand_in(sys.argv[1])
machine = context.__enter__()
import atexit
atexit.register(lambda: print(len(machine.memory), "left"))  # runs last: it is registered before the engine's own
session = framestep.load(sys.argv[1], engine="tensorrt", streams=1)
session.warm_up()
print(len(machine.memory) > 0, "held")
"""
    command = [sys.executable, "-c", script, str(built)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert done.stdout.split() == ["True", "held", "0", "left"]


def test_sessions_in_several_threads_do_not_disturb_each_other(built, machine) -> None:
    # the stand-in has one stream for all, so they take turns; each pushes and pops its own context
    arrays = golden.load()
    turn = threading.Lock()
    found: dict[int, np.ndarray] = {}

    def follow(which: int) -> None:
        with load(built, streams=1, precision="fp32") as session, session.open_stream() as stream:
            results = []
            for frame in arrays["frames"][:20]:
                with turn:
                    results.append(stream.step(frame)["pooled"])
            found[which] = np.stack(results)

    threads = [threading.Thread(target=follow, args=(which,)) for which in range(2)]
    with turn:
        pass
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in range(2):
        golden.assert_close(found[which], arrays["window_pooler_output"][:20])
    assert machine.contexts == 0


@pytest.mark.parametrize("broken", [1, CAPTURES])
def test_a_capture_that_another_library_broke_is_made_again(built, machine, monkeypatch, broken) -> None:
    driver = sys.modules["cuda.bindings.driver"]
    end, ends = driver.cuStreamEndCapture, []

    def end_capture(stream):
        ends.append(end(stream))
        invalid = types.SimpleNamespace(name="CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"), None
        return invalid if len(ends) <= broken else ends[-1]

    monkeypatch.setattr(driver, "cuStreamEndCapture", end_capture)
    engine = engine_of(built)
    if broken < CAPTURES:
        engine.run_range(0, 1)
    else:
        with pytest.raises(EngineError, match="CAPTURE_INVALIDATED"):
            engine.run_range(0, 1)
    assert len(ends) == min(broken + 1, CAPTURES) and machine.graphs == (broken < CAPTURES)
    engine.close()


def test_nothing_is_loaded_while_another_thread_captures(built, machine, monkeypatch) -> None:
    capture, loaded = CudaDriver.capture, []
    other = threading.Thread(target=lambda: loaded.append(engine_of(built)))

    def captured(driver, work):
        before = machine.names().count("Runtime")
        other.start()
        other.join(0.2)
        assert machine.names().count("Runtime") == before
        return capture(driver, work)

    monkeypatch.setattr(CudaDriver, "capture", captured)
    engine = engine_of(built)
    engine.run_range(0, 1)
    other.join()
    for made in (engine, *loaded):
        made.close()
    assert len(loaded) == 1


# Bad input


def edit(path: Path, **changes) -> None:
    """Change what the manifest says of every engine."""
    file = path / "manifest.json"
    values = json.loads(file.read_text())
    for entry in values["engines"].values():
        entry.update(changes)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "1.6.0"}, r"was built by tensorrt_rtx 1\.6\.0, and here is \d"),
        (
            {"compute_capabilities": ["8.9", "9.0+"]},
            r"was built for compute capability 8\.9, 9\.0\+, and this GPU has 8\.6",
        ),
        ({"source": "0" * 64}, "was built from another graph"),
        ({"precision": "fp16+int8"}, r"is fp16\+int8, not fp32"),
        ({"streams": 1}, "takes at most 1 stream, and 3 are asked for"),
        ({"flavour": "tensorrt"}, "was built by tensorrt, and here is tensorrt_rtx"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_with_the_reason_and_the_command(copied, changes, message) -> None:
    edit(copied, **changes)
    with stand_in(copied), pytest.raises(EngineError, match=message) as error:
        engine_of(copied)
    assert f"run 'framestep build {copied} --precision fp32 --streams 3'" in str(error.value)


def test_an_engine_for_later_versions_runs_on_them_alone(copied, monkeypatch) -> None:
    edit(copied, version_compatible=True, version="1.2.0")
    with stand_in(copied):
        engine_of(copied).close()
    edit(copied, version="2.0.0")
    with stand_in(copied), pytest.raises(EngineError, match=r"built by tensorrt_rtx 2\.0\.0"):
        engine_of(copied)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"expected \d+ bytes, found \d+; run 'framestep build"),
        (lambda file: file.write_bytes(bytes(file.stat().st_size)), "its content has changed; run 'framestep build"),
        (lambda file: file.unlink(), "missing; run 'framestep build"),
        (
            lambda file: (file.rename(file.parent.parent.parent / "x"), file.symlink_to("../../x")),
            "leaves the bundle through a link",
        ),
    ],
)
def test_a_damaged_engine_is_refused_and_the_bundle_still_runs(copied, damage, message) -> None:
    entries = Bundle.open(copied).manifest.engines
    name = next(name for name, entry in entries.items() if (entry.graph, entry.precision) == ("backbone", "fp32"))
    damage(copied / name)
    with stand_in(copied), pytest.raises(EngineError, match=message):
        engine_of(copied)
    with framestep.load(copied, engine="onnxruntime", device="cpu") as session:
        session.open_stream().step(golden.load()["frames"][0])


def test_a_bundle_without_engines_says_how_to_build_one(golden_bundle) -> None:
    with (
        stand_in(golden_bundle),
        pytest.raises(EngineError, match=r"has no TensorRT engine .*; run 'framestep build .* --precision fp32'"),
    ):
        framestep.load(golden_bundle, engine="tensorrt")


def test_an_engine_that_the_runtime_refuses(copied, machine) -> None:
    with stand_in(copied) as machine:
        machine.bundle = replace(machine.bundle, path=copied)
        file = copied / "manifest.json"
        before = file.read_text()
        bundle = Bundle.open(copied)
        flat = replace(bundle, manifest=bundle.manifest.at("fp32"))
        file.write_text(json.dumps({**json.loads(before), "engines": {}}))  # the stand-in knows it no more
        with pytest.raises(EngineError, match=r"engine: tensorrt_rtx cannot load it: it gave no reason"):
            TensorRtEngine(flat, ["backbone"], ["pooled"], 1)
        machine.free = 1 << 10
        with pytest.raises(EngineError, match=r"\(\d+ bytes of engine, 1024 bytes free on the GPU\)"):
            TensorRtEngine(flat, ["backbone"], ["pooled"], 1)


def test_too_little_memory_says_how_much_was_needed_and_free(built) -> None:
    with stand_in(built, free=40_000) as machine:
        with pytest.raises(
            EngineError,
            match=r"no memory on the GPU for the state 'layer0\.key': \d+ bytes are needed and \d+ are free; load fewer",
        ):
            engine_of(built)
        assert machine.memory == {} and machine.contexts == 0


@pytest.mark.parametrize(
    ("call", "message"), [("create_execution_context", "made no context"), ("infer_shapes", "refused the shapes")]
)
def test_a_context_that_tensorrt_does_not_make_is_one_line(built, machine, monkeypatch, call, message) -> None:
    kind = stand_in_engine._Engine if call == "create_execution_context" else stand_in_engine._Context

    def refuse(*given):
        if call == "infer_shapes":
            raise RuntimeError("inferShapes failed")

    monkeypatch.setattr(kind, call, refuse)
    with load(built) as session, pytest.raises(EngineError, match=message):
        session.open_stream().step(golden.load()["frames"][0])


def test_the_stream_waits_for_no_other(built, machine) -> None:
    with load(built) as session:
        session.warm_up()
    assert ("Stream", (NON_BLOCKING,)) in machine.calls and ("Stream", ()) not in machine.calls


def test_a_lost_device_is_one_line_and_closing_still_works(built, machine) -> None:
    with load(built) as session:
        stream = session.open_stream()
        stream.step(golden.load()["frames"][0])
        machine.lost = True
        for _ in range(2):
            with pytest.raises(
                EngineError, match=r"the GPU failed or was lost \(.* illegal memory access.*\); close the session"
            ):
                stream.step(golden.load()["frames"][0])


def test_without_a_gpu_or_a_package_it_is_one_line(built, monkeypatch) -> None:
    with pytest.raises(EngineError, match="needs an NVIDIA GPU"):
        framestep.load(built, engine="tensorrt", device="cpu")
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(EngineError, match=r"needs pycuda and cuda-bindings .*pip install 'framestep\[tensorrt\]'"):
        framestep.load(built, engine="tensorrt")
    with stand_in(built) as machine:
        machine.lost = True
        with pytest.raises(EngineError, match="there is no NVIDIA GPU here"):
            framestep.load(built, engine="tensorrt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match="TensorRT is not installed: pip install tensorrt-rtx"):
        framestep.load(built, engine="tensorrt")


def test_auto_takes_an_engine_that_was_built_for_this_gpu(built) -> None:
    with stand_in(built), framestep.load(built, streams=1) as session:
        assert session.engine_choice.startswith("tensorrt on cuda, tensorrt_rtx")
        assert session.engine_choice.endswith("(the bundle has an engine for this GPU), fp16")
    with stand_in(built, compute_capability=(12, 0)), framestep.load(built, streams=1) as session:
        assert session.engine_choice.startswith("onnxruntime")
    with framestep.load(built, streams=1) as session:
        assert session.engine_choice.startswith("onnxruntime")


# The calls against the real bindings

# of pycuda 2026.1, as its own help tells: least and most arguments beside self
PYCUDA = {
    "init": (0, 1),
    "Device": (1, 1),
    "Device.retain_primary_context": (0, 0),
    "Context.push": (0, 0),
    "Context.pop": (0, 0),
    "Stream": (0, 1),
    "Stream.synchronize": (0, 0),
    "mem_alloc": (1, 1),
    "mem_get_info": (0, 0),
    "DeviceAllocation.free": (0, 0),
    "pagelocked_empty": (2, 4),
    "memcpy_htod_async": (2, 3),
    "memcpy_dtoh_async": (2, 3),
    "memcpy_dtod_async": (3, 4),
    "memset_d8_async": (3, 4),
}


@pytest.fixture(scope="module")
def calls(built) -> dict[str, int]:
    """Every call that a session's life makes, with its number of arguments."""
    made = {}
    with stand_in(built, copies=("layer0.key.present",)) as machine:
        with load(built) as session:
            session.warm_up()
        with load(built) as session:  # which finds what the first one compiled
            session.warm_up()
            stream = session.open_stream()
            stream.step(golden.load()["frames"][0])
            name = session._engine.state_names()[0]
            session._engine.write_state(name, 0, session._engine.read_state(name, 0))
        made.update({name: len(arguments) for name, arguments in machine.calls})
    return made


def test_pycuda_is_called_with_arguments_that_it_takes(calls) -> None:
    ours = {name for name in calls if name in PYCUDA}
    assert ours >= {"Device", "mem_alloc", "pagelocked_empty", "memcpy_dtod_async", "Stream.synchronize"}
    for name in ours:
        least, most = PYCUDA[name]
        assert least <= calls[name] <= most, name


def test_cuda_bindings_is_called_with_arguments_that_it_takes(calls) -> None:
    driver = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    ours = [name for name in calls if name.startswith("cu")]
    assert len(ours) == 6
    for name in ours:
        assert len(inspect.signature(getattr(driver, name)).parameters) == calls[name], name
    assert driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL is not None
    assert driver.CUresult.CUDA_SUCCESS == 0
    assert driver.CUstream(7) is not None


def test_tensorrt_is_called_with_arguments_that_it_takes(calls) -> None:
    ours = [name for name in calls if name not in PYCUDA and not name.startswith("cu")]
    assert "IExecutionContext.execute_async_v3" in ours and "Runtime.deserialize_cuda_engine" in ours
    for name in ours:
        kind, _, method = name.partition(".")
        text = getattr(getattr(trt, kind), method or "__init__").__doc__
        forms = re.findall(rf"{method or '__init__'}\((self: .*?)\) ->", text)
        counts = [
            (len(parts), sum("=" in part for part in parts))
            for form in forms
            for parts in [re.split(r",\s*(?=\w+:)", form)]
        ]
        assert any(most - 1 - optional <= calls[name] <= most - 1 for most, optional in counts), (name, forms)
    for name in (
        "num_io_tensors",
        "device_memory_size_v2",
        "num_layers",
        "get_aliased_input_tensor",
        "get_tensor_name",
    ):
        assert hasattr(trt.ICudaEngine, name)
    for name in (
        "dynamic_shapes_kernel_specialization_strategy",
        "cuda_graph_strategy",
        "set_execution_context_allocation_strategy",
    ):
        assert hasattr(trt.IRuntimeConfig, name)
    assert hasattr(trt.Runtime, "engine_host_code_allowed")
