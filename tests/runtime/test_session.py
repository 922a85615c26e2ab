"""Sessions and streams against the golden outputs of the reference implementation."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import golden
import numpy as np
import pytest

import framestep
from framestep.runtime import library
from framestep.runtime.bundle import Bundle
from framestep.runtime.engines import onnxruntime
from framestep.runtime.errors import BundleError, EngineError, FrameError, OutputError, StateError
from framestep.runtime.session import Session


def follow(stream, frames, outputs=("features", "pooled")) -> dict[str, np.ndarray]:
    results = [stream.step(frame) for frame in frames]
    return {name: np.stack([result[name] for result in results]) for name in outputs}


def assert_golden(found, arrays, prefix="window_", frames=slice(None)) -> None:
    golden.assert_close(found["features"], arrays[f"{prefix}last_hidden_state"][frames])
    golden.assert_close(found["pooled"], arrays[f"{prefix}pooler_output"][frames])


def test_every_frame_remembers_all_before(long_golden_bundle):
    arrays = golden.load()
    with framestep.load(long_golden_bundle) as session, session.open_stream() as stream:
        assert_golden(follow(stream, arrays["frames"]), arrays, prefix="")


def test_a_window_forgets_what_is_older(golden_bundle):
    arrays = golden.load()
    with framestep.load(golden_bundle) as session, session.open_stream() as stream:
        assert_golden(follow(stream, arrays["frames"]), arrays)


def test_interleaved_streams_keep_their_own_clocks(golden_bundle):
    arrays = golden.load()
    frames = arrays["frames"]
    with framestep.load(golden_bundle, streams=3) as session:
        streams = [session.open_stream() for _ in range(3)]
        found = {stream: [] for stream in streams}
        generator = np.random.default_rng(5)
        while any(len(results) < 40 for results in found.values()):
            # any subset, so that idle streams lie before, between and after the stepped ones
            chosen = [s for s in streams if len(found[s]) < 40 and generator.random() < 0.6]
            results = session.step({stream: frames[len(found[stream])] for stream in chosen})
            for stream, result in results.items():
                assert result.position == len(found[stream])
                found[stream].append(result)
        for results in found.values():
            for name, key in (("features", "last_hidden_state"), ("pooled", "pooler_output")):
                golden.assert_close(np.stack([r[name] for r in results]), arrays[f"window_{key}"])


def test_an_output_that_was_not_fetched_names_those_that_were(golden_bundle):
    with framestep.load(golden_bundle, outputs=("pooled",)) as session, session.open_stream() as stream:
        result = stream.step(golden.load()["frames"][0])
    with pytest.raises(KeyError, match="features: fetched were pooled"):
        result["features"]
    assert result.get("features") is None


def test_batched_streams_do_not_see_each_other(golden_bundle):
    frames = golden.load()["frames"]
    other = np.random.default_rng(0).integers(0, 256, frames.shape, np.uint8)
    with framestep.load(golden_bundle, streams=2) as session:
        first, second = session.open_stream(), session.open_stream()
        alone = [first.step(frame)["pooled"] for frame in frames]
        first.reset()
        together = [session.step({first: a, second: b})[first]["pooled"] for a, b in zip(frames, other, strict=True)]
    golden.assert_close(np.stack(together), np.stack(alone), 1e-5)


def test_streams_that_threads_of_their_own_step_do_not_disturb_each_other(golden_bundle):
    arrays = golden.load()
    with framestep.load(golden_bundle, streams=3) as session, ThreadPoolExecutor(3) as pool:
        streams = [session.open_stream() for _ in range(3)]
        for found in pool.map(lambda stream: follow(stream, arrays["frames"]), streams):
            assert_golden(found, arrays)


def test_reset_forgets_the_history(golden_bundle):
    arrays = golden.load()
    with framestep.load(golden_bundle) as session, session.open_stream() as stream:
        follow(stream, arrays["frames"][::-1][:23])
        stream.reset()
        assert stream.position == 0
        assert_golden(follow(stream, arrays["frames"]), arrays)


def test_a_new_stream_in_a_used_slot_starts_fresh(golden_bundle):
    arrays = golden.load()
    with framestep.load(golden_bundle) as session:
        with session.open_stream() as stream:
            follow(stream, arrays["frames"][::-1])
        with session.open_stream() as stream:
            assert_golden(follow(stream, arrays["frames"]), arrays)


@pytest.mark.parametrize("pause", [7, 16, 29])
def test_a_saved_state_continues_in_another_session(golden_bundle, tmp_path, pause):
    arrays = golden.load()
    with framestep.load(golden_bundle) as session, session.open_stream() as stream:
        follow(stream, arrays["frames"][:pause])
        stream.save_state(tmp_path / "state")
    with framestep.load(golden_bundle, streams=2) as session:
        session.open_stream().step(arrays["frames"][3])
        with session.open_stream() as stream:
            stream.load_state(tmp_path / "state")
            assert stream.position == pause
            assert_golden(follow(stream, arrays["frames"][pause:]), arrays, frames=slice(pause, None))


def test_a_saved_state_is_an_ordinary_safetensors_file(golden_bundle, tmp_path):
    from safetensors.numpy import load_file

    with framestep.load(golden_bundle) as session, session.open_stream() as stream:
        stream.step(golden.load()["frames"][0])
        stream.save_state(tmp_path / "state")
        tensors = load_file(tmp_path / "state")
        assert tensors["layer0.key"].shape == (64, 16, 24)
        assert np.array_equal(tensors["layer2.value"], session._engine.read_state("layer2.value", 0))


def test_a_state_of_another_model_or_a_damaged_one_is_refused_and_nothing_is_lost(
    golden_bundle, long_golden_bundle, tmp_path
):
    arrays = golden.load()
    with framestep.load(long_golden_bundle) as session, session.open_stream() as stream:
        stream.step(arrays["frames"][0])
        stream.save_state(tmp_path / "other")
    with framestep.load(golden_bundle) as session, session.open_stream() as stream:
        follow(stream, arrays["frames"][:20])
        stream.save_state(tmp_path / "state")
        content = (tmp_path / "state").read_bytes()
        (tmp_path / "short").write_bytes(content[:-100])
        (tmp_path / "text").write_text("no state at all")
        (tmp_path / "empty").write_bytes(b"")
        for name, message in (
            ("other", "was saved by another model, precision or window"),
            ("short", "damaged or truncated, expected"),
            ("text", "damaged, or not a framestep state file"),
            ("empty", "damaged, or not a framestep state file"),
            ("absent", "cannot be read: No such file"),
        ):
            with pytest.raises(StateError, match=f"{name}: {message}"):
                stream.load_state(tmp_path / name)
        assert_golden(follow(stream, arrays["frames"][20:]), arrays, frames=slice(20, None))


def test_a_state_that_cannot_be_written_is_an_output_error(golden_bundle, tmp_path):
    with framestep.load(golden_bundle) as session, session.open_stream() as stream:
        with pytest.raises(OutputError, match="nowhere"):
            stream.save_state(tmp_path / "nowhere" / "state")


def test_the_cache_stays_where_it_is_and_is_never_copied(golden_bundle, tmp_path):
    code = f"""
import numpy as np, framestep
frames = np.load({str(golden.CHECKPOINT / "golden.npz")!r})["frames"]
session = framestep.load({str(golden_bundle)!r}, streams=3)
streams = [session.open_stream() for _ in range(3)]
names = session._engine.state_names()
addresses = [session._engine.state_address(name) for name in names]
assert len(names) == 6, names
for frame in frames:
    session.step({{streams[0]: frame}})
    session.step({{streams[1]: frame, streams[2]: frame}})
    before = session._engine.read_state("layer0.key", 0)
    session.step({{streams[0]: frame}})
    after = session._engine.read_state("layer0.key", 0)
    changed = np.flatnonzero((before != after).any(axis=(0, 2)))
    assert len(changed) <= 1, changed  # one slot of the ring, the rest untouched
assert addresses == [session._engine.state_address(name) for name in names]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "in-place optimization not activated" not in done.stderr
    assert done.stderr == ""


def test_a_non_finite_output_zeroes_that_stream_only(golden_bundle):
    arrays = golden.load()
    frames = arrays["frames"]
    with framestep.load(golden_bundle, streams=2) as session:
        sick, well = session.open_stream(), session.open_stream()
        for frame in frames[:5]:
            session.step({sick: frame, well: frame})
        poisoned = session._engine.read_state("layer1.value", sick.slot)
        poisoned[:, 2] = np.nan
        session._engine.write_state("layer1.value", sick.slot, poisoned)
        with pytest.raises(framestep.NonFiniteOutputError, match="stream 0: .* NaN or infinity") as error:
            session.step({sick: frames[5], well: frames[5]})
        assert error.value.streams == (sick,)
        golden.assert_close(error.value.results[well]["pooled"], arrays["window_pooler_output"][5])
        assert sick.position == 0
        assert well.position == 6
        for name in session._engine.state_names():
            assert not session._engine.read_state(name, sick.slot).any()
        assert_golden(follow(sick, frames), arrays)


def test_frames_of_another_size_are_resized(golden_bundle):
    with framestep.load(golden_bundle) as session, session.open_stream() as stream:
        for shape in ((720, 1280, 3), (64, 64, 3), (10, 300, 3)):
            result = stream.step(np.full(shape, 90, np.uint8))
            assert result["features"].shape == (16, 96)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((64, 64), np.uint8), "found grey"),
        (np.zeros((64, 64, 1), np.uint8), "found grey"),
        (np.zeros((64, 64, 4), np.uint8), "drop the alpha channel"),
        (np.zeros((64, 64, 3), np.float32), "found float32"),
        (np.zeros((0, 64, 3), np.uint8), "at least one pixel"),
        (np.zeros((2, 64, 64, 3), np.uint8), "expected shape"),
        (np.zeros(64, np.uint8), r"expected shape \[height, width, 3\], found \[64\]"),
        (np.zeros((3, 64, 64), np.uint8), r"found \[3, 64, 64\]; put the channels last: frame.transpose\(1, 2, 0\)"),
        (
            np.ones((64, 64, 3), np.float32),
            r"found float32; convert with \(frame \* 255\).round\(\).astype\(np.uint8\)",
        ),
        (np.full((64, 64, 3), 255.0), r"found float64; convert with frame.astype\(np.uint8\)"),
        (SimpleNamespace(rgb=np.zeros((64, 64, 3), np.uint8)), "found SimpleNamespace; pass its .rgb"),
        ([[1, 2, 3]], "found list"),
        (None, "found NoneType"),
    ],
)
def test_a_bad_frame_is_named_and_no_stream_advances(golden_bundle, frame, message):
    good = golden.load()["frames"][0]
    with framestep.load(golden_bundle, streams=2) as session:
        first, second = session.open_stream(), session.open_stream()
        with pytest.raises(FrameError, match=message):
            session.step({first: good, second: frame})
        assert first.position == second.position == 0


def test_results_are_copies(golden_bundle):
    frames = golden.load()["frames"]
    with framestep.load(golden_bundle) as session, session.open_stream() as stream:
        first = stream.step(frames[0])
        kept = first["pooled"].copy()
        stream.step(frames[1])
        assert np.array_equal(first["pooled"], kept)
        assert list(first) == ["features", "pooled"]
        assert len(first) == 2
        assert first.latency_ms > 0
        assert "position=0" in repr(first) and "features [16, 96], pooled [96]" in repr(first)


def test_only_asked_outputs_are_fetched(golden_bundle):
    with framestep.load(golden_bundle, outputs=["pooled"]) as session, session.open_stream() as stream:
        assert list(stream.step(golden.load()["frames"][0])) == ["pooled"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "magic"}, "engine 'magic' is unknown; expected auto, onnxruntime"),
        ({"device": "tpu"}, "device 'tpu' is unknown"),
        ({"outputs": ["colour"]}, "outputs: 'colour' is unknown; this bundle has features, pooled"),
        ({"outputs": ["scores"]}, "outputs: 'scores' needs labels"),
        ({"outputs": []}, "outputs: expected at least one"),
        ({"streams": 0}, "streams: expected at least 1"),
        ({"threads": 0}, "threads: expected 1 to"),
        ({"threads": 10_000}, "threads: expected 1 to .* found 10000"),
        ({"outputs": "pooled"}, "outputs: expected a list of names, found the text 'pooled'"),
    ],
)
def test_bad_options_are_named(golden_bundle, options, message):
    with pytest.raises(EngineError, match=message):
        framestep.load(golden_bundle, **options)


def test_a_bundle_without_a_text_graph_keeps_its_labels():
    with framestep.load(Path(__file__).parents[1] / "data" / "steps.bundle") as session:
        with pytest.raises(
            BundleError, match="has no text graph; export it with --text-graph, or use 'framestep label'"
        ):
            session.set_labels(["a cat"])
        assert session.labels == ("a", "b", "c")


def test_after_warm_up_a_step_parses_no_c_declaration(golden_bundle, monkeypatch):
    fresh = library.Library(library.HEADER, library.LIBRARY)  # parses each name of a type once, for milliseconds
    monkeypatch.setattr(onnxruntime, "library", lambda: fresh)
    with framestep.load(golden_bundle) as session, session.open_stream() as stream:
        session.warm_up()
        parsed = set(fresh.ffi._parsed_types)
        stream.step(np.zeros((48, 64, 3), np.uint8))
        assert set(fresh.ffi._parsed_types) == parsed


def test_without_a_gpu_auto_takes_the_cpu(golden_bundle):
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU here")
    with framestep.load(golden_bundle) as session:
        assert "on cpu" in session.engine_choice
    with pytest.raises(EngineError, match="device 'cuda' is not available"):
        framestep.load(golden_bundle, device="cuda")


def test_a_copy_of_the_cache_would_be_logged(golden_bundle, tmp_path):
    """The warning that the tests above look for does appear where an update cannot be done in place."""
    code = f"""
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession({str(golden_bundle / "backbone.onnx")!r}, providers=["CPUExecutionProvider"])
feed = {{port.name: np.zeros([1 if n == "S" else n for n in port.shape], {{"tensor(uint8)": "uint8",
        "tensor(int64)": "int64"}}.get(port.type, "float32")) for port in session.get_inputs()}}
session.run(None, feed)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "in-place optimization not activated" in done.stderr


@pytest.mark.parametrize("position", [10**25, 2**63 - 1, -1])
def test_a_state_with_an_impossible_position_is_refused_and_nothing_changes(golden_bundle, tmp_path, position):
    frames = golden.load()["frames"]
    with framestep.load(golden_bundle) as session, session.open_stream() as stream:
        follow(stream, frames[:3])
        stream.save_state(tmp_path / "state")
        content = (tmp_path / "state").read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + length].replace(b'"position": "3"', f'"position": "{position}"'.encode())
        (tmp_path / "state").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
        stream.step(frames[3])
        before = session._engine.read_state("layer0.key", 0)
        with pytest.raises(StateError, match="its position is"):
            stream.load_state(tmp_path / "state")
        assert np.array_equal(session._engine.read_state("layer0.key", 0), before)
        assert stream.position == 4


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_state_that_holds_nan_or_infinity_is_refused_and_nothing_changes(golden_bundle, tmp_path, number):
    frames = golden.load()["frames"]
    with framestep.load(golden_bundle) as session, session.open_stream() as stream:
        follow(stream, frames[:3])
        stream.save_state(tmp_path / "state")
        content = (tmp_path / "state").read_bytes()
        (tmp_path / "state").write_bytes(content[:-4] + np.float32(number).tobytes())
        stream.step(frames[3])
        before = [session._engine.read_state(name, 0) for name in session._engine.state_names()]
        with pytest.raises(StateError, match="NaN or infinity in 'layer2.value'"):
            stream.load_state(tmp_path / "state")
        after = [session._engine.read_state(name, 0) for name in session._engine.state_names()]
        assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))
        assert stream.position == 4


def test_closed_and_foreign_streams_are_refused(golden_bundle, tmp_path):
    frame = golden.load()["frames"][0]
    actions = (
        lambda stream: stream.step(frame),
        lambda stream: stream.prime([frame]),
        lambda stream: stream.position,
        lambda stream: stream.reset(),
        lambda stream: stream.save_state(tmp_path / "state"),
        lambda stream: stream.load_state(tmp_path / "state"),
        lambda stream: stream.run("backbone", {}),
    )
    with framestep.load(golden_bundle) as session, framestep.load(golden_bundle) as other:
        stream = session.open_stream()
        with pytest.raises(EngineError, match=r"every stream of this session is open \(1\)"):
            session.open_stream()
        with pytest.raises(EngineError, match="belongs to another session"):
            other.step({stream: frame})
        stream.save_state(tmp_path / "state")
        stream.close()
        for action in actions:
            with pytest.raises(EngineError, match="this stream is closed"):
                action(stream)
        last = session.open_stream()
        stream.close()  # for the second time: the place is another stream's now
        assert last.step(frame).position == 0
        session.close()
        session.close()
        for action in (*actions, lambda _: session.open_stream(), lambda _: session.warm_up()):
            with pytest.raises(EngineError, match="this session is closed"):
                action(last)


def test_the_runtime_needs_neither_torch_nor_onnx_nor_opencv(golden_bundle, tmp_path):
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "transformers", "cv2", "typer", "rich", "safetensors"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import numpy as np, framestep
session = framestep.load({str(golden_bundle)!r})
stream = session.open_stream()
stream.step(np.zeros((100, 200, 3), np.uint8))
stream.save_state("state")
stream.load_state("state")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_golden_data_is_what_the_shared_folder_holds():
    shared = Path(__file__).parents[3] / "shared" / "goldens" / "streamformer-tiny" / "golden.npz"
    if not shared.exists():
        pytest.skip("the shared folder is not beside this checkout")
    assert shared.read_bytes() == (golden.CHECKPOINT / "golden.npz").read_bytes()


def test_a_bundle_that_is_not_finished_is_stepped_and_its_states_are_not_kept(tmp_path):
    whole = Bundle.open(Path(__file__).parents[1] / "data" / "steps.bundle")
    bundle = replace(whole, manifest=replace(whole.manifest.at("fp32"), files={}))
    with Session(bundle) as session, session.open_stream() as stream:
        assert np.isfinite(stream.step(np.zeros((64, 64, 3), np.uint8))["pooled"]).all()
        with pytest.raises(StateError, match="its manifest does not list its files"):
            stream.save_state(tmp_path / "a.state")
