"""The CUDA driver: the one place where pycuda and cuda-bindings are called.

pycuda has contexts, memory and streams and no CUDA graphs; cuda-bindings has those. Everything happens on the first
device, in its primary context, on one stream of its own for each `CudaDriver`.

The process has one pycuda context object and keeps it: pycuda frees memory from any thread only while the very object
that it was allocated under is current, and giving a primary context back leaves it current in that thread.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EngineError

Array = npt.NDArray[Any]
ALIGNMENT = 256  # bytes; what TensorRT asks of an address, and what the driver gives
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING, which pycuda has no name for
CAPTURES = 3  # attempts


class DeviceError(EngineError):
    """The GPU failed in what it was doing, or is gone. Nothing that was on it can be used any more."""


class CudaDriver:
    """A stream on the first GPU, the memory that was allocated for it, and the CUDA graphs captured on it.

    Every method but `current` wants the context to be current: call it inside `with driver.current()`.

    Raises:
        EngineError: a package or the driver is missing, or there is no GPU.
    """

    def __init__(self) -> None:
        self._cuda, self._graphs = _import()
        self._memory: dict[int, Any] = {}  # by address
        self._captured: list[Any] = []
        try:
            self._device, self._context = _first_device(self._cuda)
        except self._cuda.Error as error:
            raise EngineError(f"there is no NVIDIA GPU here that the driver can use ({_line(error)})") from None
        self._open = True
        with self.current():
            # with another one, a call on the default stream, in whatever thread, would break a capture
            self._stream = self._cuda.Stream(NON_BLOCKING)

    @property
    def stream(self) -> int:
        """Handle of the stream."""
        return int(self._stream.handle)

    @property
    def compute_capability(self) -> str:
        """Such as "8.6"."""
        major, minor = self._device.compute_capability()
        return f"{major}.{minor}"

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the GPU's context current in this thread, and turn the driver's errors into ours."""
        try:
            self._context.push()
            try:
                yield
            finally:
                self._cuda.Context.pop()
        except self._cuda.Error as error:
            raise DeviceError(
                f"the GPU failed or was lost ({_line(error)}); close the session and load it again"
            ) from None

    def free_bytes(self) -> int:
        """Device memory that nobody has allocated."""
        free, _ = self._cuda.mem_get_info()
        return int(free)

    def allocate(self, size: int, what: str) -> int:
        """Zeroed device memory that lives until `free` or `close`; its address.

        Raises:
            EngineError: there is not enough.
        """
        size = max(size, 1)
        try:
            memory = self._cuda.mem_alloc(size)
        except self._cuda.MemoryError:
            raise EngineError(
                f"no memory on the GPU for {what}: {size} bytes are needed and {self.free_bytes()} are free;"
                " load fewer streams, or end what else uses the GPU"
            ) from None
        address = int(memory)
        self._memory[address] = memory
        self.zero(address, size)
        return address

    def free(self, address: int) -> None:
        """Give memory back."""
        self._memory.pop(address).free()

    def pinned(self, shape: Sequence[int], dtype: str) -> Array:
        """Zeroed host memory that the GPU copies from and to."""
        if 0 in shape:  # the driver refuses to allocate nothing
            return np.zeros(shape, dtype)
        array: Array = self._cuda.pagelocked_empty(tuple(shape), np.dtype(dtype))
        array[...] = 0
        return array

    def upload(self, address: int, host: Array) -> None:
        """Copy to the device, in the order of the stream; while it captures, only from pinned memory."""
        if host.nbytes:
            self._cuda.memcpy_htod_async(address, host, self._stream)

    def download(self, host: Array, address: int) -> None:
        """Copy to the host, in the order of the stream; while it captures, only to pinned memory."""
        if host.nbytes:
            self._cuda.memcpy_dtoh_async(host, address, self._stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """Copy on the device, in the order of the stream."""
        self._cuda.memcpy_dtod_async(target, source, size, self._stream)

    def zero(self, address: int, size: int) -> None:
        """Set to zero, in the order of the stream."""
        self._cuda.memset_d8_async(address, 0, size, self._stream)

    def wait(self) -> None:
        """Until all that was put on the stream is done."""
        self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Any:
        """A CUDA graph of what `work` puts on the stream, for `launch`.

        Other threads may go on using the GPU meanwhile. Where one of them waits for the whole device, as libraries do,
        that breaks the capture, and `work` is captured again; nothing of it has run.
        """
        for _ in range(CAPTURES - 1):
            with suppress(EngineError, self._cuda.Error):
                return self._capture(work)
        return self._capture(work)

    def _capture(self, work: Callable[[], None]) -> Any:
        cu = self._graphs
        handle = cu.CUstream(self.stream)
        self._check(cu.cuStreamBeginCapture(handle, cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL))
        try:
            work()
        except BaseException:
            cu.cuStreamEndCapture(handle)  # the stream is of no use while it captures
            raise
        graph = self._check(cu.cuStreamEndCapture(handle))
        try:
            captured = self._check(cu.cuGraphInstantiate(graph, 0))
        finally:
            cu.cuGraphDestroy(graph)
        self._captured.append(captured)
        return captured, handle

    def launch(self, graph: Any) -> None:
        """Put a captured graph on the stream."""
        self._check(self._graphs.cuGraphLaunch(*graph))

    def drop(self, graph: Any) -> None:
        """Free a captured graph."""
        self._captured.remove(graph[0])
        self._graphs.cuGraphExecDestroy(graph[0])

    def close(self) -> None:
        """Free everything. A lost device frees its memory itself and refuses to be told so."""
        if not self._open:
            return
        self._open = False
        with suppress(DeviceError), self.current():
            for graph in self._captured:
                self._graphs.cuGraphExecDestroy(graph)
            for memory in self._memory.values():
                memory.free()
            self._stream = None
        self._captured.clear()
        self._memory.clear()

    def _check(self, found: tuple[Any, ...]) -> Any:
        status, *values = found
        if status != self._graphs.CUresult.CUDA_SUCCESS:
            raise DeviceError(f"the GPU failed or was lost ({status.name}); close the session and load it again")
        return values[0] if values else None


@dataclass(frozen=True)
class Buffer:
    """Device memory; the first axis is that of the slots, where there is one.

    Attributes:
        stride: bytes from one slot to the next.
    """

    address: int
    shape: tuple[int, ...]
    dtype: str
    stride: int

    @classmethod
    def allocate(cls, driver: CudaDriver, shape: tuple[int, ...], dtype: str, what: str, alignment: int = 1) -> Buffer:
        """Zeroed memory, each of whose slots begins at a multiple of so many bytes.

        Raises:
            EngineError: there is not enough; the message calls it `what`.
        """
        row = math.prod(shape[1:]) * np.dtype(dtype).itemsize
        stride = -(-row // alignment) * alignment
        return cls(driver.allocate(math.prod(shape[:1]) * stride, what), shape, dtype, stride)

    @property
    def row_bytes(self) -> int:
        """Of one slot."""
        return math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    def at(self, slot: int) -> int:
        return self.address + slot * self.stride


_contexts: dict[Any, tuple[Any, Any]] = {}  # by pycuda module: one device and its primary context


def _first_device(cuda: Any) -> tuple[Any, Any]:
    if cuda not in _contexts:
        cuda.init()
        device = cuda.Device(0)
        _contexts[cuda] = device, device.retain_primary_context()
    return _contexts[cuda]


def _import() -> tuple[Any, Any]:
    try:
        return importlib.import_module("pycuda.driver"), importlib.import_module("cuda.bindings.driver")
    except ModuleNotFoundError as error:
        raise EngineError(
            f"the tensorrt engine needs pycuda and cuda-bindings ({_line(error)}): pip install 'framestep[tensorrt]'"
        ) from None
    except ImportError as error:  # pycuda is linked to the driver's library
        raise EngineError(f"there is no NVIDIA driver here that pycuda can use ({_line(error)})") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
