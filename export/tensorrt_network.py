"""From one step graph to one TensorRT engine: what to tell the builder, and what became of state and attention.

Networks are strongly typed: a precision is a graph of the bundle, never a flag of the builder.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..runtime.bundle import Bundle
from ..runtime.durable import write_file
from ..runtime.engines.cuda_driver import CudaDriver
from ..runtime.engines.tensorrt_package import Messages
from ..runtime.errors import EngineError
from ..runtime.manifest import STREAMS, TOKENS, Graph, Manifest
from .tensorrt_attention import drop_unit_scales, split_by_tokens

ATTENTIONS = ("native", "triton", "auto")
LABELS = (1, 16, 4096)  # least, usual and most
NO_FUSED_ATTENTION = "not supported by a dedicated kernel"
MIB = 1 << 20


class BuildError(EngineError):
    """TensorRT cannot build an engine from a graph."""


class Progress(Protocol):
    """Where a build tells how far it is; phases are TensorRT's, one within another."""

    def graph(self, name: str) -> None: ...
    def start(self, phase: str, parent: str | None, steps: int) -> None: ...
    def step(self, phase: str, done: int) -> None: ...
    def finish(self, phase: str) -> None: ...


@dataclass(frozen=True)
class BuildOptions:
    """What to build.

    Attributes:
        precision: one of `engine_files.PRECISIONS`; None for fp16, or for fp16+w4 where a decoder has INT4 weights.
        streams: the most streams in one step.
        flavour: "auto", "tensorrt" or "tensorrt_rtx".
        compute_capabilities: of the GPUs to build for, such as "8.6"; none for the GPU at hand.
        hardware_compatible: one engine for every GPU from compute capability 8.0 on.
        version_compatible: an engine that later versions of TensorRT run too.
        workspace: bytes that a layer may use beside its tensors; None for TensorRT's own limit.
        attention: one of `ATTENTIONS`, of graphs that attend over rings; all others have TensorRT's own. "auto" builds
            both, measures them on the GPU at hand and keeps the faster one.
        again: build even where the bundle has this engine.
    """

    precision: str | None = None
    streams: int = 1
    flavour: str = "auto"
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False
    workspace: int | None = None
    attention: str = "native"
    again: bool = False


@dataclass(frozen=True)
class Network:
    """What TensorRT made of a graph before it was built.

    Attributes:
        layers: how many, of all kinds.
        cache_updates: KV-cache layers, or plugins of ours, that update a state of the bundle in place.
        copied_states: states that are updated otherwise: a runtime has to copy them, each step.
        cast_states: states whose numbers are converted before they are used.
        attentions: attention layers.
        decomposed: "fp32" or "fp16", what the attentions compute in, where TensorRT has no fused kernel for them and
            makes them of separate layers; None where they are fused.
    """

    layers: int
    cache_updates: int
    copied_states: tuple[str, ...]
    cast_states: tuple[str, ...]
    attentions: int
    decomposed: str | None = None


@dataclass(frozen=True)
class Target:
    """What an engine is to run on.

    Attributes:
        builder: what to tell the builder; nothing for the GPU at hand.
        compute_capabilities: to record.
        here: of the GPU at hand; None where there is none.
    """

    builder: tuple[Any, ...]
    compute_capabilities: tuple[str, ...]
    here: str | None


def profiles(manifest: Manifest, graph: Graph, streams: int) -> list[dict[str, tuple[int, int, int]]]:
    """Least, usual and most of each symbol in the shapes of a graph, for each of its optimisation profiles.

    A kernel that is good at one row is not at many, so a graph of tokens has a profile for a token at a time and, where
    a chunk has more, one for several. All have room for two streams at least: TensorRT lays the weights of a product
    with one row alone out in another way, and the engine would hold them twice; and of INT4 weights it makes sums of
    its own there, in the place of products. Empty for a graph that does not run on streams.
    """
    known = {STREAMS: (1, streams, streams), "C": LABELS}
    used = {n for port in (*graph.inputs, *graph.outputs) for n in port.shape if isinstance(n, str)}
    if STREAMS not in used:
        return []
    if TOKENS not in used:
        return [known] if used <= set(known) else []
    if manifest.language is None or not used <= {*known, TOKENS}:
        return []
    chunk = manifest.language.chunk
    known[STREAMS] = (1, streams, max(streams, 2))
    spans = [(1, 1, 1)] if chunk == 1 else [(1, 1, 1), (2, chunk, chunk)]
    return [{**known, TOKENS: span} for span in spans]


class EngineMaker:
    """Builds the engine of one graph.

    Args:
        trt: TensorRT's package, and which `flavour` it is.
        bundle: flattened to one precision.
        name: of the graph.
        attention: "native" or "triton".
    """

    def __init__(
        self,
        trt: Any,
        flavour: str,
        bundle: Bundle,
        name: str,
        attention: str,
        options: BuildOptions,
        target: Target,
        progress: Progress,
    ) -> None:
        self.trt, self.flavour, self.bundle, self.options = trt, flavour, bundle, options
        self.graph = bundle.manifest.graphs[name]
        self.path = bundle.file(self.graph.file)
        self.states = {state.name: state for state in bundle.manifest.states}
        self.by_plugin = attention == "triton"
        self.target, self.progress = target, progress
        self.messages = Messages(trt)
        self.builder = trt.Builder(self.messages.logger)

    def make(self) -> tuple[Any, Network]:
        """The engine, in TensorRT's own memory (an `IHostMemory`, which files and hashes read), and what the network
        was like."""
        try:
            return self._make(decompose=False)
        except _NoFusedAttention:
            return self._make(decompose=True)

    def _make(self, decompose: bool) -> tuple[Any, Network]:
        trt = self.trt
        self.messages.errors.clear()
        network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        by_plugin = self._parse(network)
        drop_unit_scales(trt, _layers(network))
        kept = split_by_tokens(trt, network, _layers(network))
        layers = _layers(network)
        found = self._examine(network, layers, by_plugin)
        attentions = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
        # its kernels are for half precision only: do not let TensorRT find that out, it is noisy about it
        wide = any(layer.get_input(0).dtype == trt.DataType.FLOAT for layer in attentions)
        if wide or decompose:
            found = replace(found, decomposed="fp32" if wide else "fp16")
            for layer in attentions:
                layer.__class__ = trt.IAttentionInputLayer  # the bindings give every layer as its base class
                layer.attention.decomposable = True
        config = self._configure()
        content = self._run(network, config)
        del kept  # the network refers to these arrays
        self._write_timing_cache(config)
        return content, found

    def _parse(self, network: Any) -> list[tuple[str, str]]:
        """Fill the network. Returns input and output of the states that our plugin updates."""
        path = self.path
        parser = self.trt.OnnxParser(network, self.messages.logger)
        if self.by_plugin:
            from .tensorrt_plugin import insert_plugins, mark_sites, parse_marked

            model, sites = mark_sites(self.bundle, self.graph)
            if parse_marked(parser, model, path):
                position = next(port.name for port in self.graph.inputs if port.role == "position")
                insert_plugins(self.trt, network, sites, position, self.target.here or "")
                return [pair for site in sites for pair in site.rings]
        elif parser.parse_from_file(str(path)):
            return []
        texts = []
        for index in range(parser.num_errors):
            error = parser.get_error(index)
            where = f"node '{error.node_name()}' ({error.node_operator()})" if error.node_operator() else "the graph"
            texts.append(f"{where}: {' '.join(error.desc().split())}")
        reasons = "; ".join(dict.fromkeys(texts)) or self.messages.last_error()
        raise BuildError(
            f"{path}: TensorRT {self.trt.__version__} cannot read it (ONNX opset {_opset(path)}): {reasons[:800]}"
        )

    def _examine(self, network: Any, layers: Sequence[Any], by_plugin: Sequence[tuple[str, str]]) -> Network:
        """Compare the network with what the manifest says, and look at what became of states and attention."""
        trt = self.trt
        inputs = {item.name: item for item in (network.get_input(i) for i in range(network.num_inputs))}
        outputs = {item.name for item in (network.get_output(i) for i in range(network.num_outputs))}
        uses = self.graph.states
        wanted = {port.name for port in self.graph.inputs} | {use.input for use in uses}
        made = {port.name for port in self.graph.outputs} | {use.output for use in uses if use.output is not None}
        for kind, expected, got in (("input", wanted, set(inputs)), ("output", made, outputs)):
            if expected != got:
                name = sorted(expected ^ got)[0]
                place = "manifest and not in the network" if name in expected else "network and not in the manifest"
                raise BuildError(f"{self.path}: the {kind} '{name}' is in the {place}; export the bundle again")
        readers: dict[str, list[Any]] = {}
        for layer in layers:
            for index in range(layer.num_inputs):
                tensor = layer.get_input(index)
                if tensor is not None:
                    readers.setdefault(tensor.name, []).append(layer)
        for name in wanted:
            if name not in readers and name not in outputs:
                raise BuildError(f"{self.path}: TensorRT ignores the input '{name}'; it would compute something else")
        self._check_integer_products(layers)
        updates = {
            (layer.get_input(0).name, layer.get_output(0).name)
            for layer in layers
            if layer.type == trt.LayerType.KV_CACHE_UPDATE
        } | set(by_plugin)
        written = [use for use in uses if use.output is not None]
        in_place = [use for use in written if (use.input, use.output) in updates]
        cast = [
            use.state
            for use in uses
            if any(
                layer.type == trt.LayerType.CAST
                for name in (use.input, use.output)
                if name is not None
                for layer in readers.get(name, ())
            )
        ]
        kinds = Counter(layer.type for layer in layers)
        return Network(
            layers=len(layers),
            cache_updates=len(in_place),
            copied_states=tuple(use.state for use in written if use not in in_place),
            cast_states=tuple(dict.fromkeys(cast)),
            attentions=kinds[trt.LayerType.ATTENTION_INPUT],
        )

    def _check_integer_products(self, layers: Sequence[Any]) -> None:
        """Refuse sums of integers in FP16: TensorRT writes them as they are, and scales them in the next kernel."""
        kinds = self.trt.LayerType
        dequantized = {layer.get_output(0).name for layer in layers if layer.type == kinds.DEQUANTIZE}
        for layer in layers:
            if (
                layer.type == kinds.MATRIX_MULTIPLY
                and layer.get_input(0).name in dequantized
                and layer.get_output(0).dtype == self.trt.DataType.HALF
            ):
                raise BuildError(
                    f"{self.path}: node '{layer.name}' sums products of integers in FP16, which ends at 65,504;"
                    " calibrate the bundle again"
                )

    def _configure(self) -> Any:
        trt, options = self.trt, self.options
        config = self.builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is not to be rounded to 10 bits
        if self.target.builder:
            config.num_compute_capabilities = len(self.target.builder)
            for index, target in enumerate(self.target.builder):
                config.set_compute_capability(target, index)
        if self.flavour == "tensorrt_rtx":
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or a step could not be captured
        elif options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
        if self.flavour == "tensorrt":  # the other one times nothing
            config.set_timing_cache(config.create_timing_cache(self._timing_cache()), False)
        if self.by_plugin:
            from .tensorrt_plugin import allow_aliases

            allow_aliases(trt, config)
        for sizes in profiles(self.bundle.manifest, self.graph, options.streams):
            profile = self.builder.create_optimization_profile()
            for name, shape in self._input_shapes().items():
                if any(isinstance(n, str) for n in shape):
                    least, usual, most = (
                        tuple(sizes[n][which] if isinstance(n, str) else n for n in shape) for which in range(3)
                    )
                    profile.set_shape(name, least, usual, most)
            config.add_optimization_profile(profile)
        return config

    def _input_shapes(self) -> dict[str, tuple[int | str, ...]]:
        shapes = {port.name: port.shape for port in self.graph.inputs}
        return shapes | {use.input: self.states[use.state].shape for use in self.graph.states}

    def _run(self, network: Any, config: Any) -> Any:
        monitor, stopped = _monitor(self.trt, self.progress)
        config.progress_monitor = monitor
        content = self.builder.build_serialized_network(network, config)
        if stopped:
            raise stopped[0]
        if content is not None:
            return content
        text = " ".join(self.messages.errors)
        if NO_FUSED_ATTENTION in text:
            raise _NoFusedAttention
        if "workspace" in text:
            limit = f"{self.options.workspace / MIB:g} MiB" if self.options.workspace is not None else "TensorRT's own"
            raise BuildError(
                f"{self.path}: no way to run a layer fits into the workspace limit ({limit}); raise --workspace"
            )
        needed = re.search(r"(\d+) bytes", text)
        if re.search(r"out of memory|OutOfMemory|could not be allocated", text, re.IGNORECASE):
            size = f"{needed[1]} bytes were asked for" if needed else "how much was needed TensorRT does not say"
            raise BuildError(
                f"{self.path}: not enough GPU memory to build: {size}, {_free_bytes()} are free; end what else uses the"
                " GPU, or give fewer --streams or less --workspace"
            )
        raise BuildError(f"{self.path}: TensorRT {self.trt.__version__} cannot build it: {self.messages.last_error()}")

    def _timing_cache_path(self) -> Path:
        folder = self.bundle.path.resolve()
        return folder.parent / f"{folder.name}.timing"

    def _timing_cache(self) -> bytes:
        """Timings of earlier builds; TensorRT starts anew with those of another GPU or version."""
        try:
            return self._timing_cache_path().read_bytes()
        except OSError:
            return b""

    def _write_timing_cache(self, config: Any) -> None:
        if self.flavour == "tensorrt":
            write_file(self._timing_cache_path(), [bytes(config.get_timing_cache().serialize())])


def _layers(network: Any) -> list[Any]:
    return [network.get_layer(index) for index in range(network.num_layers)]


class _NoFusedAttention(Exception):
    """TensorRT has no fused attention kernel for a graph's types and sizes."""


def _monitor(trt: Any, progress: Progress) -> tuple[Any, list[BaseException]]:
    """TensorRT's progress monitor, and the exception that stopped the build, such as Ctrl-C."""
    stopped: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> bool:
        try:
            call()
        except BaseException as error:  # it must not pass through TensorRT
            stopped.append(error)
        return not stopped

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            guarded(lambda: progress.start(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            return guarded(lambda: progress.step(phase_name, step + 1))

        def phase_finish(self, phase_name: str) -> None:
            guarded(lambda: progress.finish(phase_name))

    return Monitor(), stopped


def _free_bytes() -> str:
    try:
        driver = CudaDriver()
    except EngineError:
        return "an unknown number"
    try:
        with driver.current():
            return str(driver.free_bytes())
    except EngineError:
        return "an unknown number"
    finally:
        driver.close()


def _opset(path: Path) -> str:
    try:
        import onnx
    except ImportError:
        return "unknown"
    model = onnx.load(path, load_external_data=False)
    return ", ".join(f"{item.domain or 'ai.onnx'} {item.version}" for item in model.opset_import)
