"""The ONNX Runtime engine: step graphs over bound buffers, state updated in place.

A state's output is bound to the memory of its input, so `TensorScatter` writes only the new slot. (ONNX Runtime says
`in-place optimization not activated` in its log when it had to copy; that would be a bug here.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle import STREAMS, Bundle, Graph, Port, State
from ..errors import BundleError, EngineError

Array = npt.NDArray[Any]
ALIGNMENT = 64  # bytes
WARNING = 2  # ONNX Runtime's severity
# MatMulAddFusion makes a Gemm with a float bias, which is no integer product; CommonSubexpressionElimination merges the
# quantizers of layers that share an input, and a shared one is not fused. Such layers would run in float.
BREAK_INTEGER_PRODUCTS = ["MatMulAddFusion", "CommonSubexpressionElimination"]
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}


class OnnxRuntimeEngine:
    """Runs the graphs of a bundle for a range of stream slots.

    Args:
        bundle: where the graphs are.
        graphs: names of the graphs to run, in order.
        outputs: names of the outputs to bring to the host.
        streams: number of slots.
        device: "cpu" or "cuda".
        threads: threads for one operator.

    Attributes:
        frames: uint8 [streams, height, width, 3], the input of the next step; write into it.
        positions: int64 [streams], frames since reset; write into it.
        outputs: float32 [streams, ...] by name, filled by `run`.
    """

    def __init__(
        self,
        bundle: Bundle,
        graphs: Sequence[str],
        outputs: Sequence[str],
        streams: int,
        device: str,
        threads: int,
    ) -> None:
        ort = _import()
        manifest = bundle.manifest
        self._graphs = [manifest.graphs[name] for name in graphs]
        self._streams = streams
        self._device = device
        self._asked = tuple(outputs)
        self.frames = _aligned((streams, manifest.frame.height, manifest.frame.width, 3), "uint8")
        self.positions = _aligned((streams,), "int64")
        self._constants: dict[str, Array] = {}  # label inputs by name
        self._values: dict[str, _Buffer] = {}  # outputs of graphs by name
        self.outputs: dict[str, Array] = {}
        self._bindings: dict[tuple[int, int], list[Any]] = {}
        used = {use.state for graph in self._graphs for use in graph.states}
        self._states = {
            state.name: _Buffer.allocate(ort, (streams, *_sizes(state.shape[1:])), state.dtype, device)
            for state in manifest.states
            if state.name in used
        }
        options = _session_options(ort, threads)
        disabled = BREAK_INTEGER_PRODUCTS if "int8" in manifest.precision else None
        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
        self._sessions = []
        for graph in self._graphs:
            path = bundle.file(graph.file)
            try:
                session = ort.InferenceSession(str(path), options, [provider], disabled_optimizers=disabled)
            except Exception as error:  # ONNX Runtime's own exception types are not stable
                raise EngineError(f"{path}: ONNX Runtime {ort.__version__} cannot load it: {_line(error)}") from None
            if provider not in session.get_providers():
                raise EngineError(f"{path}: ONNX Runtime could not use {provider} and took another; see its log")
            _check_ports(path, graph, manifest.states, session)
            self._sessions.append(session)
        self._allocate_outputs({})

    def set_constants(self, values: Mapping[str, Array]) -> None:
        """Set the inputs that do not change from step to step (label embeddings and their scale), by input name."""
        self._constants = {name: np.ascontiguousarray(value) for name, value in values.items()}
        self._allocate_outputs({"C": len(values["text_embeddings"])})

    def run(self, first: int, stop: int) -> None:
        """One step of the slots first..stop; every slot in the range runs, in place."""
        bindings = self._bindings.get((first, stop))
        if bindings is None:
            bindings = self._bindings[first, stop] = self._bind(first, stop)
        try:
            for session, binding in zip(self._sessions, bindings, strict=True):
                session.run_with_iobinding(binding)
        except Exception as error:
            raise EngineError(f"ONNX Runtime failed in a step: {_line(error)}") from None

    def state_names(self) -> list[str]:
        return list(self._states)

    def state_address(self, name: str) -> int:
        """Address of a state's memory, for showing that nothing moves it."""
        return self._states[name].address

    def read_state(self, name: str, slot: int) -> Array:
        """A copy of one stream's state."""
        return self._states[name].read(slot)

    def write_state(self, name: str, slot: int, value: Array) -> None:
        self._states[name].write(slot, value)

    def zero_states(self, slot: int) -> None:
        for buffer in self._states.values():
            buffer.write(slot, np.zeros(buffer.shape[1:], buffer.dtype))

    def close(self) -> None:
        self._bindings.clear()
        self._sessions.clear()
        self._states.clear()

    def _allocate_outputs(self, sizes: Mapping[str, int]) -> None:
        ort = _import()
        self._bindings.clear()
        sizes = {STREAMS: self._streams, "C": 0, **sizes}
        self._values = {}
        for graph in self._graphs:
            for port in graph.outputs:
                shape = tuple(sizes[n] if isinstance(n, str) else n for n in port.shape)
                # what nobody asked for stays where it was computed
                place = "cpu" if port.name in self._asked else self._device
                self._values[port.name] = _Buffer.allocate(ort, shape, port.dtype, place)
        self.outputs = {name: array for name in self._asked if (array := self._values[name].array) is not None}

    def _bind(self, first: int, stop: int) -> list[Any]:
        bindings = []
        for graph, session in zip(self._graphs, self._sessions, strict=True):
            binding = session.io_binding()
            for port in graph.inputs:
                self._input(port).bind(binding.bind_input, port.name, *self._range(port, first, stop))
            for port in graph.outputs:
                self._values[port.name].bind(binding.bind_output, port.name, *self._range(port, first, stop))
            for use in graph.states:
                self._states[use.state].bind(binding.bind_input, use.input, first, stop)
                if use.output is not None:
                    self._states[use.state].bind(binding.bind_output, use.output, first, stop)
            bindings.append(binding)
        return bindings

    def _input(self, port: Port) -> _Buffer:
        if port.role == "frame":
            return _Buffer.over(self.frames)
        if port.role == "position":
            return _Buffer.over(self.positions)
        if port.role == "output":
            return self._values[port.name]
        if port.role not in self._constants:
            raise EngineError(f"input '{port.name}' needs labels; set them before the first step")
        return _Buffer.over(self._constants[port.role])

    def _range(self, port: Port, first: int, stop: int) -> tuple[int, int] | tuple[None, None]:
        return (first, stop) if port.shape and port.shape[0] == STREAMS else (None, None)


@dataclass
class _Buffer:
    """Memory on a device, viewed through its address; the first axis is that of the slots."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    device: str
    address: int
    array: Array | None  # host memory
    owner: Any  # keeps device memory alive

    @classmethod
    def over(cls, array: Array) -> _Buffer:
        return cls(array.shape, array.dtype, "cpu", array.ctypes.data, array, None)

    @classmethod
    def allocate(cls, ort: Any, shape: tuple[int, ...], dtype: str, device: str) -> _Buffer:
        try:
            if device == "cpu":
                return cls.over(_aligned(shape, dtype))
            value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype), device, 0)
        except (MemoryError, ValueError, RuntimeError) as error:
            size = int(np.prod(shape, dtype=np.float64)) * np.dtype(dtype).itemsize
            raise EngineError(f"no memory on {device} for a buffer of {size} bytes ({_line(error)})") from None
        return cls(shape, np.dtype(dtype), device, value.data_ptr(), None, value)

    def bind(self, bind: Any, name: str, first: int | None, stop: int | None) -> None:
        shape, address = self.shape, self.address
        if first is not None and stop is not None:
            assert 0 <= first < stop <= self.shape[0], (name, first, stop, self.shape)
            shape = (stop - first, *self.shape[1:])
            address += first * int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        bind(name, self.device, 0, self.dtype.type, shape, address)

    def read(self, slot: int) -> Array:
        whole: Array = self.array if self.array is not None else self.owner.numpy()
        copy: Array = whole[slot].copy()
        return copy

    def write(self, slot: int, value: Array) -> None:
        if self.array is not None:
            self.array[slot] = value
            return
        whole = self.owner.numpy()
        whole[slot] = value
        self.owner.update_inplace(whole)


def available_devices() -> list[str]:
    """Devices that the installed ONNX Runtime can use here, fastest first."""
    ort = _import()
    if "CUDAExecutionProvider" not in ort.get_available_providers():  # those that it was built with
        return ["cpu"]
    try:
        ort.OrtValue.ortvalue_from_numpy(np.zeros(1, np.float32), "cuda", 0)
    except Exception:  # no GPU, no driver, or one that does not fit
        return ["cpu"]
    return ["cuda", "cpu"]


def _check_ports(path: Path, graph: Graph, states: Sequence[State], session: Any) -> None:
    """Compare a graph with what the manifest says of it: buffers are bound by the manifest alone."""
    by_name = {state.name: state for state in states}
    declared_inputs = {port.name: (port.dtype, port.shape) for port in graph.inputs}
    declared_outputs = {port.name: (port.dtype, port.shape) for port in graph.outputs}
    for use in graph.states:
        state = by_name[use.state]
        declared_inputs[use.input] = (state.dtype, state.shape)
        if use.output is not None:
            declared_outputs[use.output] = (state.dtype, state.shape)
    for kind, declared, found in (
        ("input", declared_inputs, session.get_inputs()),
        ("output", declared_outputs, session.get_outputs()),
    ):
        actual = {port.name: (_DTYPES.get(port.type, port.type), tuple(port.shape)) for port in found}
        if actual != declared:
            name = next(n for n in (*declared, *actual) if declared.get(n) != actual.get(n))
            raise BundleError(
                f"{path}: {kind} '{name}' is {_port(actual.get(name))} in the graph"
                f" and {_port(declared.get(name))} in the manifest; export the bundle again"
            )


def _port(port: tuple[str, tuple[int | str, ...]] | None) -> str:
    return "absent" if port is None else f"{port[0]} [{', '.join(map(str, port[1]))}]"


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise EngineError(
            "the onnxruntime engine needs ONNX Runtime: pip install 'framestep[cpu]' (or 'framestep[gpu]')"
        ) from None
    return onnxruntime


def _session_options(ort: Any, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1  # a step graph is a chain; there is nothing to run side by side
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = WARNING
    # spin between operators, where a wake-up would cost more than it saves, but not between frames
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # weights in blocks of integers: multiply integers (4), not floats; only such layers are concerned
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    return options


def _aligned(shape: tuple[int, ...], dtype: str) -> Array:
    """Zeroed memory that starts on a cache line."""
    kind = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)


def _sizes(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(int(n) for n in shape)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
