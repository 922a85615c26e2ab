"""`fs_run` through the C functions: descriptions, borrows, and every kind of bad input."""

from __future__ import annotations

import decoder_models
import numpy as np
import pytest

from framestep.export.decoder_checkpoint import read_decoder_checkpoint
from framestep.export.decoder_export import DecoderOptions, export_decoder
from framestep.runtime.engines.onnxruntime import shared_library
from framestep.runtime.library import library

CAPACITY = 16
GRAPHS = ("embed", "decoder", "rebase")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checkpoint = read_decoder_checkpoint(str(decoder_models.save(decoder_models.qwen2(), folder / "checkpoint")))
    return export_decoder(checkpoint, folder / "out.bundle", DecoderOptions(capacity=CAPACITY)).path


class Native:
    def __init__(self, path, graphs=GRAPHS) -> None:
        self.library = library()
        self.ffi, self.c = self.library.ffi, self.library.functions
        self.kept = [self.ffi.new("char[]", name.encode()) for name in (*graphs, shared_library())]
        options = self.library.new("fs_session_options")
        options.library = self.kept[-1]
        names = self.ffi.new("char *[]", self.kept[:-1])
        options.graphs, options.graph_count = names, len(graphs)
        handle = self.ffi.new("fs_session *")
        self.status = self.name(self.c.fs_session_open(str(path).encode(), options, handle))
        self.session = int(handle[0])
        self.stream = self.open_stream() if self.session else 0

    def open_stream(self) -> int:
        stream = self.ffi.new("fs_stream *")
        self.c.fs_stream_open(self.session, stream)
        return int(stream[0])

    def name(self, status: int) -> str:
        return self.library.text(self.c.fs_status_name(status))

    def error(self) -> str:
        return self.library.text(self.c.fs_last_error())

    def inputs(self, **arrays):
        made = self.ffi.new("fs_input[]", max(1, len(arrays)))
        kinds = {"int64": 4, "bool": 5, "float32": 7}
        self.kept = [made]
        for place, (name, array) in zip(made, arrays.items(), strict=False):
            text = self.ffi.new("char[]", name.encode())
            self.kept += [text, array]
            place.struct_size = self.ffi.sizeof("fs_input")
            place.name, place.data = text, self.ffi.cast("void *", array.ctypes.data)
            place.dtype, place.rank = kinds[str(array.dtype)], array.ndim
            place.shape[0 : array.ndim] = array.shape
        return made

    def run(self, graph: int, **arrays) -> str:
        return self.name(self.c.fs_run(self.stream, graph, self.inputs(**arrays), len(arrays)))

    def output(self, graph: int, index: int = 0) -> tuple[np.ndarray, int]:
        tensor = self.library.new("fs_tensor")
        assert self.c.fs_run_output(self.stream, graph, index, tensor) == 0, self.error()
        array = np.frombuffer(self.ffi.buffer(tensor.data, tensor.bytes), np.float32)
        return array.reshape(tuple(tensor.shape[0 : tensor.rank])), int(tensor.generation)


@pytest.fixture
def native(path):
    made = Native(path)
    assert made.status == "FS_OK", made.error()
    yield made
    made.c.fs_session_close(made.session)


def test_graphs_and_their_ports_are_described(native):
    info = native.library.new("fs_session_info")
    assert native.c.fs_session_describe(native.session, info) == 0
    assert (info.graphs, info.step_graphs, info.outputs) == (3, 0, 0)
    port = native.library.new("fs_port_info")
    found = {}
    for index in range(4):
        assert native.c.fs_graph_input_describe(native.session, 1, index, port) == 0
        shape = tuple(port.shape[0 : port.rank])
        found[native.library.text(port.name)] = (native.library.text(port.role), port.dtype, shape)
    assert found == {
        "embeddings": ("embeddings", 7, (-1, 64)),
        "position_ids": ("position_ids", 4, (1, -1)),
        "write_index": ("write_index", 4, ()),
        "slot_mask": ("slot_mask", 5, (CAPACITY,)),
    }
    assert native.c.fs_graph_output_describe(native.session, 1, 0, port) == 0
    assert (native.library.text(port.name), tuple(port.shape[0 : port.rank])) == ("logits", (320,))
    assert native.name(native.c.fs_graph_input_describe(native.session, 1, 4, port)) == "FS_ERROR_ARGUMENT"
    assert native.name(native.c.fs_graph_output_describe(native.session, 3, 0, port)) == "FS_ERROR_ARGUMENT"


def test_outputs_are_borrowed_until_the_graphs_next_run_for_the_stream(native):
    tensor = native.library.new("fs_tensor")
    assert native.name(native.c.fs_run_output(native.stream, 0, 0, tensor)) == "FS_ERROR_STALE"
    assert native.run(0, tokens=np.array([1, 2, 3])) == "FS_OK", native.error()
    first, generation = native.output(0)
    assert first.shape == (3, 64)
    assert native.c.fs_output_valid(native.stream, generation) == 1
    assert native.run(2, slot_positions=np.zeros((1, CAPACITY), np.int64)) == "FS_OK"
    assert native.c.fs_output_valid(native.stream, generation) == 1
    assert native.run(0, tokens=np.array([4])) == "FS_OK"
    assert native.c.fs_output_valid(native.stream, generation) == 0
    second, generation = native.output(0)
    assert second.shape == (1, 64)
    assert native.c.fs_stream_close(native.stream) == 0
    assert native.c.fs_output_valid(native.stream, generation) == 0
    native.stream = native.open_stream()
    assert native.name(native.c.fs_run_output(native.stream, 0, 0, tensor)) == "FS_ERROR_STALE"


def test_the_same_shape_is_written_to_the_same_memory(native):
    addresses = set()
    for count in (3, 1, 3, 2, 3):
        assert native.run(0, tokens=np.arange(count)) == "FS_OK"
        addresses.add(native.output(0)[0].ctypes.data)
    assert len(addresses) == 1


def test_bad_input_is_refused_and_leaves_everything_as_it_was(native):
    c, null, tokens = native.c, native.ffi.NULL, np.array([1, 2])
    assert native.run(0, tokens=tokens) == "FS_OK"
    expected = native.output(0)[0].copy()
    inputs = native.inputs(tokens=tokens)
    assert native.name(c.fs_run(native.stream, 3, inputs, 1)) == "FS_ERROR_ARGUMENT"
    assert "graph 3: this session has 3" in native.error()
    assert native.name(c.fs_run(native.stream, 0, null, 1)) == "FS_ERROR_ARGUMENT"
    assert native.name(c.fs_run(native.stream, 0, null, 0)) == "FS_ERROR_ARGUMENT"
    assert "the input 'tokens' is missing" in native.error()
    assert native.name(c.fs_run(native.stream, 0, inputs, 1 << 40)) == "FS_ERROR_ARGUMENT"
    assert native.name(c.fs_run(native.stream + 1, 0, inputs, 1)) == "FS_ERROR_HANDLE"
    assert native.name(c.fs_run(0, 0, inputs, 1)) == "FS_ERROR_HANDLE"
    assert native.name(c.fs_run_output(native.stream, 0, 1, native.library.new("fs_tensor"))) == "FS_ERROR_ARGUMENT"
    assert native.name(c.fs_run_output(native.stream, 0, 0, null)) == "FS_ERROR_ARGUMENT"

    def changed(**members) -> str:
        given = native.inputs(tokens=tokens)
        for member, value in members.items():
            setattr(given[0], member, value)
        return native.name(c.fs_run(native.stream, 0, given, 1))

    assert changed(struct_size=8) == "FS_ERROR_ARGUMENT"
    assert changed(name=null) == "FS_ERROR_ARGUMENT"
    assert changed(data=null) == "FS_ERROR_ARGUMENT"
    assert changed(rank=9) == "FS_ERROR_ARGUMENT"
    assert changed(rank=-1) == "FS_ERROR_ARGUMENT"
    assert changed(dtype=7) == "FS_ERROR_ARGUMENT"
    assert "'tokens' takes int64 [T], found float32 [2]" in native.error()
    assert changed(data=native.ffi.cast("char *", tokens.ctypes.data) + 1) == "FS_ERROR_ARGUMENT"
    assert "is not aligned" in native.error()
    twice = native.inputs(tokens=tokens, other=tokens)
    twice[1].name = twice[0].name
    assert native.name(c.fs_run(native.stream, 0, twice, 2)) == "FS_ERROR_ARGUMENT"
    assert "'tokens' stands twice" in native.error()
    given = native.inputs(tokens=tokens)
    given[0].shape[0] = 1 << 62
    assert native.name(c.fs_run(native.stream, 0, given, 1)) == "FS_ERROR_ARGUMENT"
    assert np.array_equal(native.output(0)[0], expected)
    assert native.run(0, tokens=np.array([5000])) == "FS_ERROR_ENGINE"
    assert native.run(0, tokens=tokens) == "FS_OK"
    assert np.array_equal(native.output(0)[0], expected)


def test_slots_beyond_the_capacity_are_refused(native):
    inputs = {
        "embeddings": np.zeros((3, 64), np.float32),
        "position_ids": np.zeros((1, 3), np.int64),
        "slot_mask": np.zeros(CAPACITY, bool),
    }
    for index in (CAPACITY - 2, CAPACITY, -1, 1 << 40):
        assert native.run(1, write_index=np.array(index), **inputs) == "FS_ERROR_ENGINE", index
    assert native.run(1, write_index=np.array(CAPACITY - 3), **inputs) == "FS_OK", native.error()


def test_unknown_graphs_are_refused_when_a_session_is_opened(path):
    made = Native(path, ("embed", "speak"))
    assert made.status == "FS_ERROR_ARGUMENT"
    assert "graphs: 'speak' is unknown; this bundle has embed, decoder, rebase" in made.error()


def test_a_bundle_without_frames_and_without_graphs_has_nothing_to_run(path):
    made = Native(path, ())
    assert made.status == "FS_ERROR_BUNDLE"
    assert "has no output that frames give" in made.error()
