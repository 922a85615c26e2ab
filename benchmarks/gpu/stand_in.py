"""A GPU that there is not: the driver's and TensorRT's runtime calls, recorded and carried out on the CPU.

For the rehearsal and the tests of the TensorRT engine. Device memory is host memory at the addresses that the engine
sees, a captured CUDA graph is a list of calls, and an engine computes what ONNX Runtime makes of the graph that it was
built from. What it does not know, it refuses as the real one does: an address that is not aligned or not allocated, a
synchronisation inside a capture, a shape beyond the profile. Times mean nothing.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...export.tensorrt_network import profiles
from ...runtime.bundle import Bundle
from ...runtime.manifest import EngineFile

ALIGNMENT = 256
SCRATCH = 4096  # bytes of activations that an engine claims to need
MODULES = ("pycuda", "pycuda.driver", "cuda", "cuda.bindings", "cuda.bindings.driver")


class CudaError(Exception):
    """pycuda.driver.Error"""


class CudaMemoryError(CudaError):
    """pycuda.driver.MemoryError"""


@dataclass
class Machine:
    """The GPU, and what was asked of it.

    Attributes:
        bundle: whose engines it can load.
        calls: the name of each call, in order, with its arguments.
        memory: device memory by address.
        free: bytes that are left.
        lost: every call fails from now on.
        pinned: addresses of pinned host memory.
        capturing: what was put on the stream while it captures; None while it does not.
        contexts: how often the primary context is current.
    """

    bundle: Bundle
    compute_capability: tuple[int, int] = (8, 6)
    free: int = 1 << 34
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    memory: dict[int, np.ndarray] = field(default_factory=dict)
    lost: bool = False
    pinned: set[int] = field(default_factory=set)
    capturing: list[Callable[[], None]] | None = None
    contexts: int = 0
    graphs: int = 0

    def record(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, arguments))
        if self.lost:
            raise CudaError(f"{name} failed: an illegal memory access was encountered")

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def put(self, work: Callable[[], None]) -> None:
        """On the stream: now, or into the graph that is being captured."""
        assert self.contexts, "no context is current"
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def view(self, address: int, size: int) -> np.ndarray:
        """Bytes of device memory."""
        for start, memory in self.memory.items():
            if start <= address and address + size <= start + memory.nbytes:
                return memory[address - start : address - start + size]
        raise CudaError("an illegal memory access was encountered")


def driver(machine: Machine) -> types.SimpleNamespace:
    """What stands for `pycuda.driver`."""

    class Allocation:
        def __init__(self, size: int) -> None:
            self.raw = np.zeros(size + ALIGNMENT, np.uint8)
            start = -self.raw.ctypes.data % ALIGNMENT
            self.memory = self.raw[start : start + size]
            self.memory[:] = 0xCD  # nobody clears it
            self.address = self.memory.ctypes.data
            machine.memory[self.address] = self.memory
            machine.free -= size

        def __int__(self) -> int:
            return self.address

        def free(self) -> None:
            machine.record("DeviceAllocation.free")
            machine.free += machine.memory.pop(self.address).nbytes

    class Context:
        def push(self) -> None:
            machine.record("Context.push")
            machine.contexts += 1

        @staticmethod
        def pop() -> None:
            machine.record("Context.pop")
            machine.contexts -= 1

    class Device:
        def __init__(self, index: int) -> None:
            machine.record("Device", index)

        def compute_capability(self) -> tuple[int, int]:
            return machine.compute_capability

        def retain_primary_context(self) -> Context:
            machine.record("Device.retain_primary_context")
            return Context()

    class Stream:
        handle = 7

        def __init__(self, flags: int = 0) -> None:
            machine.record("Stream", flags)

        def synchronize(self) -> None:
            machine.record("Stream.synchronize")
            assert machine.capturing is None, "a synchronisation inside a capture"

    def mem_alloc(size: int) -> Allocation:
        machine.record("mem_alloc", size)
        if size <= 0:
            raise CudaError("cuMemAlloc failed: invalid argument")
        assert machine.capturing is None, "an allocation inside a capture"
        if size > machine.free:
            raise CudaMemoryError("cuMemAlloc failed: out of memory")
        return Allocation(size)

    def mem_get_info() -> tuple[int, int]:
        machine.record("mem_get_info")
        return machine.free, 1 << 34

    def pagelocked_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        machine.record("pagelocked_empty", shape, dtype)
        if 0 in shape:
            raise CudaError("cuMemHostAlloc failed: invalid argument")
        array = np.full(shape, 1, dtype)
        machine.pinned.add(array.ctypes.data)
        return array

    def check_pinned(host: np.ndarray) -> None:
        assert host.flags.c_contiguous
        if machine.capturing is None:
            return
        base = host
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert base.ctypes.data in machine.pinned, "host memory that is not pinned"

    def memcpy_htod_async(dest: int, src: np.ndarray, stream: Any) -> None:
        machine.record("memcpy_htod_async", dest, src, stream)
        check_pinned(src)

        def work() -> None:
            machine.view(dest, src.nbytes)[:] = src.reshape(-1).view(np.uint8)

        machine.put(work)

    def memcpy_dtoh_async(dest: np.ndarray, src: int, stream: Any) -> None:
        machine.record("memcpy_dtoh_async", dest, src, stream)
        check_pinned(dest)

        def work() -> None:
            dest.reshape(-1).view(np.uint8)[:] = machine.view(src, dest.nbytes)

        machine.put(work)

    def memcpy_dtod_async(dest: int, src: int, size: int, stream: Any) -> None:
        machine.record("memcpy_dtod_async", dest, src, size, stream)

        def work() -> None:
            machine.view(dest, size)[:] = machine.view(src, size)

        machine.put(work)

    def memset_d8_async(dest: int, data: int, size: int, stream: Any) -> None:
        machine.record("memset_d8_async", dest, data, size, stream)

        def work() -> None:
            machine.view(dest, size)[:] = data

        machine.put(work)

    return types.SimpleNamespace(
        Error=CudaError,
        MemoryError=CudaMemoryError,
        init=lambda: machine.record("init"),
        Device=Device,
        Context=Context,
        Stream=Stream,
        mem_alloc=mem_alloc,
        mem_get_info=mem_get_info,
        pagelocked_empty=pagelocked_empty,
        memcpy_htod_async=memcpy_htod_async,
        memcpy_dtoh_async=memcpy_dtoh_async,
        memcpy_dtod_async=memcpy_dtod_async,
        memset_d8_async=memset_d8_async,
    )


def graphs(machine: Machine) -> types.SimpleNamespace:
    """What stands for `cuda.bindings.driver`."""
    good = "success"

    def cuStreamBeginCapture(hStream: Any, mode: Any) -> tuple[Any]:
        machine.record("cuStreamBeginCapture", hStream, mode)
        machine.capturing = []
        return (good,)

    def cuStreamEndCapture(hStream: Any) -> tuple[Any, Any]:
        machine.record("cuStreamEndCapture", hStream)
        captured, machine.capturing = machine.capturing, None
        return good, captured

    def cuGraphInstantiate(hGraph: Any, flags: int) -> tuple[Any, Any]:
        machine.record("cuGraphInstantiate", hGraph, flags)
        machine.graphs += 1
        return good, _Graph(list(hGraph))

    def cuGraphDestroy(hGraph: Any) -> tuple[Any]:
        machine.record("cuGraphDestroy", hGraph)
        return (good,)

    def cuGraphLaunch(hGraphExec: Any, hStream: Any) -> tuple[Any]:
        machine.record("cuGraphLaunch", hGraphExec, hStream)
        for work in hGraphExec.work:
            work()
        return (good,)

    def cuGraphExecDestroy(hGraphExec: Any) -> tuple[Any]:
        machine.record("cuGraphExecDestroy", hGraphExec)
        machine.graphs -= 1
        hGraphExec.work.clear()
        return (good,)

    return types.SimpleNamespace(
        CUresult=types.SimpleNamespace(CUDA_SUCCESS=good),
        CUstreamCaptureMode=types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL="thread local"),
        CUstream=lambda handle: handle,
        cuStreamBeginCapture=cuStreamBeginCapture,
        cuStreamEndCapture=cuStreamEndCapture,
        cuGraphInstantiate=cuGraphInstantiate,
        cuGraphDestroy=cuGraphDestroy,
        cuGraphLaunch=cuGraphLaunch,
        cuGraphExecDestroy=cuGraphExecDestroy,
    )


@dataclass(eq=False)
class _Graph:
    work: list[Callable[[], None]]


def tensorrt(machine: Machine, flavour: str, copies: tuple[str, ...] = ()) -> types.ModuleType:
    """What stands for a TensorRT package: TensorRT for RTX, which builds without a GPU, with a runtime of ours.

    Args:
        copies: outputs of states that the engine does not update in place.
    """
    real = importlib.import_module("tensorrt_rtx")
    package = types.ModuleType(flavour)

    class Runtime:
        engine_host_code_allowed = False

        def __init__(self, logger: Any) -> None:
            machine.record("Runtime", logger)
            self.logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
            digest = hashlib.sha256(serialized_engine).hexdigest()
            machine.record("Runtime.deserialize_cuda_engine", digest)
            bundle = Bundle.open(machine.bundle.path, verify=False)
            for entry in bundle.manifest.engines.values():
                if entry.sha256 == digest:
                    return _Engine(machine, real, bundle, entry, copies)
            if memoryview(serialized_engine).nbytes > machine.free:
                self.logger.log(real.ILogger.ERROR, "Requested amount of GPU memory could not be allocated")
            return None

    def find(name: str) -> Any:
        return getattr(real, name)

    package.__getattr__ = find  # type: ignore[method-assign]
    package.__version__ = real.__version__ if flavour == "tensorrt_rtx" else "11.4.0.106"  # type: ignore[attr-defined]
    package.Runtime = Runtime  # type: ignore[attr-defined]
    return package


class _Engine:
    """An engine as ONNX Runtime runs its graph."""

    device_memory_size_v2 = SCRATCH
    num_layers = 3

    def __init__(self, machine: Machine, trt: Any, bundle: Bundle, entry: EngineFile, copies: tuple[str, ...]) -> None:
        import onnxruntime

        manifest = bundle.manifest.at(entry.precision)
        self.machine, self.trt, self.entry, self.copies = machine, trt, entry, copies
        self.graph = manifest.graphs[entry.graph]
        self.chunk = 0 if manifest.language is None else manifest.language.chunk
        self.num_optimization_profiles = len(profiles(manifest, self.graph, entry.streams))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # here states are copied, and it says so
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            str(bundle.file(self.graph.file)), options, ["CPUExecutionProvider"]
        )
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.outputs = {item.name: item for item in self.session.get_outputs()}
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_dtype(self, name: str) -> Any:
        kind = {**self.inputs, **self.outputs}[name].type
        trt = self.trt
        return {
            "tensor(float)": trt.float32,
            "tensor(float16)": trt.float16,
            "tensor(uint8)": trt.uint8,
            "tensor(int64)": trt.int64,
            "tensor(bool)": trt.bool,
        }[kind]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        found = {use.output: use.input for use in self.graph.states}
        return None if name in self.copies else found.get(name)

    def create_runtime_config(self) -> Any:
        self.machine.record("ICudaEngine.create_runtime_config")
        return _RuntimeConfig(self.machine)

    def create_execution_context(self, how: Any) -> _Context:
        self.machine.record("ICudaEngine.create_execution_context", how)
        return _Context(self)


class _RuntimeConfig:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.machine.record("IRuntimeConfig.set_execution_context_allocation_strategy", strategy)

    def create_runtime_cache(self) -> _RuntimeCache:
        self.machine.record("IRuntimeConfig.create_runtime_cache")
        return _RuntimeCache(self.machine)

    def set_runtime_cache(self, cache: _RuntimeCache) -> bool:
        self.machine.record("IRuntimeConfig.set_runtime_cache", cache)
        cache.kernels += 1
        return True


@dataclass
class _RuntimeCache:
    """Counts the configurations that took it; it fits if it begins with "kernels"."""

    machine: Machine
    kernels: int = 0

    def deserialize(self, blob: bytes) -> bool:
        self.machine.record("IRuntimeCache.deserialize", blob)
        assert self.machine.contexts, "no context is current"
        fits = blob.startswith(b"kernels")
        self.kernels = int(blob.split()[1]) if fits else 0
        return fits

    def serialize(self) -> bytes:
        self.machine.record("IRuntimeCache.serialize")
        return b"kernels %d" % self.kernels


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        self.engine.machine.record("IExecutionContext.set_device_memory", memory, size)
        self.engine.machine.view(memory, size)
        assert size >= SCRATCH

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.engine.machine.record("IExecutionContext.set_optimization_profile_async", profile_index, stream_handle)
        self.profile = profile_index
        return profile_index < self.engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.engine.machine.record("IExecutionContext.set_input_shape", name, shape)
        ranges = {"S": range(1, self.engine.entry.streams + 1), "C": range(1, (self.engine.entry.labels or 0) + 1)}
        several, only = self.profile == 1, self.engine.num_optimization_profiles == 1
        ranges["T"] = range(2 if several else 1, self.engine.chunk + 1 if several or only else 2)
        wanted = self.engine.inputs[name].shape
        self.shapes[name] = shape
        return len(shape) == len(wanted) and all(
            found in ranges[size] if isinstance(size, str) else found == size
            for found, size in zip(shape, wanted, strict=True)
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.engine.machine.record("IExecutionContext.set_tensor_address", name, memory)
        self.addresses[name] = memory
        return memory % ALIGNMENT == 0

    def infer_shapes(self) -> list[str]:
        self.engine.machine.record("IExecutionContext.infer_shapes")
        return [name for name in self.engine.inputs if name not in self.shapes]

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self.engine
        engine.machine.record("IExecutionContext.execute_async_v3", stream_handle)
        aliased = {use.output: use.input for use in engine.graph.states if use.output is not None}
        for output, given in aliased.items():
            if output not in engine.copies and self.addresses[output] != self.addresses[given]:
                return False

        def work() -> None:
            feeds = {}
            for name, item in engine.inputs.items():
                dtype = np.dtype(self.engine.trt.nptype(engine.get_tensor_dtype(item.name)))
                size = int(np.prod(self.shapes[name], dtype=np.int64)) * dtype.itemsize
                memory = engine.machine.view(self.addresses[name], size)
                feeds[name] = memory.view(dtype).reshape(self.shapes[name]).copy()
            for name, found in zip(engine.outputs, engine.session.run(None, feeds), strict=True):
                raw = np.ascontiguousarray(found).reshape(-1).view(np.uint8)
                engine.machine.view(self.addresses[name], raw.nbytes)[:] = raw

        engine.machine.put(work)
        return True


@contextmanager
def stand_in(
    bundle: str | Path, flavour: str = "tensorrt_rtx", copies: tuple[str, ...] = (), **machine: Any
) -> Iterator[Machine]:
    """Put the recording GPU and runtime in the place of the real ones."""
    made = Machine(Bundle.open(bundle, verify=False), **machine)
    package = tensorrt(made, flavour, copies)
    package.__spec__ = importlib.machinery.ModuleSpec(flavour, None)
    cuda = {name: types.ModuleType(name) for name in MODULES}
    cuda["pycuda.driver"].__dict__.update(vars(driver(made)))
    cuda["cuda.bindings.driver"].__dict__.update(vars(graphs(made)))
    modules: dict[str, Any] = {**cuda, flavour: package}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield made
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
