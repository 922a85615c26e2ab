"""The TensorRT engine: compiled graphs over device buffers, a frame being one launch of a CUDA graph and one wait.

A state's input and output are bound to the same memory, which TensorRT's KV-cache layer updates in place; a state that
some graph updates otherwise has a second buffer, and is copied back within the step. The upload of frames and positions
from pinned memory, all graphs and the download of the asked outputs are captured once for each range of slots. Outputs
that nobody asked for stay on the device.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle import STREAMS, Bundle, Graph, Manifest, Port
from ..errors import EngineError, FramestepError
from .buffers import BufferEngine
from .cuda_driver import ALIGNMENT, CudaDriver, DeviceError
from .engine_files import Target, find_engine, read_engine
from .tensorrt_package import Messages, choose_flavour, import_flavour, installed_flavours

Array = npt.NDArray[Any]
MOST_GRAPHS = 64  # captured ranges of slots that are kept
WARM_UPS = 2  # runs before a capture: TensorRT sets itself up for new shapes in the first one


class TensorRtEngine(BufferEngine):
    """Runs the graphs of a bundle for a range of stream slots.

    Args:
        bundle: with engines that fit this machine, flattened to one precision.
        graphs: names of the graphs to run, in order.
        outputs: names of the outputs to bring to the host.
        streams: number of slots.

    Attributes:
        frames: uint8 [streams, height, width, 3], pinned, the input of the next step; write into it.
        positions: int64 [streams], frames since reset; write into it.
        outputs: float32 [streams, ...] by name, filled by `run`.

    Raises:
        EngineError: TensorRT, the GPU or a fitting engine is missing, or there is too little memory.
    """

    def __init__(self, bundle: Bundle, graphs: Sequence[str], outputs: Sequence[str], streams: int) -> None:
        manifest = bundle.manifest
        super().__init__(manifest.frame)
        self._manifest = manifest
        self._asked = tuple(outputs)
        self._streams = streams
        self._flavour = _flavour_of(manifest)
        self._trt = import_flavour(self._flavour)
        self._driver = CudaDriver()
        self._loaded: list[_Loaded] = []
        self._captured: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._broken: str | None = None
        self._release = weakref.finalize(self, _release, self._driver, self._loaded)  # also at the interpreter's exit
        target = Target(self._flavour, str(self._trt.__version__), self._driver.compute_capability)
        frame = manifest.frame
        states = {state.name: state for state in manifest.states}
        used = dict.fromkeys(use.state for name in graphs for use in manifest.graphs[name].states)
        try:
            with self._driver.current():
                for name in graphs:
                    self._loaded.append(self._load(bundle, name, target))
                self.frames = self._driver.pinned((streams, frame.height, frame.width, 3), "uint8")
                self.positions = self._driver.pinned((streams,), "int64")
                self._inputs = {
                    "frame": self._twin(self.frames, "frames"),
                    "position": self._twin(self.positions, "positions"),
                }
                self._states = {
                    name: self._buffer((streams, *states[name].shape[1:]), states[name].dtype, f"the state '{name}'")
                    for name in used
                }
                self._spares = {
                    name: self._buffer(
                        (streams, *states[name].shape[1:]), states[name].dtype, f"a second copy of the state '{name}'"
                    )
                    for name in dict.fromkeys(name for item in self._loaded for name in item.copied)
                }
                scratch = max(int(item.engine.device_memory_size_v2) for item in self._loaded)
                self._scratch = self._driver.allocate(scratch, "TensorRT's activations"), scratch
                self._driver.wait()
                self._constants: dict[str, _Buffer] = {}
                self._values: dict[str, _Buffer] = {}
                self.outputs = {}
                self._allocate_outputs({})
        except BaseException:
            self._release()
            raise

    def set_constants(self, values: Mapping[str, Array]) -> None:
        """Set the inputs that do not change from step to step (label embeddings and their scale), by input name."""
        labels = len(values["text_embeddings"])
        for item in self._loaded:
            if item.labels is not None and labels > item.labels:
                raise EngineError(f"{labels} labels are more than the {item.labels} that the engine {item.file} takes")
        with self._driver.current():
            for name, value in values.items():
                if name in self._constants:
                    self._driver.free(self._constants.pop(name).address)
                self._constants[name] = self._twin(value, f"the input '{name}'")
                self._driver.upload(self._constants[name].address, np.ascontiguousarray(value))
            self._driver.wait()
            self._allocate_outputs({"C": labels})

    def run(self, first: int, stop: int) -> None:
        """One step of the slots first..stop; every slot in the range runs, in place."""
        if self._broken is not None:
            raise EngineError(self._broken)
        try:
            with self._driver.current():
                graph = self._captured.get((first, stop))
                if graph is None:
                    graph = self._capture(first, stop)
                else:
                    self._captured.move_to_end((first, stop))
                self._driver.launch(graph)
                self._driver.wait()
        except DeviceError as error:
            self._broken = str(error)
            raise

    def state_names(self) -> list[str]:
        return list(self._states)

    def state_address(self, name: str) -> int:
        """Address of a state's device memory, for showing that nothing moves it."""
        return self._states[name].address

    def read_state(self, name: str, slot: int) -> Array:
        """A copy of one stream's state."""
        buffer = self._states[name]
        with self._driver.current():
            host = np.empty(buffer.shape[1:], buffer.dtype)
            self._driver.download(host, buffer.at(slot))
            self._driver.wait()
        return host

    def write_state(self, name: str, slot: int, value: Array) -> None:
        buffer = self._states[name]
        with self._driver.current():
            self._driver.upload(buffer.at(slot), np.ascontiguousarray(value, buffer.dtype))
            self._driver.wait()

    def zero_states(self, slot: int) -> None:
        with self._driver.current():
            for buffer in self._states.values():
                self._driver.zero(buffer.at(slot), buffer.row_bytes)
            self._driver.wait()

    def close(self) -> None:
        self._captured.clear()
        self._release()

    def _load(self, bundle: Bundle, name: str, target: Target) -> _Loaded:
        graph = bundle.manifest.graphs[name]
        file, entry = find_engine(bundle, name, target, self._streams)
        content = read_engine(bundle, file, entry)
        messages = Messages(self._trt)
        runtime = self._trt.Runtime(messages.logger)
        # an engine for later versions brings the runtime of its own version along
        runtime.engine_host_code_allowed = entry.version_compatible
        free = self._driver.free_bytes()
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            need = ""
            if any("memory" in message.lower() for message in messages.errors):
                need = f" ({len(content)} bytes of engine, {free} bytes free on the GPU)"
            raise EngineError(f"{bundle.file(file)}: {self._flavour} cannot load it{need}: {messages.last_error()}")
        _check_engine(f"{bundle.file(file)}", self._trt, engine, graph, bundle.manifest)
        copied = tuple(
            use.state
            for use in graph.states
            if use.output is not None and engine.get_aliased_input_tensor(use.output) != use.input
        )
        return _Loaded(graph, file, entry.labels, engine, (runtime, messages), copied, {})

    def _capture(self, first: int, stop: int) -> Any:
        start = self._first_aligned(first)
        while len(self._captured) >= MOST_GRAPHS:
            key, old = self._captured.popitem(last=False)
            self._driver.drop(old)
            for item in self._loaded:
                item.contexts.pop(key)
        for item in self._loaded:  # a captured graph keeps using its contexts
            item.contexts[first, stop] = self._context(item, start, stop)
        # A step may run twice on the same frame: it writes the same slot with the same keys and values.
        for _ in range(WARM_UPS):
            self._step(first, stop, start)
        self._driver.wait()
        graph = self._captured[first, stop] = self._driver.capture(lambda: self._step(first, stop, start))
        return graph

    def _context(self, item: _Loaded, start: int, stop: int) -> Any:
        context = self._new_context(item.engine)
        context.set_device_memory(*self._scratch)
        bound: list[tuple[str, int, tuple[int, ...] | None]] = []
        for port in item.graph.inputs:
            buffer = self._input(port)
            shape = buffer.shape
            if port.shape and port.shape[0] == STREAMS:
                shape = (stop - start, *shape[1:])
            bound.append((port.name, buffer.address, shape))
        for port in item.graph.outputs:
            bound.append((port.name, self._values[port.name].address, None))
        for use in item.graph.states:
            state = self._states[use.state]
            bound.append((use.input, state.at(start), (stop - start, *state.shape[1:])))
            if use.output is not None:
                target = self._spares[use.state] if use.state in item.copied else state
                bound.append((use.output, target.at(start), None))
        for name, address, shape_of_input in bound:
            if shape_of_input is not None and not context.set_input_shape(name, shape_of_input):
                raise EngineError(f"{item.file}: TensorRT refused the shape {list(shape_of_input)} of '{name}'")
            if not context.set_tensor_address(name, address):
                raise EngineError(f"{item.file}: TensorRT refused the buffer of '{name}'")
        missing = context.infer_shapes()
        if missing:
            raise EngineError(f"{item.file}: TensorRT wants shapes of {', '.join(missing)}")
        return context

    def _new_context(self, engine: Any) -> Any:
        trt = self._trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED  # one scratch for all: they run in turns
        if self._flavour == "tensorrt":
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        # kernels that are exchanged later would not be the captured ones; and it is we who capture
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        return engine.create_execution_context(config)

    def _step(self, first: int, stop: int, start: int) -> None:
        """From the host's inputs to the host's outputs; nothing of it waits."""
        driver = self._driver
        driver.upload(self._inputs["frame"].address, self.frames[start:stop])
        driver.upload(self._inputs["position"].address, self.positions[start:stop])
        for item in self._loaded:
            if not item.contexts[first, stop].execute_async_v3(driver.stream):
                raise EngineError(f"{item.file}: TensorRT failed in a step: {item.messages.last_error()}")
            for name in item.copied:
                state, spare = self._states[name], self._spares[name]
                driver.copy(state.at(start), spare.at(start), (stop - start) * state.row_bytes)
        for name, host in self.outputs.items():
            driver.download(host[start:stop], self._values[name].address)

    def _first_aligned(self, first: int) -> int:
        """The first slot to run: TensorRT wants aligned addresses, and an idle slot in the range does no harm."""
        while any(first * state.row_bytes % ALIGNMENT for state in self._states.values()):
            first -= 1
        return first

    def _input(self, port: Port) -> _Buffer:
        if port.role in self._inputs:
            return self._inputs[port.role]
        if port.role == "output":
            return self._values[port.name]
        if port.role not in self._constants:
            raise EngineError(f"input '{port.name}' needs labels; set them before the first step")
        return self._constants[port.role]

    def _allocate_outputs(self, sizes: Mapping[str, int]) -> None:
        for graph in self._captured.values():
            self._driver.drop(graph)
        self._captured.clear()
        for item in self._loaded:
            item.contexts.clear()
        known = {STREAMS: self._streams, "C": 0, **sizes}
        self.outputs = {}
        for item in self._loaded:
            for port in item.graph.outputs:
                shape = tuple(known[n] if isinstance(n, str) else n for n in port.shape)
                old = self._values.get(port.name)
                if old is not None and old.shape != shape:
                    self._driver.free(old.address)
                if old is None or old.shape != shape:
                    self._values[port.name] = self._buffer(shape, port.dtype, f"the output '{port.name}'")
                if port.name in self._asked:
                    self.outputs[port.name] = self._driver.pinned(shape, port.dtype)
        self.outputs = {name: self.outputs[name] for name in self._asked}
        self._driver.wait()

    def _buffer(self, shape: Sequence[int | str], dtype: str, what: str) -> _Buffer:
        sizes = tuple(int(n) for n in shape)
        size = int(np.prod(sizes, dtype=np.int64)) * np.dtype(dtype).itemsize
        return _Buffer(self._driver.allocate(size, what), sizes, dtype)

    def _twin(self, host: Array, what: str) -> _Buffer:
        return self._buffer(host.shape, str(host.dtype), what)


@dataclass(frozen=True)
class _Buffer:
    """Device memory; the first axis is that of the slots, where there is one."""

    address: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Of one slot."""
        return int(np.prod(self.shape[1:], dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def at(self, slot: int) -> int:
        return self.address + slot * self.row_bytes


@dataclass(frozen=True)
class _Loaded:
    """A graph's engine on the device.

    Attributes:
        labels: the most that it takes; None where it takes none.
        runtime: what has to live as long as the engine.
        copied: states that it does not update in place.
        contexts: by range of slots.
    """

    graph: Graph
    file: str
    labels: int | None
    engine: Any
    runtime: tuple[Any, Messages]
    copied: tuple[str, ...]
    contexts: dict[tuple[int, int], Any]

    @property
    def messages(self) -> Messages:
        return self.runtime[1]


def find_target(manifest: Manifest) -> Target:
    """The TensorRT and the GPU of this machine.

    Raises:
        EngineError: one is missing.
    """
    flavour = _flavour_of(manifest)
    version = str(import_flavour(flavour).__version__)
    driver = CudaDriver()
    try:
        return Target(flavour, version, driver.compute_capability)
    finally:
        driver.close()


def _flavour_of(manifest: Manifest) -> str:
    """Of the installed flavours, one that the bundle has engines of."""
    built = {entry.flavour for entry in manifest.engines.values()}
    return next((flavour for flavour in installed_flavours() if flavour in built), None) or choose_flavour()


def _check_engine(where: str, trt: Any, engine: Any, graph: Graph, manifest: Manifest) -> None:
    """Compare an engine with what the manifest says of its graph: buffers are bound by the manifest alone."""
    states = {state.name: state for state in manifest.states}
    declared = {port.name: port.dtype for port in (*graph.inputs, *graph.outputs)}
    for use in graph.states:
        for name in (use.input, use.output):
            if name is not None:
                declared[name] = states[use.state].dtype
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))).name for name in names}
    if found != declared:
        name = next(name for name in (*declared, *found) if declared.get(name) != found.get(name))
        raise EngineError(
            f"{where}: '{name}' is {found.get(name, 'absent')} in the engine and {declared.get(name, 'absent')} in the"
            " manifest; build the engine again"
        )


def _release(driver: CudaDriver, loaded: list[_Loaded]) -> None:
    """Free TensorRT's objects, then the memory that they used."""
    try:
        with driver.current():
            loaded.clear()
    except FramestepError:
        loaded.clear()
    driver.close()
