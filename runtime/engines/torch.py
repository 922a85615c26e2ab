"""The torch engine: a bundle's ONNX graphs run by PyTorch, with our kernels for attention over a ring.

On a CPU it is the readable reference. On CUDA a step is captured once for each range of slots as a CUDA graph, copies
from and to pinned host memory included: a frame is then one launch and one synchronisation. So is a decoder's step of
one token, or of a number of tokens that recurs, captured for each slot.

What it computes in is asked for with the engine's name: `torch` computes in the types of the graph, and `torch:fp16`,
`torch:bf16`, `torch:tf32` and `torch:fp32` in that, whatever the graph has: weights, state and arithmetic of every
graph that carries state. (`torch:tf32` keeps float32 and lets the matrix units round the operands of products to 10
bits; no other lets them.) Graphs without state always compute in float32: the scoring of labels, where small
differences count, tables of embeddings, and a vision tower without memory, whose sums half precision may not hold. What
enters and leaves, saved states included, has the types of the manifest. A decoder's weights in blocks of INT4 or INT8
stay so in the memory of a GPU.
"""

from __future__ import annotations

import importlib.util
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle
from ..counted import counted
from ..errors import EngineError
from ..manifest import STREAMS, Graph, Port
from .buffers import BufferEngine, missing_labels
from .onnx_program import read_graph

try:
    import torch
    from torch import Tensor

    from ...kernels import operators
    from .torch_program import Attend, Program
except ImportError as error:
    raise EngineError(f"the torch engine needs PyTorch: pip install 'framestep[torch]' ({error})") from None

Array = npt.NDArray[Any]
Shapes = tuple[tuple[int, ...], ...]  # of a run's inputs
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MOST_GRAPHS = 64  # captured ranges of slots that are kept, and as many runs of graphs by themselves
WARM_UPS = 3  # runs before a capture: libraries choose their kernels and allocate in the first ones
PREFILL_FRAMES = 32  # at once; bounds the memory of `prefill`
# A capture begins with a wait for the whole device, which fails while another one runs; and products have one precision
# in the whole process.
_capturing = threading.RLock()


@dataclass(frozen=True)
class _Launch:
    """A captured run of one graph for one slot, and the pinned memory that it copies from and to."""

    graph: Any
    inputs: dict[str, Array]
    outputs: dict[str, Array]


class TorchEngine(BufferEngine):
    """Runs the graphs of a bundle for a range of stream slots.

    Args:
        bundle: where the graphs are.
        graphs: names of the graphs to run, in order.
        outputs: names of the outputs to bring to the host.
        streams: number of slots.
        device: "cpu" or "cuda".
        threads: of PyTorch, on a CPU; the whole process has one number.
        precision: one of `PRECISIONS`, or None for the graphs' own types.
        own_graphs: names of the graphs that are run by themselves.

    Attributes:
        frames: uint8 [streams, height, width, 3], the input of the next step; write into it.
        positions: int64 [streams], frames since reset; write into it.
        outputs: [streams, ...] by name, filled by `run_range`.
    """

    def __init__(
        self,
        bundle: Bundle,
        graphs: Sequence[str],
        outputs: Sequence[str],
        streams: int,
        device: str,
        threads: int,
        precision: str | None = None,
        own_graphs: Sequence[str] = (),
    ) -> None:
        if device == "cuda" and importlib.util.find_spec("triton") is None:
            raise EngineError("the torch engine needs Triton on a GPU: pip install 'framestep[torch]'")
        manifest = bundle.manifest
        super().__init__(manifest, own_graphs)
        self._device = torch.device(device)
        self._threads = threads
        self._tf32 = precision == "tf32"
        self._streams = streams
        self._asked = tuple(outputs)
        self._graphs = [manifest.graphs[name] for name in graphs]
        frame = manifest.frame
        self._host_frames = self._host((streams, frame.height, frame.width, 3), torch.uint8)
        self._host_positions = self._host((streams,), torch.int64)
        self.frames = self._host_frames.numpy()
        self.positions = self._host_positions.numpy()
        self._frames = self._twin(self._host_frames)
        self._positions = self._twin(self._host_positions)
        self._host_outputs: dict[str, Tensor] = {}
        self.outputs = {}
        self._constants: dict[str, Tensor] = {}
        self._declared = {state.name: state for state in manifest.states}
        dtype = None if precision is None else PRECISIONS[precision]
        self._programs = [self._program(bundle, graph, dtype) for graph in self._graphs]
        own = self._own_graphs
        self._own_programs = {name: self._program(bundle, graph, dtype) for name, graph in own.items()}
        used = dict.fromkeys(use.state for graph in (*self._graphs, *own.values()) for use in graph.states)
        self._states: dict[str, Tensor] = {}
        try:
            for name in used:
                shape = (streams, *(int(size) for size in self._declared[name].shape[1:]))
                kind = getattr(torch, self._declared[name].dtype)
                floating = dtype is not None and kind.is_floating_point
                self._states[name] = torch.zeros(shape, dtype=dtype if floating else kind, device=self._device)
        except RuntimeError as error:
            raise EngineError(
                f"no memory on {device} for {counted(streams, 'stream')} ({_line(error)}); load fewer"
            ) from None
        self._captured: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._own_captured: OrderedDict[tuple[int, str, Shapes], _Launch] = OrderedDict()
        self._own_runs: Counter[tuple[str, Shapes]] = Counter()
        self._pool: Any = None
        self._side = torch.cuda.Stream() if device == "cuda" else None
        self._allocate_outputs({})

    def set_constants(self, values: Mapping[str, Array]) -> None:
        """Set the inputs that do not change from step to step (label embeddings and their scale), by input name."""
        self._constants = {name: torch.tensor(value, device=self._device) for name, value in values.items()}
        self._allocate_outputs({"C": len(values["text_embeddings"])})

    def run_range(self, first: int, stop: int) -> None:
        """One step of the slots first..stop; every slot in the range runs, in place."""
        with self._guard("a step"):
            if self._side is None:
                with self._arithmetic():
                    self._step(first, stop)
                return
            graph = self._captured.get((first, stop))
            if graph is None:
                graph = self._capture(first, stop)
            self._captured.move_to_end((first, stop))
            graph.replay()
            torch.cuda.current_stream().synchronize()

    def run_graph(self, slot: int, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `BufferEngine.run_graph`. On CUDA a run of the same sizes as a few before is captured."""
        graph = self._own_graphs[name]
        if name not in self._own_programs:  # the session was closed while this run waited for its turn
            raise EngineError("this session is closed")
        with self._guard(f"the graph '{name}'"):
            shapes = tuple(inputs[port.name].shape for port in graph.inputs)
            launch = self._own_captured.get((slot, name, shapes))
            if launch is not None:
                self._own_captured.move_to_end((slot, name, shapes))
                return _launched(launch, inputs)
            with self._arithmetic():
                with self._aside():
                    made = self._run_own(slot, name, {key: torch.tensor(array) for key, array in inputs.items()})
                    found = {key: value.to("cpu", copy=True).numpy() for key, value in made.items()}
                if self._side is None:
                    return found
                self._own_runs[name, shapes] += 1
                if self._own_runs[name, shapes] >= WARM_UPS:
                    # behind a run by this thread: a library that has not begun in a thread cannot in a capture
                    launch = self._capture_own(slot, name, inputs, found)
                    while len(self._own_captured) >= MOST_GRAPHS:
                        self._own_captured.popitem(last=False)
                    self._own_captured[slot, name, shapes] = launch
            return found

    def can_prefill(self) -> bool:
        """Whether `prefill` can run these graphs: every state is a ring that our attention reads and writes."""
        return all(program.prefills for program in self._programs)

    def prefill(self, slot: int, frames: npt.NDArray[np.uint8]) -> None:
        """Many frames of one stream at once, as so many steps would.

        Args:
            frames: uint8 [T, height, width, 3]. `positions[slot]` is the index of the first, and afterwards of the
                last one, whose `outputs` are given.
        """
        with self._guard("a prefill"), self._arithmetic():
            for start in range(0, len(frames), PREFILL_FRAMES):
                part = torch.tensor(frames[start : start + PREFILL_FRAMES], device=self._device)
                first = int(self.positions[slot])
                positions = torch.arange(first, first + len(part), device=self._device)
                made = self._compute(part, positions, slot, slot + 1, _prefill)
                last_part = start + len(part) == len(frames)
                self.positions[slot] = first + len(part) - last_part
            for name, host in self._host_outputs.items():
                host[slot].copy_(made[name][-1])

    def prime(self, slot: int, frames: Sequence[Array]) -> tuple[str, ...]:
        """See `PrefillEngine.prime`."""
        self.prefill(slot, self.fit(frames))
        return self.advance(slot)

    def state_names(self) -> list[str]:
        return list(self._states)

    def state_address(self, name: str) -> int:
        """Address of a state's memory, for showing that nothing moves it."""
        return int(self._states[name].data_ptr())

    def read_state(self, name: str, slot: int) -> Array:
        """A copy of one stream's state, in the manifest's type."""
        kind = getattr(torch, self._declared[name].dtype)
        array: Array = self._states[name][slot].to("cpu", kind, copy=True).numpy()
        return array

    def write_state(self, name: str, slot: int, value: Array) -> None:
        self._states[name][slot].copy_(torch.tensor(value))

    def zero_states(self, slot: int, names: Sequence[str] | None = None) -> None:
        for name in self._states if names is None else names:
            self._states[name][slot].zero_()

    def close(self) -> None:
        with self._turn, nullcontext() if self._side is None else _capturing:
            if self._side is not None:
                torch.cuda.synchronize()
            self._captured.clear()
            self._own_captured.clear()
            self._programs.clear()
            self._own_programs.clear()
            self._states.clear()
            self._constants.clear()

    def _program(self, bundle: Bundle, graph: Graph, dtype: torch.dtype | None) -> Program:
        position = next((port.name for port in graph.inputs if port.role == "position"), None)
        rings = [(use.input, use.output) for use in graph.states if use.output is not None]
        floats = dtype if graph.states else torch.float32
        return Program(read_graph(bundle.file(graph.file)), position, rings, floats, self._device)

    def _capture(self, first: int, stop: int) -> Any:
        with self._arithmetic():
            with self._aside():
                # A step may run twice on the same frame: it writes the same slot with the same keys and values.
                for _ in range(WARM_UPS):
                    self._step(first, stop)
            graph = self._record(lambda: self._step(first, stop))
        while len(self._captured) >= MOST_GRAPHS:
            self._captured.popitem(last=False)
        self._captured[first, stop] = graph
        return graph

    def _capture_own(self, slot: int, name: str, inputs: Mapping[str, Array], found: Mapping[str, Array]) -> _Launch:
        """A run with such inputs, which gave what was found."""
        given, made = ({key: self._host_like(array) for key, array in many.items()} for many in (inputs, found))

        def work() -> None:
            for key, value in self._run_own(slot, name, given).items():
                made[key].copy_(value.contiguous(), non_blocking=True)

        graph = self._record(work)
        return _Launch(graph, *({key: host.numpy() for key, host in many.items()} for many in (given, made)))

    def _record(self, work: Callable[[], None]) -> Any:
        """Capture what `work` asks of the device; it does not happen yet."""
        graph = torch.cuda.CUDAGraph()
        pool, self._pool = self._pool, None  # none is left by a capture that fails: it may stay marked as capturing
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # a capture that cannot end leaves its own in place
            # other sessions' threads go on allocating and stepping meanwhile
            torch.cuda.graph(graph, pool=pool, stream=self._side, capture_error_mode="thread_local"),
        ):
            work()
        self._pool = graph.pool()  # one graph runs at a time, so all may use the same memory
        return graph

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream that captures, where libraries then have their memory already; on a CPU just so."""
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield
        self._side.synchronize()

    def _run_own(self, slot: int, name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One of the own graphs over inputs on the host; the outputs are on the device, in the manifest's types."""
        graph = self._own_graphs[name]
        given = {key: value.to(self._device, non_blocking=True) for key, value in inputs.items()}
        given.update({use.input: self._states[use.state][slot : slot + 1] for use in graph.states})
        found = self._own_programs[name](given, _step)
        return {port.name: found[port.name].to(getattr(torch, port.dtype)) for port in graph.outputs}

    def _step(self, first: int, stop: int) -> None:
        """From the host's inputs to the host's outputs; on CUDA nothing of it waits."""
        if self._frames is not self._host_frames:
            self._frames[first:stop].copy_(self._host_frames[first:stop], non_blocking=True)
            self._positions[first:stop].copy_(self._host_positions[first:stop], non_blocking=True)
        made = self._compute(self._frames[first:stop], self._positions[first:stop], first, stop, _step)
        for name, host in self._host_outputs.items():
            host[first:stop].copy_(made[name].to(host.dtype).contiguous(), non_blocking=True)

    def _compute(self, frames: Tensor, positions: Tensor, first: int, stop: int, attend: Attend) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for graph, program in zip(self._graphs, self._programs, strict=True):
            inputs = {port.name: self._input(port, frames, positions, made) for port in graph.inputs}
            inputs.update({use.input: self._states[use.state][first:stop] for use in graph.states})
            found = program(inputs, attend)
            made.update({port.name: found[port.name] for port in graph.outputs})
        return made

    def _input(self, port: Port, frames: Tensor, positions: Tensor, made: Mapping[str, Tensor]) -> Tensor:
        if port.role == "frame":
            return frames
        if port.role == "position":
            return positions
        if port.role == "output":
            return made[port.name]
        if port.role not in self._constants:
            raise missing_labels(port.name)
        return self._constants[port.role]

    def _allocate_outputs(self, sizes: Mapping[str, int]) -> None:
        self._captured.clear()
        self._pool = None  # PyTorch refuses one all of whose graphs are gone
        sizes = {STREAMS: self._streams, "C": 0, **sizes}
        ports = {port.name: port for graph in self._graphs for port in graph.outputs}
        self._host_outputs = {}
        for name in self._asked:
            shape = tuple(sizes[n] if isinstance(n, str) else n for n in ports[name].shape)
            self._host_outputs[name] = self._host(shape, getattr(torch, ports[name].dtype))
        self.outputs = {name: tensor.numpy() for name, tensor in self._host_outputs.items()}

    def _host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Zeroed host memory; pinned where a GPU copies from and to it."""
        return torch.zeros(tuple(shape), dtype=dtype, pin_memory=self._device.type == "cuda")

    def _host_like(self, array: Array) -> Tensor:
        return self._host(array.shape, torch.from_numpy(array).dtype)

    def _twin(self, host: Tensor) -> Tensor:
        """The same on the device; on a CPU the very same."""
        return host if self._device.type == "cpu" else torch.zeros_like(host, device=self._device)

    @contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        """PyTorch's threads as this engine wants them, and its errors as ours."""
        try:
            if self._device.type == "cpu" and torch.get_num_threads() != self._threads:
                torch.set_num_threads(self._threads)
            with torch.inference_mode():
                yield
        except (RuntimeError, ValueError, IndexError) as error:
            raise EngineError(f"PyTorch failed in {what}: {_line(error)}") from None

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """The precision of products as this engine wants it. What was captured has it already."""
        with nullcontext() if self._side is None else _capturing:
            before = torch.get_float32_matmul_precision()
            wanted = "high" if self._tf32 else "highest"
            try:
                if before != wanted:
                    torch.set_float32_matmul_precision(wanted)
                yield
            finally:
                if before != wanted:
                    torch.set_float32_matmul_precision(before)


def available_devices() -> list[str]:
    """Devices that PyTorch can use here, fastest first."""
    return ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]


def _launched(launch: _Launch, inputs: Mapping[str, Array]) -> dict[str, Array]:
    for key, array in inputs.items():
        np.copyto(launch.inputs[key], array)
    launch.graph.replay()
    torch.cuda.current_stream().synchronize()
    return {key: array.copy() for key, array in launch.outputs.items()}


def _step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_ring: Tensor,
    value_ring: Tensor,
    position: Tensor,
    scale: float,
    *scales: Tensor,
) -> Tensor:
    mixed: Tensor
    if scales:
        mixed = operators.temporal_attention_int8(query, key, value, key_ring, value_ring, *scales, position, scale)
    else:
        mixed = operators.temporal_attention(query, key, value, key_ring, value_ring, position, scale)
    return mixed


def _prefill(
    query: Tensor, key: Tensor, value: Tensor, key_ring: Tensor, value_ring: Tensor, position: Tensor, scale: float
) -> Tensor:
    """The first axis holds the frames of one stream; the rest of the graph takes them for streams."""
    frames = (x.unsqueeze(0) for x in (query, key, value))
    mixed: Tensor = operators.causal_prefill(*frames, key_ring, value_ring, position[:1], scale)
    return mixed[0]


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
