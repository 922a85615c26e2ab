"""One graph's compiled engine on the device: loading and checking it, the contexts that run it, its kernels on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle
from ..durable import write_file
from ..errors import EngineError, OutputError
from ..manifest import STREAMS, TOKENS, Graph, Manifest, Port
from .cuda_driver import Buffer, CudaDriver
from .engine_files import Target, find_engine, read_engine
from .tensorrt_package import Messages

Array = npt.NDArray[Any]


Binding = tuple[str, int, tuple[int, ...] | None]  # name, address and, of inputs, shape


class CompiledGraph:
    """A graph's engine.

    Args:
        trt: TensorRT's package.
        bundle: flattened to one precision, with an engine that fits `target`.
        name: of the graph.
        streams: that it has to take in one step.

    Attributes:
        graph: as in the manifest.
        file: of the engine.
        labels: the most that it takes; None where it takes none.
        copied: states that it does not update in place.
        scratch: bytes that its activations need while it runs.
        profiles: optimisation profiles; with two, the second is for several tokens.
        contexts: that the caller keeps, by whatever tells them apart.

    Raises:
        EngineError: no engine fits, or it cannot be loaded.
    """

    def __init__(self, trt: Any, driver: CudaDriver, bundle: Bundle, name: str, target: Target, streams: int) -> None:
        self.graph = bundle.manifest.graphs[name]
        self.file, entry = find_engine(bundle, name, target, streams)
        self.labels = entry.labels
        self.contexts: dict[Any, Any] = {}
        content = read_engine(bundle, self.file, entry)
        self._trt, self._flavour = trt, target.flavour
        self._messages = Messages(trt)
        self._runtime = trt.Runtime(self._messages.logger)
        # an engine for later versions brings the runtime of its own version along
        self._runtime.engine_host_code_allowed = entry.version_compatible
        free = driver.free_bytes()
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            need = ""
            if any("memory" in message.lower() for message in self._messages.errors):
                need = f" ({len(content)} bytes of engine, {free} bytes free on the GPU)"
            raise EngineError(
                f"{bundle.file(self.file)}: {target.flavour} cannot load it{need}: {self._messages.last_error()}"
            )
        _check_engine(f"{bundle.file(self.file)}", trt, self._engine, self.graph, bundle.manifest)
        self.copied = tuple(
            use.state
            for use in self.graph.states
            if use.output is not None and self._engine.get_aliased_input_tensor(use.output) != use.input
        )
        self.scratch = int(self._engine.device_memory_size_v2)
        self.profiles = int(self._engine.num_optimization_profiles)

    def new_context(self, scratch: tuple[int, int], kernels: KernelCache, captured: bool) -> Any:
        """What runs the engine; shapes and addresses are to be set.

        Args:
            scratch: address and size of the memory for activations; one for all, they run in turns.
            kernels: where TensorRT for RTX finds what it compiled before.
            captured: its calls become part of a CUDA graph.
        """
        trt = self._trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if self._flavour == "tensorrt":
            context = self._engine.create_execution_context(strategy)
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if captured:  # kernels that are exchanged later would not be the captured ones
                config.dynamic_shapes_kernel_specialization_strategy = (
                    trt.DynamicShapesKernelSpecializationStrategy.EAGER
                )
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # it is we who capture
            kernels.use(config)
            context = self._engine.create_execution_context(config)
        if context is None:
            raise EngineError(f"{self.file}: TensorRT made no context: {self._messages.last_error()}")
        context.set_device_memory(*scratch)
        return context

    def bind(self, context: Any, bound: Iterable[Binding]) -> None:
        """Give a context its buffers."""
        for name, address, shape in bound:
            if shape is not None and not context.set_input_shape(name, shape):
                raise EngineError(f"{self.file}: TensorRT refused the shape {list(shape)} of '{name}'")
            if not context.set_tensor_address(name, address):
                raise EngineError(f"{self.file}: TensorRT refused the buffer of '{name}'")
        try:
            missing = context.infer_shapes()
        except RuntimeError:  # and no list
            raise EngineError(f"{self.file}: TensorRT refused the shapes: {self._messages.last_error()}") from None
        if missing:
            raise EngineError(f"{self.file}: TensorRT wants shapes of {', '.join(missing)}")

    def execute(self, context: Any, stream: int) -> None:
        """Put a run on a stream."""
        if not context.execute_async_v3(stream):
            raise EngineError(f"{self.file}: TensorRT failed in a step: {self._messages.last_error()}")


class OwnGraph:
    """A graph that is run by itself for one slot, with memory for the most tokens that it takes.

    Args:
        most: tokens.

    Attributes:
        ports: inputs and outputs.
        buffers: device memory by port.
    """

    def __init__(self, driver: CudaDriver, name: str, compiled: CompiledGraph, most: int) -> None:
        self.name, self.compiled = name, compiled
        self.ports = (*compiled.graph.inputs, *compiled.graph.outputs)
        self.buffers: dict[str, Buffer] = {}
        self._hosts: dict[str, Array] = {}  # pinned, flat
        for port in self.ports:
            shape = self.shape(port, most)
            self._hosts[port.name] = driver.pinned((math.prod(shape),), port.dtype)
            self.buffers[port.name] = Buffer.allocate(driver, shape, port.dtype, f"'{port.name}' of the graph '{name}'")

    def tokens(self, inputs: Mapping[str, Array]) -> int:
        """How many there are in these inputs; 1 where the graph takes none."""
        counts = [inputs[p.name].shape[p.shape.index(TOKENS)] for p in self.compiled.graph.inputs if TOKENS in p.shape]
        return counts[0] if counts else 1

    def shape(self, port: Port, tokens: int) -> tuple[int, ...]:
        sizes = {STREAMS: 1, TOKENS: tokens}
        return tuple(sizes[n] if isinstance(n, str) else n for n in port.shape)

    def view(self, name: str, tokens: int) -> Array:
        """The host's memory of a port, in the shape for so many tokens."""
        shape = self.shape(next(port for port in self.ports if port.name == name), tokens)
        return self._hosts[name][: math.prod(shape)].reshape(shape)


class KernelCache:
    """The kernels that TensorRT for RTX compiles when an engine meets a GPU, kept in a file beside the bundle.

    TensorRT checks itself whether what is in the file fits version, driver and GPU, and else starts anew. Keep this
    object as long as a context that has it. The full package compiles its kernels when it builds, and has none.
    """

    def __init__(self, bundle: Bundle) -> None:
        folder = bundle.path.resolve()
        self.path = folder.parent / f"{folder.name}.kernels"
        self._cache: Any = None
        self._known = b""

    def use(self, config: Any) -> None:
        """Let a context that is made from a runtime configuration look there; CUDA's context must be current."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with suppress(OSError):
                content = self.path.read_bytes()
                if content and self._cache.deserialize(content):
                    self._known = content
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write what is new. Where that is not allowed the next start takes longer, and nothing else is lost."""
        content = b"" if self._cache is None else bytes(self._cache.serialize())
        if content not in (b"", self._known):
            with suppress(OutputError):
                write_file(self.path, [content])
            self._known = content


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
