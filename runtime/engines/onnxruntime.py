"""The ONNX Runtime engine: the native library's session, with a stream of its own in each slot.

What a frame costs (resize and crop, the run, the look for NaN) happens there, while other Python threads run.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle
from ..errors import EngineError
from ..library import Library, library
from ..schema import to_json
from . import StepTimes

Array = npt.NDArray[Any]
PACKAGES = "pip install 'framestep[cpu]' (or 'framestep[gpu]')"


class OnnxRuntimeEngine:
    """Runs the graphs of a bundle for a number of stream slots.

    Args:
        bundle: where the graphs are; opened, and its manifest that of one precision.
        outputs: names of the outputs to bring to the host.
        streams: number of slots.
        device: "cpu" or "cuda".
        threads: threads for one operator.
        graphs: names of the graphs that are to be run by themselves.
        engine: "onnxruntime", on a CPU with operators of ours, or one of its variants.
    """

    def __init__(
        self,
        bundle: Bundle,
        outputs: Sequence[str],
        streams: int,
        device: str,
        threads: int,
        graphs: Sequence[str] = (),
        engine: str = "onnxruntime",
    ) -> None:
        self._library = native = library()
        ffi = native.ffi
        texts = [ffi.new("char[]", name.encode()) for name in (*outputs, *graphs)]
        names = ffi.new("char *[]", texts)
        options = native.new("fs_session_options")
        manifest = bundle.manifest
        kept = {"engine": engine, "device": device, "precision": manifest.precision, "library": shared_library()}
        kept["manifest"] = json.dumps(to_json(manifest))  # of a bundle in the making it is not written yet
        pointers = {name: ffi.new("char[]", value.encode()) for name, value in kept.items()}
        for name, pointer in pointers.items():
            setattr(options, name, pointer)
        options.outputs, options.output_count = names, len(outputs)
        options.graphs, options.graph_count = names + len(outputs), len(graphs)
        options.streams, options.threads = streams, threads
        options.trust_files = 1  # whoever opened the bundle has checked them
        self._session = self._handle("fs_session", native.functions.fs_session_open, os.fsencode(bundle.path), options)
        try:
            slots = range(streams)
            self._streams = [self._handle("fs_stream", native.functions.fs_stream_open, self._session) for _ in slots]
            self._frames = ffi.new("fs_frame[]", streams)
            self._tensor = native.new("fs_tensor")
            self._outputs = tuple(outputs)
            self._states = _states(native, self._session)
            self._graphs = _graphs(native, self._session)
            self._run_locks = {name: threading.Lock() for name in self._graphs}
        except BaseException:
            self.close()
            raise

    def set_constants(self, values: Mapping[str, Array]) -> None:
        """Set the inputs that do not change from step to step (label embeddings and their scale), by input name."""
        native = self._library
        arrays = {name: np.ascontiguousarray(value, np.float32) for name, value in values.items()}
        labels = native.new("fs_labels")
        for name, array in arrays.items():
            setattr(labels, name, native.ffi.cast("float *", array.ctypes.data))
        labels.count, labels.text_hidden = arrays["text_embeddings"].shape
        labels.patch_text_hidden = arrays["patch_text_embeddings"].shape[1]
        native.check(native.functions.fs_set_labels(self._session, labels))

    def step(self, frames: Mapping[int, Array]) -> dict[int, tuple[str, ...]]:
        """See `Engine.step`."""
        native, ffi = self._library, self._library.ffi
        kept = []  # arrays that the library reads from
        for place, (slot, rgb) in zip(self._frames, frames.items(), strict=False):
            height, width, _ = rgb.shape
            if rgb.strides[1:] != (3, 1) or rgb.strides[0] < 3 * width:
                rgb = np.ascontiguousarray(rgb)
            kept.append(rgb)
            place.struct_size = ffi.sizeof("fs_frame")
            place.stream = self._streams[slot]
            place.data = ffi.cast("uint8_t *", rgb.ctypes.data)
            place.width, place.height, place.stride = width, height, rgb.strides[0]
        status = native.functions.fs_step(self._session, self._frames, len(frames))
        if status == native.functions.FS_ERROR_NONFINITE:
            return {
                slot: self._named(place.nonfinite)
                for place, slot in zip(self._frames, frames, strict=False)
                if place.status != native.functions.FS_OK
            }
        native.check(status)
        return {}

    def output(self, slot: int) -> dict[str, Array]:
        """See `Engine.output`."""
        native, tensor = self._library, self._tensor
        found = {}
        for index, name in enumerate(self._outputs):
            native.check(native.functions.fs_output(self._streams[slot], index, tensor))
            found[name] = _array(native, tensor)
        return found

    def run(self, slot: int, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `Engine.run`."""
        native, ffi = self._library, self._library.ffi
        index, outputs = self._graphs[graph]
        given = ffi.new("fs_input[]", len(inputs))
        kept = []  # what the library reads from
        for place, (name, value) in zip(given, inputs.items(), strict=True):
            array = np.require(value, requirements=("C", "A"))
            text = ffi.new("char[]", name.encode())
            kept.append((array, text))
            place.struct_size = ffi.sizeof("fs_input")
            place.name, place.data = text, ffi.cast("void *", array.ctypes.data)
            if array.dtype.type not in _FS_DTYPES or array.ndim > len(place.shape):
                raise EngineError(f"graph '{graph}': input '{name}' cannot be {array.dtype} {list(array.shape)}")
            place.dtype, place.rank = _FS_DTYPES[array.dtype.type], array.ndim
            place.shape[0 : array.ndim] = array.shape
        with self._run_locks[graph]:
            if not self._session:
                raise EngineError("this session is closed")
            status = native.functions.fs_run(self._streams[slot], index, given, len(inputs))
            if status != native.functions.FS_ERROR_NONFINITE:
                native.check(status)
            tensor, found = native.new("fs_tensor"), {}
            for number, name in enumerate(outputs):
                native.check(native.functions.fs_run_output(self._streams[slot], index, number, tensor))
                found[name] = _array(native, tensor).copy()
        return found

    def position(self, slot: int) -> int:
        position = self._library.ffi.new("int64_t *")
        self._library.check(self._library.functions.fs_position(self._streams[slot], position))
        return int(position[0])

    def seek(self, slot: int, position: int) -> None:
        self._library.check(self._library.functions.fs_seek(self._streams[slot], position))

    def warm_up(self, steps: int) -> None:
        """Run every number of slots `steps` times; no clock moves."""
        for kind in ("fs_frame", "uint8_t *", "int64_t *"):
            self._library.ffi.typeof(kind)  # cffi parses C's words at their first use, which takes milliseconds
        self._library.check(self._library.functions.fs_warm_up(self._session, steps))

    def last_step(self, slot: int) -> StepTimes:
        """Where the time of the slot's last step went."""
        stats = self._library.new("fs_stats")
        self._library.check(self._library.functions.fs_stats_read(self._streams[slot], stats))
        return StepTimes(stats.last_preprocess_ms, stats.last_engine_ms, stats.last_ms)

    def state_names(self) -> list[str]:
        return list(self._states)

    def state_address(self, name: str) -> int:
        """Address of a state's memory, for showing that nothing moves it."""
        info = self._library.new("fs_state_info")
        index, _, _ = self._states[name]
        self._library.check(self._library.functions.fs_state_describe(self._session, index, info))
        return int(info.address)

    def read_state(self, name: str, slot: int) -> Array:
        """A copy of one stream's state."""
        index, shape, dtype = self._states[name]
        copy = np.empty(shape, dtype)
        pointer = self._library.ffi.cast("void *", copy.ctypes.data)
        self._library.check(self._library.functions.fs_state_read(self._streams[slot], index, pointer, copy.nbytes))
        return copy

    def write_state(self, name: str, slot: int, value: Array) -> None:
        index, shape, dtype = self._states[name]
        whole = np.ascontiguousarray(np.broadcast_to(value, shape), dtype)
        pointer = self._library.ffi.cast("void *", whole.ctypes.data)
        self._library.check(self._library.functions.fs_state_write(self._streams[slot], index, pointer, whole.nbytes))

    def close(self) -> None:
        """Free everything; once is enough. Waits for runs at work."""
        with ExitStack() as stack:
            for lock in getattr(self, "_run_locks", {}).values():
                stack.enter_context(lock)  # nobody copies an output while its memory goes
            if self._session:
                self._library.functions.fs_session_close(self._session)
                self._session = 0

    def __del__(self) -> None:
        if getattr(self, "_session", 0):
            self.close()

    def _handle(self, kind: str, function: Any, *arguments: Any) -> int:
        handle = self._library.ffi.new(f"{kind} *")
        self._library.check(function(*arguments, handle))
        return int(handle[0])

    def _named(self, bits: int) -> tuple[str, ...]:
        return tuple(name for index, name in enumerate(self._outputs) if bits >> min(index, 63) & 1)


_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int32, 4: np.int64, 5: np.bool_, 6: np.float16, 7: np.float32}  # fs_dtype
_FS_DTYPES = {kind: number for number, kind in _DTYPES.items()}


def _array(native: Library, tensor: Any) -> Array:
    """A view of a borrowed tensor."""
    memory = native.ffi.buffer(tensor.data, tensor.bytes)
    return np.frombuffer(memory, _DTYPES[tensor.dtype]).reshape(tuple(tensor.shape[0 : tensor.rank]))


def available_devices() -> list[str]:
    """Devices that ONNX Runtime can use here, fastest first.

    Raises:
        EngineError: it is not installed, or cannot be used.
    """
    native = library()
    available = native.ffi.new("int32_t *")
    path = os.fsencode(shared_library())
    native.check(native.functions.fs_device_available(path, b"cuda", available))
    return ["cuda", "cpu"] if available[0] else ["cpu"]


def shared_library() -> str:
    """Path of ONNX Runtime's shared library: the environment's FRAMESTEP_ONNXRUNTIME, or of the Python package.

    Raises:
        EngineError: neither is there; the message names the places.
    """
    given = os.environ.get("FRAMESTEP_ONNXRUNTIME")
    if given:
        return given
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        raise EngineError(
            "the onnxruntime engine needs ONNX Runtime: looked for FRAMESTEP_ONNXRUNTIME in the environment and for the"
            f" package onnxruntime; {PACKAGES}"
        )
    folder = Path(spec.origin).parent / "capi"
    found = sorted(folder.glob("libonnxruntime.so*"), key=lambda path: len(path.name))
    if not found:
        raise EngineError(f"{folder}: has no libonnxruntime.so; install ONNX Runtime again: {PACKAGES}")
    return str(found[0])


def _states(native: Library, session: int) -> dict[str, tuple[int, tuple[int, ...], Any]]:
    """Index, shape of one stream and type of each state, by name."""
    session_info, info = native.new("fs_session_info"), native.new("fs_state_info")
    native.check(native.functions.fs_session_describe(session, session_info))
    found = {}
    for index in range(session_info.states):
        native.check(native.functions.fs_state_describe(session, index, info))
        shape = tuple(info.shape[0 : info.rank])
        found[native.text(info.name)] = (index, shape, _DTYPES[info.dtype])
        assert info.bytes == math.prod(shape) * np.dtype(_DTYPES[info.dtype]).itemsize, native.text(info.name)
    return found


def _graphs(native: Library, session: int) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Index and names of the outputs of each graph, by name."""
    session_info, info, port = (native.new(f"fs_{kind}_info") for kind in ("session", "graph", "port"))
    native.check(native.functions.fs_session_describe(session, session_info))
    found = {}
    for index in range(session_info.graphs):
        native.check(native.functions.fs_graph_describe(session, index, info))
        outputs = []
        for number in range(info.outputs):
            native.check(native.functions.fs_graph_output_describe(session, index, number, port))
            outputs.append(native.text(port.name))
        found[native.text(info.name)] = (index, tuple(outputs))
    return found
