"""The TensorRT engine: compiled graphs over device buffers, a frame being one launch of a CUDA graph and one wait.

A state's input and output are bound to the same memory, which TensorRT's KV-cache layer updates in place; a state that
some graph updates otherwise has a second buffer, and is copied back within the step. The upload of frames and positions
from pinned memory, all graphs and the download of the asked outputs are captured once for each range of slots. Outputs
that nobody asked for stay on the device. A graph that is run by itself is captured for one token, which is how a
decoder speaks, and put on the stream call by call for several.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle
from ..errors import EngineError, FramestepError
from ..manifest import STREAMS, Manifest, Port
from .buffers import BufferEngine, missing_labels
from .cuda_driver import ALIGNMENT, Buffer, CudaDriver, DeviceError
from .engine_files import Target
from .tensorrt_graph import Binding, CompiledGraph, KernelCache, OwnGraph
from .tensorrt_package import choose_flavour, import_flavour, installed_flavours

Array = npt.NDArray[Any]
MOST_GRAPHS = 64  # captured ranges of slots that are kept
WARM_UPS = 2  # runs before a capture: TensorRT sets itself up for new shapes in the first one
# Where engines and contexts come and go TensorRT may wait for the whole device, which breaks a capture in any thread.
_alone = threading.RLock()


class TensorRtEngine(BufferEngine):
    """Runs the graphs of a bundle for a range of stream slots.

    Args:
        bundle: with engines that fit this machine, flattened to one precision.
        graphs: names of the graphs to run, in order.
        outputs: names of the outputs to bring to the host.
        streams: number of slots.
        own_graphs: names of the graphs that are run by themselves.

    Attributes:
        frames: uint8 [streams, height, width, 3], pinned, the input of the next step; write into it.
        positions: int64 [streams], frames since reset; write into it.
        outputs: float32 [streams, ...] by name, filled by `run_range`.

    Raises:
        EngineError: TensorRT, the GPU or a fitting engine is missing, or there is too little memory.
    """

    def __init__(
        self,
        bundle: Bundle,
        graphs: Sequence[str],
        outputs: Sequence[str],
        streams: int,
        own_graphs: Sequence[str] = (),
    ) -> None:
        manifest = bundle.manifest
        super().__init__(manifest, own_graphs)
        self._asked = tuple(outputs)
        self._streams = streams
        self._chunk = 1 if manifest.language is None else manifest.language.chunk
        flavour = _flavour_of(manifest)
        trt = import_flavour(flavour)
        self._driver = CudaDriver()
        self._loaded: list[CompiledGraph] = []
        self._own: dict[str, OwnGraph] = {}
        self._kernels = KernelCache(bundle)
        self._captured: OrderedDict[Hashable, Any] = OrderedDict()
        self._broken: str | None = None
        # also at the interpreter's exit
        self._release = weakref.finalize(self, _release, self._driver, self._loaded, self._own, self._kernels)
        target = Target(flavour, str(trt.__version__), self._driver.compute_capability)
        frame = manifest.frame
        self._declared = {state.name: state for state in manifest.states}
        try:
            with _alone, self._driver.current():
                self._loaded += [CompiledGraph(trt, self._driver, bundle, name, target, streams) for name in graphs]
                for name in own_graphs:
                    compiled = CompiledGraph(trt, self._driver, bundle, name, target, 1)
                    self._own[name] = OwnGraph(self._driver, name, compiled, self._chunk)
                everything = self._everything()
                self.frames = self._driver.pinned((streams, frame.height, frame.width, 3), "uint8")
                self.positions = self._driver.pinned((streams,), "int64")
                self._inputs = {
                    "frame": self._twin(self.frames, "frames"),
                    "position": self._twin(self.positions, "positions"),
                }
                in_steps = {use.state for item in self._loaded for use in item.graph.states}
                used = dict.fromkeys(use.state for item in everything for use in item.graph.states)
                self._states = {name: self._state(name, f"the state '{name}'", name in in_steps) for name in used}
                self._spares = {
                    name: self._state(name, f"a second copy of the state '{name}'", name in in_steps)
                    for name in dict.fromkeys(name for item in everything for name in item.copied)
                }
                scratch = max((item.scratch for item in everything), default=0)
                self._scratch = self._driver.allocate(scratch, "TensorRT's activations"), scratch
                self._driver.wait()
                self._constants: dict[str, Buffer] = {}
                self._values: dict[str, Buffer] = {}
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
        with self._turn, _alone, self._driver.current():
            for name, value in values.items():
                if name in self._constants:
                    self._driver.free(self._constants.pop(name).address)
                self._constants[name] = self._twin(value, f"the input '{name}'")
                self._driver.upload(self._constants[name].address, np.ascontiguousarray(value))
            self._driver.wait()
            self._allocate_outputs({"C": labels})

    def run_range(self, first: int, stop: int) -> None:
        """One step of the slots first..stop; every slot in the range runs, in place."""
        with self._at_work():
            if (first, stop) not in self._captured:
                start = self._first_aligned(first)
                with _alone:
                    for item in self._loaded:  # a captured graph keeps using its contexts
                        item.contexts[first, stop] = self._context(item, start, stop)
                    # A step may run twice on the same frame: it writes the same slot with the same keys and values.
                    self._capture((first, stop), lambda: self._step(first, stop, start))
            self._launch((first, stop))
            self._driver.wait()

    def run_graph(self, slot: int, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `BufferEngine.run_graph`."""
        own = self._own[name]
        tokens = own.tokens(inputs)
        if tokens > self._chunk:
            raise EngineError(
                f"graph '{name}': {tokens} tokens are more than the {self._chunk} that its engine takes at once"
            )
        with self._at_work():
            for key, array in inputs.items():
                own.view(key, tokens)[...] = array
            if tokens == 1:
                if (name, slot) not in self._captured:
                    with _alone:
                        own.compiled.contexts[name, slot] = self._own_context(own, slot, 1, captured=True)
                        # Twice the same: it writes the same slots with the same numbers.
                        self._capture((name, slot), lambda: self._run_own(own, slot, 1, (name, slot)))
                self._launch((name, slot))
            else:
                own.compiled.contexts[name] = self._own_context(own, slot, tokens, captured=False)
                self._run_own(own, slot, tokens, name)
            self._driver.wait()
            return {port.name: own.view(port.name, tokens).copy() for port in own.compiled.graph.outputs}

    def state_names(self) -> list[str]:
        return list(self._states)

    def state_address(self, name: str) -> int:
        """Address of a state's device memory, for showing that nothing moves it."""
        return self._states[name].address

    def read_state(self, name: str, slot: int) -> Array:
        """A copy of one stream's state."""
        buffer = self._states[name]
        with self._turn, self._driver.current():
            host = np.empty(buffer.shape[1:], buffer.dtype)
            self._driver.download(host, buffer.at(slot))
            self._driver.wait()
        return host

    def write_state(self, name: str, slot: int, value: Array) -> None:
        buffer = self._states[name]
        with self._turn, self._driver.current():
            self._driver.upload(buffer.at(slot), np.ascontiguousarray(value, buffer.dtype))
            self._driver.wait()

    def zero_states(self, slot: int, names: Sequence[str] | None = None) -> None:
        with self._turn, self._driver.current():
            for name in self._states if names is None else names:
                buffer = self._states[name]
                self._driver.zero(buffer.at(slot), buffer.row_bytes)
            self._driver.wait()

    def close(self) -> None:
        with self._turn:
            if self._release.alive:
                with suppress(DeviceError), self._driver.current():
                    self._kernels.save()
            self._captured.clear()
            self._release()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """This thread's turn on the device. A device that failed is not asked again."""
        with self._turn:
            if self._broken is not None:
                raise EngineError(self._broken)
            try:
                with self._driver.current():
                    yield
            except DeviceError as error:
                self._broken = str(error)
                raise

    def _everything(self) -> list[CompiledGraph]:
        return [*self._loaded, *(own.compiled for own in self._own.values())]

    def _capture(self, key: Hashable, work: Callable[[], None]) -> None:
        while len(self._captured) >= MOST_GRAPHS:
            old, graph = self._captured.popitem(last=False)
            self._driver.drop(graph)
            for item in self._everything():
                item.contexts.pop(old, None)
        for _ in range(WARM_UPS):
            work()
        self._driver.wait()
        self._captured[key] = self._driver.capture(work)

    def _launch(self, key: Hashable) -> None:
        self._captured.move_to_end(key)
        self._driver.launch(self._captured[key])

    def _context(self, item: CompiledGraph, start: int, stop: int) -> Any:
        """A context for a step of the slots start..stop."""
        bound: list[Binding] = []
        for port in item.graph.inputs:
            buffer = self._input(port)
            shape = buffer.shape
            if port.shape and port.shape[0] == STREAMS:
                shape = (stop - start, *shape[1:])
            bound.append((port.name, buffer.address, shape))
        bound += [(port.name, self._values[port.name].address, None) for port in item.graph.outputs]
        context = item.new_context(self._scratch, self._kernels, captured=True)
        item.bind(context, [*bound, *self._bound_states(item, start, stop)])
        return context

    def _own_context(self, own: OwnGraph, slot: int, tokens: int, captured: bool) -> Any:
        """A context for one slot and so many tokens; one that is not captured serves them all in turn."""
        item = own.compiled
        context = None if captured else item.contexts.get(own.name)
        if context is None:
            with _alone:
                context = item.new_context(self._scratch, self._kernels, captured)
            several = not captured and item.profiles > 1
            if several and not context.set_optimization_profile_async(1, self._driver.stream):
                raise EngineError(f"{item.file}: TensorRT refused the profile for several tokens")
        inputs = {port.name for port in item.graph.inputs}
        bound: list[Binding] = [
            (port.name, own.buffers[port.name].address, own.shape(port, tokens) if port.name in inputs else None)
            for port in own.ports
        ]
        item.bind(context, [*bound, *self._bound_states(item, slot, slot + 1)])
        return context

    def _bound_states(self, item: CompiledGraph, start: int, stop: int) -> Iterator[Binding]:
        for use in item.graph.states:
            state = self._states[use.state]
            yield use.input, state.at(start), (stop - start, *state.shape[1:])
            if use.output is not None:
                target = self._spares[use.state] if use.state in item.copied else state
                yield use.output, target.at(start), None

    def _run_own(self, own: OwnGraph, slot: int, tokens: int, context: Hashable) -> None:
        """From the host's inputs to the host's outputs; nothing of it waits."""
        item = own.compiled
        for port in item.graph.inputs:
            self._driver.upload(own.buffers[port.name].address, own.view(port.name, tokens))
        item.execute(item.contexts[context], self._driver.stream)
        self._copy_back(item, slot, slot + 1)
        for port in item.graph.outputs:
            self._driver.download(own.view(port.name, tokens), own.buffers[port.name].address)

    def _copy_back(self, item: CompiledGraph, start: int, stop: int) -> None:
        for name in item.copied:
            state, spare = self._states[name], self._spares[name]
            self._driver.copy(state.at(start), spare.at(start), (stop - start) * state.row_bytes)

    def _step(self, first: int, stop: int, start: int) -> None:
        """From the host's inputs to the host's outputs; nothing of it waits."""
        driver = self._driver
        driver.upload(self._inputs["frame"].address, self.frames[start:stop])
        driver.upload(self._inputs["position"].address, self.positions[start:stop])
        for item in self._loaded:
            item.execute(item.contexts[first, stop], driver.stream)
            self._copy_back(item, start, stop)
        for name, host in self.outputs.items():
            driver.download(host[start:stop], self._values[name].address)

    def _first_aligned(self, first: int) -> int:
        """The first slot to run: TensorRT wants aligned addresses, and an idle slot in the range does no harm."""
        while any(first * state.stride % ALIGNMENT for state in self._states.values()):
            first -= 1
        return first

    def _input(self, port: Port) -> Buffer:
        if port.role in self._inputs:
            return self._inputs[port.role]
        if port.role == "output":
            return self._values[port.name]
        if port.role not in self._constants:
            raise missing_labels(port.name)
        return self._constants[port.role]

    def _allocate_outputs(self, sizes: Mapping[str, int]) -> None:
        for graph in self._captured.values():
            self._driver.drop(graph)
        self._captured.clear()
        for item in self._everything():
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

    def _state(self, name: str, what: str, in_steps: bool) -> Buffer:
        """Memory of a state. A step wants the slots side by side; a graph by itself, each at an aligned address."""
        state = self._declared[name]
        shape = (self._streams, *(int(n) for n in state.shape[1:]))
        return Buffer.allocate(self._driver, shape, state.dtype, what, 1 if in_steps else ALIGNMENT)

    def _buffer(self, shape: Sequence[int | str], dtype: str, what: str) -> Buffer:
        return Buffer.allocate(self._driver, tuple(int(n) for n in shape), dtype, what)

    def _twin(self, host: Array, what: str) -> Buffer:
        return self._buffer(host.shape, str(host.dtype), what)


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


def _release(driver: CudaDriver, loaded: list[CompiledGraph], own: dict[str, OwnGraph], kernels: KernelCache) -> None:
    """Free TensorRT's objects, `kernels` after the contexts that have them, then the memory that they used."""
    with _alone:
        try:
            with driver.current():
                loaded.clear()
                own.clear()
        except FramestepError:
            loaded.clear()
            own.clear()
        driver.close()
