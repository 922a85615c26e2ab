"""The native library through its C functions: recorded results, ownership, threads, and every kind of bad input."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import golden
import numpy as np
import pytest
from native_parts import cpu_has, cpu_multiplies_integers

import framestep
from framestep.runtime.bundle import Bundle
from framestep.runtime.engines.onnxruntime import available_devices, shared_library
from framestep.runtime.errors import EngineError
from framestep.runtime.library import HEADER, LIBRARY, Library, library

DATA = Path(__file__).parents[1] / "data"
BUNDLE = DATA / "steps.bundle"
OUTPUTS = ("features", "pooled", "scores", "patch_scores")
TOLERANCE = 1e-6


class Native:
    """Calls the C functions; `status` is the last one's, by name."""

    def __init__(self) -> None:
        self.library = library()
        self.ffi, self.c = self.library.ffi, self.library.functions

    def name(self, status: int) -> str:
        return self.library.text(self.c.fs_status_name(status))

    def error(self) -> str:
        return self.library.text(self.c.fs_last_error())

    def options(self, **values: Any) -> Any:
        made = self.library.new("fs_session_options")
        self._kept = [made]
        for key, value in {"library": shared_library(), **values}.items():
            if key == "outputs":
                texts = [self.ffi.new("char[]", name.encode()) for name in value]
                made.output_count = len(texts)
                value = self.ffi.new("char *[]", texts)
                self._kept += [texts, value]
            elif isinstance(value, str):
                value = self.ffi.new("char[]", value.encode())
                self._kept.append(value)
            setattr(made, key, value)
        return made

    def try_open(self, bundle: Path, **values: Any) -> tuple[str, int]:
        handle = self.ffi.new("fs_session *")
        status = self.c.fs_session_open(str(bundle).encode(), self.options(**values), handle)
        return self.name(status), int(handle[0])

    def open(self, bundle: Path = BUNDLE, **values: Any) -> int:
        status, handle = self.try_open(bundle, **values)
        assert status == "FS_OK", self.error()
        return handle

    def stream(self, session: int) -> int:
        handle = self.ffi.new("fs_stream *")
        assert self.c.fs_stream_open(session, handle) == 0, self.error()
        return int(handle[0])

    def frames(self, *pairs: tuple[int, np.ndarray]) -> Any:
        made = self.ffi.new("fs_frame[]", len(pairs))
        for frame, (stream, rgb) in zip(made, pairs, strict=True):
            frame.struct_size, frame.stream = self.ffi.sizeof("fs_frame"), stream
            frame.data = self.ffi.cast("uint8_t *", rgb.ctypes.data)
            frame.height, frame.width, frame.stride = rgb.shape[0], rgb.shape[1], rgb.strides[0]
        return made

    def step(self, session: int, *pairs: tuple[int, np.ndarray]) -> str:
        return self.name(self.c.fs_step(session, self.frames(*pairs), len(pairs)))

    def output(self, stream: int, index: int) -> np.ndarray:
        tensor = self.library.new("fs_tensor")
        assert self.c.fs_output(stream, index, tensor) == 0, self.error()
        array = np.frombuffer(self.ffi.buffer(tensor.data, tensor.bytes), np.float32)
        return array.reshape(tuple(tensor.shape[0 : tensor.rank]))

    def generation(self, stream: int) -> int:
        tensor = self.library.new("fs_tensor")
        assert self.c.fs_output(stream, 0, tensor) == 0, self.error()
        return int(tensor.generation)

    def position(self, stream: int) -> int:
        found = self.ffi.new("int64_t *")
        assert self.c.fs_position(stream, found) == 0, self.error()
        return int(found[0])


@pytest.fixture
def native():
    return Native()


@pytest.fixture
def session(native):
    handle = native.open(streams=3, outputs=OUTPUTS, precision="fp32")
    yield handle
    native.c.fs_session_close(handle)


@pytest.fixture(scope="module")
def golden_frames() -> np.ndarray:
    with np.load(DATA / "streamformer-tiny" / "golden.npz") as arrays:
        return arrays["frames"]


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    with np.load(DATA / "steps.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


engines_recorded = pytest.mark.parametrize(("engine", "precision", "tolerance"), golden.RECORDED_STEPS)


def assert_recorded(
    found: dict[str, np.ndarray], recorded: dict[str, np.ndarray], precision: str, row: int, tolerance: float
) -> None:
    for name in OUTPUTS:
        array = found[name][::5] if name == "features" else found[name]
        assert float(np.abs(array - recorded[f"{precision}_{name}"][row]).max()) <= tolerance


@engines_recorded
def test_c_gives_what_was_recorded(native, golden_frames, recorded, engine, precision, tolerance):
    session = native.open(streams=3, outputs=OUTPUTS, precision=precision, engine=engine)
    streams = [native.stream(session) for _ in range(3)]
    row = 0
    for advance in recorded["advance"]:
        chosen = [slot for slot in range(3) if advance[slot]]
        positions = {slot: native.position(streams[slot]) for slot in chosen}
        pairs = [(streams[slot], golden_frames[(7 * slot + positions[slot]) % 40]) for slot in chosen]
        assert native.step(session, *pairs) == "FS_OK"
        for slot in chosen:
            assert [slot, positions[slot]] == recorded["streams_and_positions"][row].tolist()
            outputs = {name: native.output(streams[slot], index) for index, name in enumerate(OUTPUTS)}
            assert_recorded(outputs, recorded, precision, row, tolerance)
            row += 1
    assert row == len(recorded["streams_and_positions"])
    assert native.c.fs_session_close(session) == 0


@engines_recorded
def test_python_gives_what_was_recorded(golden_frames, recorded, engine, precision, tolerance):
    row = 0
    with framestep.load(BUNDLE, engine=engine, streams=3, outputs=OUTPUTS, precision=precision) as session:
        streams = [session.open_stream() for _ in range(3)]
        for advance in recorded["advance"]:
            chosen = [stream for stream, go in zip(streams, advance, strict=True) if go]
            results = session.step({s: golden_frames[(7 * s.slot + s.position) % 40] for s in chosen})
            for stream in chosen:
                assert results[stream].position == recorded["streams_and_positions"][row][1]
                assert_recorded(dict(results[stream]), recorded, precision, row, tolerance)
                row += 1


def test_the_session_describes_itself(native, session):
    info = native.library.new("fs_session_info")
    assert native.c.fs_session_describe(session, info) == 0
    text = native.library.text
    bundle = Bundle.open(BUNDLE)
    assert (info.height, info.width, info.streams, info.outputs, info.labels) == (64, 64, 3, 4, 3)
    assert (text(info.engine), text(info.device), text(info.precision)) == ("onnxruntime", "cpu", "fp32")
    flat = Bundle(bundle.path, bundle.manifest.at("fp32"))
    assert text(info.state_key) == flat.state_key()
    assert info.state_bytes == flat.bytes_per_stream()
    state = native.library.new("fs_state_info")
    assert native.c.fs_state_describe(session, 1, state) == 0
    declared = flat.manifest.states[1]
    assert text(state.name) == declared.name
    assert tuple(state.shape[0 : state.rank]) == declared.shape[1:]
    assert (state.axis + 1, state.capacity, state.bytes) == (declared.axis, 8, declared.bytes_per_stream())
    graph = native.library.new("fs_graph_info")
    names = []
    for index in range(info.graphs):
        assert native.c.fs_graph_describe(session, index, graph) == 0
        names.append(text(graph.name))
    assert names == ["backbone", "label", "patch_label"]
    label = native.ffi.new("char **")
    assert native.c.fs_label_name(session, 2, label) == 0
    assert text(label[0]) == "c"
    for describe in (native.c.fs_graph_describe, native.c.fs_state_describe, native.c.fs_output_describe):
        kind = {0: graph, 1: state, 2: native.library.new("fs_output_info")}
        out = kind[
            [native.c.fs_graph_describe, native.c.fs_state_describe, native.c.fs_output_describe].index(describe)
        ]
        assert native.name(describe(session, 99, out)) == "FS_ERROR_ARGUMENT"


@pytest.mark.parametrize("engine, rings", [("onnxruntime", 3), ("onnxruntime:plain", 0)])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_rings_and_products_are_run_by_operators_of_ours_unless_the_plain_engine_is_asked_for(
    native, engine, rings, precision
):
    session = native.open(outputs=OUTPUTS, precision=precision, engine=engine)
    graph, found = native.library.new("fs_graph_info"), []
    for index in range(3):
        assert native.c.fs_graph_describe(session, index, graph) == 0
        found.append(graph.own_operators)
    ours = cpu_has("avx512f") if precision == "fp32" else cpu_multiplies_integers()
    products = [36, 0, 4] if rings and ours else [0, 0, 0]
    assert found == [rings + products[0], *products[1:]]
    info = native.library.new("fs_session_info")
    assert native.c.fs_session_describe(session, info) == 0
    assert native.library.text(info.engine) == engine
    older, kept = native.library.new("fs_graph_info"), 77  # a program from before the last member
    older.struct_size, older.own_operators = native.ffi.offsetof("fs_graph_info", "own_operators"), kept
    assert native.c.fs_graph_describe(session, 0, older) == 0
    assert (native.library.text(older.name), older.own_operators) == ("backbone", kept)
    native.c.fs_session_close(session)


def test_symbols_and_struct_sizes_are_those_of_the_committed_list(native):
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    listed = subprocess.run(["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True).stdout
    symbols = sorted(line.split()[-1] for line in listed.splitlines())
    structs = sorted(name for name in native.ffi.list_types()[0] if name not in ("fs_session", "fs_stream"))
    sizes = [f"{name} {native.ffi.sizeof(name)}" for name in structs if native.ffi.typeof(name).kind == "struct"]
    assert "\n".join([*symbols, *sizes]) + "\n" == (DATA / "c_api.txt").read_text()


def test_the_header_is_c99_and_cxx():
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    for flags in (["-std=c99", "-xc"], ["-std=c++17", "-xc++"]):
        command = ["gcc", *flags, "-Wall", "-Wextra", "-pedantic", "-Werror", "-fsyntax-only", str(HEADER)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_handles_that_are_none_are_refused(native, session):
    stream = native.stream(session)
    rgb = np.zeros((64, 64, 3), np.uint8)
    out = native.library.new("fs_session_info")
    for bad in (0, 1, 2**64 - 1, stream, session + (1 << 32), session ^ (1 << 63)):
        assert native.name(native.c.fs_session_describe(bad, out)) == "FS_ERROR_HANDLE"
        assert native.name(native.c.fs_session_close(bad)) == "FS_ERROR_HANDLE"
        assert native.step(bad, (stream, rgb)) == "FS_ERROR_HANDLE"
    for bad in (0, 1, 2**64 - 1, session, stream + (1 << 32)):
        assert native.name(native.c.fs_reset(bad)) == "FS_ERROR_HANDLE"
        assert native.c.fs_output_valid(bad, 1) == 0
        assert native.step(session, (bad, rgb)) == "FS_ERROR_HANDLE"
    assert native.step(session, (stream, rgb)) == "FS_OK"


def test_closed_and_foreign_streams_are_refused_and_a_place_comes_back_fresh(native, session):
    rgb = np.zeros((64, 64, 3), np.uint8)
    first = native.stream(session)
    other = native.open(precision="fp32")
    foreign = native.stream(other)
    assert native.step(session, (first, rgb), (foreign, rgb)) == "FS_ERROR_HANDLE"
    assert native.position(first) == 0
    assert native.step(session, (first, rgb)) == "FS_OK"
    assert native.c.fs_stream_close(first) == 0
    assert native.name(native.c.fs_stream_close(first)) == "FS_ERROR_HANDLE"
    assert native.step(session, (first, rgb)) == "FS_ERROR_HANDLE"
    again = native.stream(session)
    assert again != first
    assert native.position(again) == 0
    tensor = native.library.new("fs_tensor")
    assert native.name(native.c.fs_output(again, 0, tensor)) == "FS_ERROR_STALE"
    full = native.ffi.new("fs_stream *")
    assert native.name(native.c.fs_stream_open(other, full)) == "FS_ERROR_ENGINE"
    assert "every stream of this session is open (1)" in native.error()
    assert native.c.fs_session_close(other) == 0
    assert native.name(native.c.fs_reset(foreign)) == "FS_ERROR_HANDLE"
    assert native.name(native.c.fs_session_close(other)) == "FS_ERROR_HANDLE"


def test_null_pointers_are_refused(native, session):
    c, null = native.c, native.ffi.NULL
    stream = native.stream(session)
    handle = native.ffi.new("fs_session *")
    calls = [
        lambda: c.fs_session_open(null, null, handle),
        lambda: c.fs_session_open(b"x", null, null),
        lambda: c.fs_session_describe(session, null),
        lambda: c.fs_graph_describe(session, 0, null),
        lambda: c.fs_state_describe(session, 0, null),
        lambda: c.fs_output_describe(session, 0, null),
        lambda: c.fs_label_name(session, 0, null),
        lambda: c.fs_set_labels(session, null),
        lambda: c.fs_stream_open(session, null),
        lambda: c.fs_step(session, null, 1),
        lambda: c.fs_output(stream, 0, null),
        lambda: c.fs_position(stream, null),
        lambda: c.fs_state_read(stream, 0, null, 1),
        lambda: c.fs_state_write(stream, 0, null, 1),
        lambda: c.fs_state_save(stream, null),
        lambda: c.fs_state_load(stream, null),
        lambda: c.fs_stats_read(stream, null),
        lambda: c.fs_device_available(null, null, null),
    ]
    for call in calls:
        assert native.name(call()) == "FS_ERROR_ARGUMENT"
        assert native.error().endswith("is null")


def test_structs_of_a_wrong_size_are_refused_and_larger_ones_where_they_ask_for_more(native, session):
    options = native.options()
    handle = native.ffi.new("fs_session *")
    for size in (0, 8, native.ffi.sizeof("fs_session_options") - 8, 2**40):
        options.struct_size = size
        status = native.c.fs_session_open(str(BUNDLE).encode(), options, handle)
        assert native.name(status) == "FS_ERROR_ARGUMENT"
        assert f"struct_size is {size}" in native.error()
    # a caller that was built with a later header
    size = native.ffi.sizeof("fs_session_options")
    memory = native.ffi.new("char[]", size + 16)
    later = native.ffi.cast("fs_session_options *", memory)
    later.struct_size = size + 16
    path = native.ffi.new("char[]", shared_library().encode())
    later.library = path
    assert native.name(native.c.fs_session_open(str(BUNDLE).encode(), later, handle)) == "FS_OK", native.error()
    assert native.c.fs_session_close(handle[0]) == 0
    memory[size + 3] = b"\x01"
    assert native.name(native.c.fs_session_open(str(BUNDLE).encode(), later, handle)) == "FS_ERROR_ARGUMENT"
    assert "does not know" in native.error()
    stream = native.stream(session)
    frame = native.frames((stream, np.zeros((64, 64, 3), np.uint8)))
    frame[0].struct_size = 12
    assert native.name(native.c.fs_step(session, frame, 1)) == "FS_ERROR_ARGUMENT"
    stats = native.library.new("fs_stats")
    stats.struct_size = 8
    assert native.name(native.c.fs_stats_read(stream, stats)) == "FS_ERROR_ARGUMENT"


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"stride": 64 * 3 - 1}, "FS_ERROR_FRAME"),
        ({"stride": -64 * 3}, "FS_ERROR_FRAME"),
        ({"stride": 2**60}, "FS_ERROR_FRAME"),
        ({"width": 0}, "FS_ERROR_FRAME"),
        ({"height": -1}, "FS_ERROR_FRAME"),
        ({"width": 20_000}, "FS_ERROR_FRAME"),
        ({"format": 7}, "FS_ERROR_FRAME"),
        ({"data": 0}, "FS_ERROR_ARGUMENT"),
    ],
)
def test_an_impossible_frame_is_refused_and_no_stream_advances(native, session, change, status):
    first, second = native.stream(session), native.stream(session)
    rgb = np.zeros((64, 64, 3), np.uint8)
    frames = native.frames((first, rgb), (second, rgb))
    for name, value in change.items():
        setattr(frames[1], name, native.ffi.cast("uint8_t *", value) if name == "data" else value)
    assert native.name(native.c.fs_step(session, frames, 2)) == status
    assert native.error().startswith("frames[1]: ")
    assert native.position(first) == native.position(second) == 0


def test_a_stream_twice_and_more_frames_than_streams_are_refused(native, session):
    stream, rgb = native.stream(session), np.zeros((64, 64, 3), np.uint8)
    assert native.step(session, (stream, rgb), (stream, rgb)) == "FS_ERROR_ARGUMENT"
    assert native.step(session, *[(stream, rgb)] * 4) == "FS_ERROR_ARGUMENT"
    assert native.position(stream) == 0
    assert native.step(session, (stream, rgb)) == "FS_OK"


def test_formats_and_strides_give_the_same_pixels(native, session, golden_frames):
    stream = native.stream(session)
    rgb = np.ascontiguousarray(np.repeat(golden_frames[0, :, :, :1], 3, axis=2))  # grey, so that all formats can say it
    padded = np.full((64, 80, 3), 255, np.uint8)
    padded[:, :64] = rgb
    grey = np.ascontiguousarray(rgb[:, :, 0])
    colour = golden_frames[0]

    def pooled(frame: np.ndarray, format: int, stride: int) -> np.ndarray:
        native.c.fs_reset(stream)
        made = native.frames((stream, frame[:, :64]))
        made[0].format, made[0].stride = format, stride
        assert native.c.fs_step(session, made, 1) == 0, native.error()
        return native.output(stream, 1).copy()

    expected = pooled(rgb, native.c.FS_RGB, 0)
    assert np.array_equal(pooled(padded, native.c.FS_RGB, 240), expected)
    assert np.array_equal(pooled(rgb, native.c.FS_BGR, 192), expected)
    assert np.array_equal(pooled(grey, native.c.FS_GREY, 64), expected)
    flipped = np.ascontiguousarray(colour[:, :, ::-1])
    assert np.array_equal(pooled(flipped, native.c.FS_BGR, 0), pooled(colour, native.c.FS_RGB, 0))


def test_outputs_are_borrowed_until_a_step_takes_their_place(native, session, golden_frames):
    left, middle, right = (native.stream(session) for _ in range(3))
    tensor = native.library.new("fs_tensor")
    assert native.name(native.c.fs_output(middle, 0, tensor)) == "FS_ERROR_STALE"
    assert native.step(session, (middle, golden_frames[0])) == "FS_OK"
    generation = native.generation(middle)
    address = native.output(middle, 1).ctypes.data
    assert native.c.fs_output_valid(middle, generation) == 1
    assert native.c.fs_output_valid(left, generation) == 0
    assert native.step(session, (left, golden_frames[0])) == "FS_OK"  # beside it
    assert native.c.fs_output_valid(middle, generation) == 1
    assert native.step(session, (middle, golden_frames[1])) == "FS_OK"
    assert native.c.fs_output_valid(middle, generation) == 0
    assert native.output(middle, 1).ctypes.data == address  # borrowed, not copied
    generation = native.generation(middle)
    assert native.step(session, (left, golden_frames[0]), (right, golden_frames[0])) == "FS_OK"  # over it
    assert native.c.fs_output_valid(middle, generation) == 0
    assert native.name(native.c.fs_output(middle, 0, tensor)) == "FS_ERROR_STALE"
    assert native.name(native.c.fs_output(left, 99, tensor)) == "FS_ERROR_ARGUMENT"
    generation = native.generation(left)
    assert native.c.fs_warm_up(session, 1) == 0
    assert native.c.fs_output_valid(left, generation) == 0


def test_memory_does_not_grow_with_the_streams_that_were_ever_stepped_together(native):
    """It would by some 10 MB: what one range of places needs to be run is kept for so many ranges."""
    places = 256
    session = native.open(streams=places, outputs=["pooled"], engine="onnxruntime", threads=1)
    streams, rgb = [native.stream(session) for _ in range(places)], np.zeros((64, 64, 3), np.uint8)

    def resident() -> int:
        pages = Path("/proc/self/statm").read_text("utf-8").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    ranges = [(first, first + width) for width in range(1, 10) for first in range(places - width)]
    for index, (first, last) in enumerate(ranges):
        if index == 1100:
            before = resident()
        assert native.step(session, (streams[first], rgb), (streams[last], rgb)) == "FS_OK"
    assert resident() - before < 4 << 20
    assert native.c.fs_session_close(session) == 0


def test_the_memory_stays_where_it_is(native, session, golden_frames):
    streams = [native.stream(session) for _ in range(3)]
    info = native.library.new("fs_state_info")

    def addresses() -> list[int]:
        found = []
        for index in range(6):
            assert native.c.fs_state_describe(session, index, info) == 0
            found.append(int(info.address))
        return found

    before = addresses()
    for index in range(20):
        chosen = [streams[0]] if index % 2 else streams
        assert native.step(session, *[(stream, golden_frames[index]) for stream in chosen]) == "FS_OK"
        memory = (ctypes.c_char * info.bytes).from_address(before[5])
        copied = native.ffi.new("char[]", info.bytes)
        assert native.c.fs_state_read(streams[0], 5, copied, info.bytes) == 0
        assert bytes(native.ffi.buffer(copied)) == memory.raw
    assert addresses() == before


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_nan_zeroes_that_stream_and_keeps_the_others(native, precision, golden_frames):
    if precision == "int8" and not cpu_multiplies_integers():
        pytest.skip("ONNX Runtime's products of integers make a number of NaN")
    session = native.open(streams=3, outputs=OUTPUTS, precision=precision)
    sick, well = native.stream(session), native.stream(session)
    assert native.step(session, (sick, golden_frames[0]), (well, golden_frames[0])) == "FS_OK"
    expected = native.output(well, 1).copy()
    info = native.library.new("fs_state_info")
    assert native.c.fs_state_describe(session, 3, info) == 0
    poison = np.full(info.bytes // 4, np.nan, np.float32)
    assert native.c.fs_state_write(sick, 3, native.ffi.from_buffer(poison), poison.nbytes) == 0
    native.c.fs_reset(well)
    frames = native.frames((sick, golden_frames[1]), (well, golden_frames[0]))
    assert native.name(native.c.fs_step(session, frames, 2)) == "FS_ERROR_NONFINITE"
    assert [native.name(frame.status) for frame in frames] == ["FS_ERROR_NONFINITE", "FS_OK"]
    assert frames[0].nonfinite == 0b1111
    assert frames[1].nonfinite == 0
    assert (native.position(sick), native.position(well)) == (0, 1)
    np.testing.assert_allclose(native.output(well, 1), expected, atol=TOLERANCE)
    assert native.c.fs_state_read(sick, 3, native.ffi.from_buffer(poison), poison.nbytes) == 0
    assert not poison.any()
    assert native.step(session, (sick, golden_frames[0])) == "FS_OK"
    np.testing.assert_allclose(native.output(sick, 1), expected, atol=TOLERANCE)
    stats = native.library.new("fs_stats")
    assert native.c.fs_stats_read(sick, stats) == 0
    assert (stats.frames, stats.nonfinite) == (3, 1)
    native.c.fs_session_close(session)


def test_a_stream_belongs_to_one_thread_at_a_time(native, session, golden_frames):
    """Two threads hammer one stream: each call is whole or refused, and the clock counts those that were not."""
    stream = native.stream(session)
    done, refused = [0, 0], [0, 0]

    def drive(me: int) -> None:
        for _ in range(200):
            status = native.step(session, (stream, golden_frames[0]))
            assert status in ("FS_OK", "FS_ERROR_BUSY")
            done[me] += status == "FS_OK"
            refused[me] += status == "FS_ERROR_BUSY"

    threads = [threading.Thread(target=drive, args=(me,)) for me in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(done) + sum(refused) == 400
    assert native.position(stream) == sum(done)
    stats = native.library.new("fs_stats")
    assert native.c.fs_stats_read(stream, stats) == 0
    assert (stats.frames, stats.refused) == (sum(done), sum(refused))


def test_statistics_count_and_order(native, session, golden_frames):
    stream = native.stream(session)
    for frame in golden_frames[:9]:
        assert native.step(session, (stream, frame)) == "FS_OK"
    assert native.c.fs_drop(stream, 4) == 0
    stats = native.library.new("fs_stats")
    assert native.c.fs_stats_read(stream, stats) == 0
    assert (stats.frames, stats.dropped, stats.refused) == (9, 4, 0)
    assert 0 < stats.p50_ms <= stats.p95_ms <= stats.p99_ms <= stats.max_ms
    assert stats.last_preprocess_ms + stats.last_engine_ms <= stats.last_ms <= stats.max_ms * (1 + 1e-6)


def test_states_move_between_c_python_and_pytorch(native, session, golden_frames, tmp_path):
    stream = native.stream(session)
    for frame in golden_frames[:11]:
        assert native.step(session, (stream, frame)) == "FS_OK"
    assert native.c.fs_state_save(stream, str(tmp_path / "c").encode()) == 0, native.error()
    assert native.step(session, (stream, golden_frames[11])) == "FS_OK"
    expected = native.output(stream, 1).copy()
    for engine in ("onnxruntime", "torch"):
        with framestep.load(BUNDLE, engine=engine, device="cpu", precision="fp32") as python:
            with python.open_stream() as other:
                other.load_state(tmp_path / "c")
                assert other.position == 11
                other.save_state(tmp_path / engine)
                np.testing.assert_allclose(other.step(golden_frames[11])["pooled"], expected, atol=2e-5)
        assert native.c.fs_state_load(stream, str(tmp_path / engine).encode()) == 0, native.error()
        assert native.position(stream) == 11
        assert native.step(session, (stream, golden_frames[11])) == "FS_OK"
        np.testing.assert_allclose(native.output(stream, 1), expected, atol=TOLERANCE)


def test_a_state_that_does_not_fit_is_refused_and_the_stream_goes_on(native, session, golden_frames, tmp_path):
    stream = native.stream(session)
    assert native.step(session, (stream, golden_frames[0])) == "FS_OK"
    other = native.open(precision="int8")
    strange = native.stream(other)
    assert native.c.fs_state_save(strange, str(tmp_path / "other").encode()) == 0
    assert native.c.fs_session_close(other) == 0
    assert native.c.fs_state_save(stream, str(tmp_path / "own").encode()) == 0
    content = (tmp_path / "own").read_bytes()
    (tmp_path / "short").write_bytes(content[:-1])
    (tmp_path / "long").write_bytes(content + b"x")
    (tmp_path / "nan").write_bytes(content[:-4] + np.float32(np.nan).tobytes())
    (tmp_path / "empty").write_bytes(b"")
    for name in ("other", "short", "long", "nan", "empty", "absent"):
        assert native.name(native.c.fs_state_load(stream, str(tmp_path / name).encode())) == "FS_ERROR_STATE", name
        assert name in native.error()
    assert native.name(native.c.fs_state_save(stream, str(tmp_path / "no" / "where").encode())) == "FS_ERROR_OUTPUT"
    assert native.position(stream) == 1
    assert native.step(session, (stream, golden_frames[1])) == "FS_OK"


@pytest.mark.parametrize("file", ["backbone.onnx", "backbone.bin", "label.onnx", "int8.bin"])
def test_a_changed_byte_is_found(native, tmp_path, file):
    shutil.copytree(BUNDLE, tmp_path / "changed")
    content = bytearray((tmp_path / "changed" / file).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "changed" / file).write_bytes(content)
    assert native.try_open(tmp_path / "changed") == ("FS_ERROR_BUNDLE", 0)
    assert file in native.error()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(format="other"), "not a framestep manifest"),
        (lambda m: m.update(version=2), "another bundle version"),
        (lambda m: m.update(extra=1), "extra: unknown key"),
        (lambda m: m.pop("states"), "states: missing"),
        (lambda m: m["frame"].update(height="64"), "frame.height: expected an integer"),
        (lambda m: m["frame"].update(height=0), "height and width"),
        (lambda m: m["states"][0].update(capacity=7), "does not fill its axis"),
        (lambda m: m["states"][0].update(kind="heap"), "kind 'heap'"),
        (lambda m: m["graphs"]["backbone"].update(file="../x.onnx"), "leaves the bundle"),
        (lambda m: m["graphs"]["backbone"].update(file="x.onnx"), "not listed"),
        (lambda m: m["graphs"]["backbone"]["inputs"][0].update(role="magic"), "unknown role 'magic'"),
        (lambda m: m["graphs"]["backbone"]["inputs"][0].update(shape=[64, 64, 3]), "first axis"),
        (lambda m: m["graphs"]["backbone"]["inputs"][0].update(shape=["S", 32, 64, 3]), "'frame'"),
        (lambda m: m["graphs"]["backbone"]["outputs"][0].update(shape=["S", 15, 96]), "'features' is float32"),
        (lambda m: m["files"]["int8.bin"].update(bytes=5), "expected 5 bytes"),
        (lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}), "leaves the bundle"),
    ],
)
def test_a_damaged_manifest_is_named(native, tmp_path, edit, message):
    shutil.copytree(BUNDLE, tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    edit(manifest)
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(manifest))
    assert native.try_open(tmp_path / "b") == ("FS_ERROR_BUNDLE", 0)
    assert message in native.error()
    assert "\n" not in native.error()


def test_what_is_no_bundle_is_named(native, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, message in (("absent", "no such bundle"), ("file", "is a file"), ("empty", "manifest.json is missing")):
        assert native.try_open(tmp_path / name) == ("FS_ERROR_BUNDLE", 0)
        assert message in native.error()


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"engine": "magic"}, "FS_ERROR_ARGUMENT", "engine 'magic' is unknown"),
        ({"device": "tpu"}, "FS_ERROR_ARGUMENT", "device 'tpu' is unknown"),
        ({"precision": "fp8"}, "FS_ERROR_BUNDLE", "precision 'fp8' is not in this bundle; it has int8, fp32"),
        ({"outputs": ["colour"]}, "FS_ERROR_ARGUMENT", "'colour' is unknown; this bundle has features"),
        ({"outputs": ["pooled", "pooled"]}, "FS_ERROR_ARGUMENT", "'pooled' stands twice"),
        ({"streams": -1}, "FS_ERROR_ARGUMENT", "streams: expected 1 to"),
        ({"threads": 10_000}, "FS_ERROR_ARGUMENT", "threads: expected 1 to"),
    ],
)
def test_bad_options_are_named(native, options, status, message):
    assert native.try_open(BUNDLE, **options) == (status, 0)
    assert message in native.error()


def with_int8_memory(*others: str) -> str:
    """A manifest whose own precision remembers in INT8, and others that do not."""
    manifest = json.loads((BUNDLE / "manifest.json").read_text())
    states, variant = manifest["states"], manifest["variants"]["fp32"]
    manifest["precision"] = "fp32+kv8"
    manifest["states"] = [{**state, "dtype": "int8"} for state in states]
    manifest["variants"] = {name: {**variant, "states": states} for name in others}
    return json.dumps(manifest)


def before_int8_memory(own: str) -> str:
    """A manifest whose own precision has another name, and one beside it that remembers in INT8."""
    manifest = json.loads((BUNDLE / "manifest.json").read_text())
    states = [{**state, "dtype": "int8"} for state in manifest["states"]]
    return json.dumps({**manifest, "precision": own, "variants": {"fp32+kv8": {"graphs": {}, "states": states}}})


@pytest.mark.parametrize("other", ["fp32", "fp16"])  # FP16 is none that is looked for on a CPU
@pytest.mark.parametrize(
    ("made", "engine"), [(before_int8_memory, "auto"), (with_int8_memory, "onnxruntime:plain")], ids=["later", "first"]
)
def test_auto_takes_no_int8_memory_that_comes_later_or_that_the_engine_does_not_run(native, other, made, engine):
    session = native.open(manifest=made(other), engine=engine)
    info = native.library.new("fs_session_info")
    assert native.c.fs_session_describe(session, info) == 0
    assert native.library.text(info.precision) == other
    assert native.c.fs_session_close(session) == 0


@pytest.mark.parametrize(
    ("others", "precision", "advice"),
    [
        (("fp32", "fp16"), "fp32+kv8", "take another precision (fp32, fp16)"),
        ((), "auto", "export the bundle with another precision"),
    ],
)
def test_int8_memory_is_refused_with_the_reason(native, others, precision, advice):
    opened = native.try_open(
        BUNDLE, manifest=with_int8_memory(*others), precision=precision, engine="onnxruntime:plain"
    )
    assert opened == ("FS_ERROR_ENGINE", 0)
    assert "'fp32+kv8' keeps its memory as INT8, which ONNX Runtime would dequantize" in native.error()
    assert native.error().endswith(advice)


@pytest.mark.parametrize("precision", ["fp32+kv8", "auto"])
def test_int8_memory_that_no_operator_reads_is_refused(native, precision):
    opened = native.try_open(BUNDLE, manifest=with_int8_memory("fp32"), precision=precision)  # the graph's is float32
    assert opened == ("FS_ERROR_ENGINE", 0)
    assert "keeps its memory as INT8" in native.error() and "none that framestep has an operator for" in native.error()


def test_the_tensorrt_engine_needs_its_headers_at_build_time_or_a_gpu(native):
    assert native.try_open(BUNDLE, engine="tensorrt") == ("FS_ERROR_ENGINE", 0)
    assert "TensorRT" in native.error()
    assert "\n" not in native.error()


def test_other_labels_change_the_scores_alone(native, session, golden_frames):
    stream = native.stream(session)
    assert native.step(session, (stream, golden_frames[0])) == "FS_OK"
    pooled, generation = native.output(stream, 1).copy(), native.generation(stream)
    rows = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    labels = native.library.new("fs_labels")
    labels.count, labels.text_hidden, labels.patch_text_hidden = 5, 96, 96
    labels.text_embeddings = labels.patch_text_embeddings = native.ffi.cast("float *", rows.ctypes.data)
    labels.text_hidden = 95
    assert native.name(native.c.fs_set_labels(session, labels)) == "FS_ERROR_ARGUMENT"
    assert native.c.fs_output_valid(stream, generation) == 1
    labels.text_hidden = 96
    assert native.c.fs_set_labels(session, labels) == 0, native.error()
    assert native.c.fs_output_valid(stream, generation) == 0
    native.c.fs_reset(stream)
    assert native.step(session, (stream, golden_frames[0])) == "FS_OK"
    np.testing.assert_allclose(native.output(stream, 1), pooled, atol=TOLERANCE)
    scoring = Bundle.open(BUNDLE).manifest.scoring
    cosine = rows @ (pooled / np.linalg.norm(pooled))
    expected = 1 / (1 + np.exp(-(np.exp(scoring.logit_scale) * cosine + scoring.logit_bias)))
    np.testing.assert_allclose(native.output(stream, 2), expected, atol=1e-5)
    assert native.output(stream, 3).shape == (5, 4, 4)


def build(folder: Path, source: str) -> str:
    """A shared library that says it is ONNX Runtime."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    (folder / "fake.c").write_text(source)
    command = ["gcc", "-shared", "-fPIC", "-o", str(folder / "libonnxruntime.so"), str(folder / "fake.c")]
    subprocess.run(command, check=True)
    return str(folder / "libonnxruntime.so")


FAKE = """
#include <stdint.h>
#include <stddef.h>
struct base {{ const void *(*api)(uint32_t); const char *(*version)(void); }};
static const void *api(uint32_t version) {{ return NULL; }}
static const char *version(void) {{ return "{version}"; }}
static const struct base all = {{api, version}};
const struct base *OrtGetApiBase(void) {{ return &all; }}
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (FAKE.format(version="1.17.3"), "ONNX Runtime 1.17.3 is too old; framestep needs 1.25 or later"),
        (FAKE.format(version="banana"), "is not ONNX Runtime: its version is 'banana'"),
        (FAKE.format(version="1.99.0"), "refuses its own API"),
        ("int nothing;", "is not ONNX Runtime: OrtGetApiBase is missing"),
    ],
)
def test_an_older_or_foreign_library_is_named(native, tmp_path, source, message):
    assert native.try_open(BUNDLE, library=build(tmp_path, source)) == ("FS_ERROR_ENGINE", 0)
    assert message in native.error()
    assert str(tmp_path) in native.error()


def test_without_onnx_runtime_one_line_names_the_places(native, tmp_path):
    missing = str(tmp_path / "libonnxruntime.so")
    assert native.try_open(BUNDLE, library=missing) == ("FS_ERROR_ENGINE", 0)
    assert missing in native.error()
    assert "FRAMESTEP_ONNXRUNTIME" in native.error()
    assert "\n" not in native.error()
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            raise ModuleNotFoundError(name)
import importlib.util
importlib.util.find_spec = lambda name, package=None: None
import framestep
try:
    framestep.load({str(BUNDLE)!r}, engine="onnxruntime")
except framestep.FramestepError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert "FRAMESTEP_ONNXRUNTIME" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_library_that_was_not_built_is_named(tmp_path):
    with pytest.raises(EngineError, match="the native library is missing; build it"):
        Library(HEADER, tmp_path / "libframestep.so")


def test_a_library_of_another_version_is_named(tmp_path):
    other = build(tmp_path, "int fs_api_version(void) { return 7; }")
    with pytest.raises(EngineError, match="has version 7 of the C API, this framestep needs 1"):
        Library(HEADER, Path(other))


GPU_BUILD = """
#include <stdint.h>
#include <stddef.h>
typedef void (*logger)(void *, int, const char *, const char *, const char *, const char *);
static char name[] = "CUDAExecutionProvider";
static char *names[] = {name};
static void *create_env(logger log, void *user, int severity, const char *id, void **env) {
    log(user, 2, "", id, "", "first line\\n  second line");
    *env = name;
    return NULL;
}
static void *providers(char ***found, int *count) { *found = names; *count = 1; return NULL; }
static void *release_providers(char **found, int count) { return NULL; }
static void *no_options(void **options) { return name; }
static const char *message(void *status) { return "no CUDA-capable device is detected"; }
static void release(void *object) {}
static const void *table[300];
static const void *api(uint32_t version) {
    table[2] = message; table[4] = create_env; table[10] = no_options; table[93] = table[100] = release;
    table[125] = providers; table[126] = release_providers;
    return table;
}
static const char *version(void) { return "1.31.1"; }
struct base { const void *(*api)(uint32_t); const char *(*version)(void); };
static const struct base all = {api, version};
const struct base *OrtGetApiBase(void) { return &all; }
"""


def test_a_gpu_build_without_a_gpu_has_the_cpu_alone_and_its_messages_go_to_a_callback(native, tmp_path, monkeypatch):
    received: list[tuple[int, str]] = []

    @native.ffi.callback("fs_log_callback")
    def receive(level: int, message: Any, user: Any) -> None:
        received.append((level, native.library.text(message)))

    monkeypatch.setenv("FRAMESTEP_ONNXRUNTIME", build(tmp_path, GPU_BUILD))
    native.c.fs_log_to(receive, native.ffi.NULL)
    try:
        assert available_devices() == ["cpu"]
        with pytest.raises(EngineError, match="device 'cuda' is not available"):
            framestep.load(BUNDLE, engine="onnxruntime", device="cuda")
    finally:
        native.c.fs_log_to(native.ffi.NULL, native.ffi.NULL)
    assert received == [(native.c.FS_LOG_WARNING, "ONNX Runtime: first line second line")]


def test_after_warm_up_the_library_asks_for_no_memory(tmp_path):
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    program = tmp_path / "allocations"
    source = Path(__file__).parent / "allocations.c"
    folder = LIBRARY.parent
    command = ["gcc", "-O1", "-I", HEADER.parent, source, "-o", program, "-L", folder, "-lframestep"]
    subprocess.run([*command, f"-Wl,-rpath,{folder}", "-ldl"], check=True)
    done = subprocess.run([program, BUNDLE, shared_library()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    opening, steps = map(int, done.stdout.split())
    assert opening > 100  # it does count
    assert steps == 0
