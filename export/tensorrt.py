"""From a bundle's step graphs to TensorRT engines in the bundle, by the full package or by TensorRT for RTX.

One engine for each graph that runs on streams. Networks are strongly typed: a precision is a graph of the bundle, never
a flag of the builder.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..runtime.bundle import STREAMS, TOKENS, Bundle, EngineFile, Graph, Manifest, write_file
from ..runtime.engines import check_memory
from ..runtime.engines.cuda_driver import CudaDriver
from ..runtime.engines.engine_files import named, read_engine, source_key, with_engine
from ..runtime.engines.tensorrt_package import Messages, choose_flavour, import_flavour
from ..runtime.errors import EngineError, FramestepError, OutputError

PRECISIONS = ("fp16", "fp16+int8", "fp32")
ATTENTIONS = ("native", "triton")
PORTABLE = "8.0+"  # what TensorRT for RTX builds for where nothing is named, and the full package on demand
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
        precision: one of `PRECISIONS`.
        streams: the most streams in one step.
        flavour: "auto", "tensorrt" or "tensorrt_rtx".
        compute_capabilities: of the GPUs to build for, such as "8.6"; none for the GPU at hand.
        hardware_compatible: one engine for every GPU from compute capability 8.0 on.
        version_compatible: an engine that later versions of TensorRT run too.
        workspace: bytes that a layer may use beside its tensors; None for TensorRT's own limit.
        attention: one of `ATTENTIONS`.
        again: build even where the bundle has this engine.
    """

    precision: str = "fp16"
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
    """

    layers: int
    cache_updates: int
    copied_states: tuple[str, ...]
    cast_states: tuple[str, ...]
    attentions: int


@dataclass(frozen=True)
class GraphReport:
    """An engine that was built, or was there already.

    Attributes:
        network: None where the engine was there.
        fused: attention layers that run in a kernel of their own; None where the engine was there.
        seconds: of parsing and building; 0 where the engine was there.
        activations: bytes on the device beside weights and state; None where there was no GPU to ask.
        engine_layers: layers after fusion, as the engine inspector counts them; None likewise.
    """

    graph: str
    file: str
    bytes: int
    network: Network | None
    fused: int | None
    seconds: float
    activations: int | None
    engine_layers: int | None


@dataclass(frozen=True)
class BuildReport:
    """What was built.

    Attributes:
        notes: what was derived or decided on the way.
        state_bytes: of one stream.
    """

    bundle: str
    precision: str
    flavour: str
    version: str
    compute_capabilities: tuple[str, ...]
    streams: int
    graphs: tuple[GraphReport, ...]
    state_bytes: int
    notes: tuple[str, ...]

    @property
    def bytes_per_stream(self) -> int | None:
        """Device memory of one stream when all are used: its state and its share of the activations."""
        known = [item.activations for item in self.graphs if item.activations is not None]
        return self.state_bytes + max(known) // self.streams if known else None


def build(bundle: Bundle, options: BuildOptions, progress: Progress) -> tuple[Bundle, BuildReport]:
    """Build what is missing, and record it in the bundle's manifest.

    Raises:
        EngineError: no TensorRT, no GPU where one is needed, or an option that the package does not have.
        BuildError: TensorRT refuses a graph, or there is too little memory.
        BundleError: the bundle does not have the precision, and it cannot be derived.
        OutputError: the engine cannot be written.
    """
    if options.precision in bundle.manifest.precisions:
        check_memory(bundle.manifest, options.precision, "tensorrt")
    _check_options(options)
    trt = import_flavour(choose_flavour(options.flavour))
    flavour = trt.__name__.partition(".")[0]
    targets, capabilities = _targets(trt, flavour, options)
    notes = []
    if options.precision not in bundle.manifest.precisions:
        if options.precision != "fp16":
            raise EngineError(
                f"{bundle.path}: has no {options.precision} (it has {', '.join(bundle.manifest.precisions)});"
                f" make it with 'framestep calibrate --precision {options.precision}'"
            )
        try:
            from .half import add_half
        except ImportError as error:
            raise EngineError(
                f"{bundle.path}: has no fp16, and to derive it needs onnx ({error}): pip install onnx"
            ) from None
        bundle = add_half(bundle)
        notes.append("the bundle had no fp16: derived from its fp32 graphs and added")
    flat = replace(bundle, manifest=bundle.manifest.at(options.precision))
    graphs = {name: graph for name, graph in flat.manifest.graphs.items() if _sizes(flat.manifest, graph, 1)}
    if not graphs:
        raise EngineError(f"{bundle.path}: has no graph that runs on streams")
    reports = []
    for name, graph in graphs.items():
        progress.graph(name)
        wanted = EngineFile(
            graph=name,
            precision=options.precision,
            flavour=flavour,
            version=str(trt.__version__),
            compute_capabilities=capabilities,
            streams=options.streams,
            source=source_key(flat, graph),
            bytes=0,
            sha256="",
            labels=LABELS[2] if any("C" in port.shape for port in graph.inputs) else None,
            attention=options.attention if graph.states else "native",
            version_compatible=options.version_compatible,
        )
        known = None if options.again else _known(flat, wanted)
        if known is not None:
            file, entry = known
            reports.append(GraphReport(name, file, entry.bytes, None, None, 0.0, None, None))
            continue
        begin = time.perf_counter()
        maker = _Maker(trt, flavour, flat, name, options, targets, progress)
        content, network, decomposed = maker.make()
        entry = replace(wanted, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        if decomposed:
            entry = replace(entry, attention="decomposed")
            notes.append(f"{name}: TensorRT has no fused attention for {options.precision}: built from separate layers")
        if network.copied_states:
            notes.append(f"{name}: copied in every step, not updated in place: {', '.join(network.copied_states)}")
        seconds = time.perf_counter() - begin
        flat, file = _keep(flat, entry, content)
        activations, engine_layers = _on_device(trt, content, options)
        fused = 0 if decomposed else network.attentions
        reports.append(
            GraphReport(name, file, len(content), network, fused, round(seconds, 2), activations, engine_layers)
        )
    bundle = Bundle.open(bundle.path, verify=False)
    report = BuildReport(
        str(bundle.path),
        options.precision,
        flavour,
        str(trt.__version__),
        capabilities,
        options.streams,
        tuple(reports),
        flat.bytes_per_stream(),
        tuple(notes),
    )
    return bundle, report


def _check_options(options: BuildOptions) -> None:
    if options.precision not in PRECISIONS:
        raise EngineError(f"--precision: expected {', '.join(PRECISIONS)}, found '{options.precision}'")
    if options.attention not in ATTENTIONS:
        raise EngineError(f"--attention: expected {', '.join(ATTENTIONS)}, found '{options.attention}'")
    if options.streams < 1:
        raise EngineError(f"--streams: expected at least 1, found {options.streams}")
    if options.hardware_compatible and options.compute_capabilities:
        raise EngineError("--hardware-compatible is for all GPUs from 8.0 on: give no --compute-capability with it")


def _targets(trt: Any, flavour: str, options: BuildOptions) -> tuple[list[Any], tuple[str, ...]]:
    """What to tell the builder, and the compute capabilities to record."""
    if flavour == "tensorrt_rtx":
        if options.attention == "triton":
            raise EngineError("--attention triton: TensorRT for RTX has no plugin layers; use --flavour tensorrt")
        if options.version_compatible:
            raise EngineError("--version-compatible: TensorRT for RTX does not have it; build with each version")
        known = {
            f"{name[2:-1]}.{name[-1]}": getattr(trt.ComputeCapability, name)
            for name in trt.ComputeCapability.__members__
            if name.startswith("SM")
        }
        for asked in options.compute_capabilities:
            if asked not in known:
                raise EngineError(
                    f"--compute-capability: TensorRT for RTX {trt.__version__} builds for {', '.join(known)},"
                    f" not for {asked}"
                )
        if options.compute_capabilities:
            return [known[name] for name in options.compute_capabilities], options.compute_capabilities
        here = None if options.hardware_compatible else _capability_here()
        return ([], (PORTABLE,)) if here is None else ([trt.ComputeCapability.CURRENT], (here,))
    here = _capability_here()
    if here is None:
        raise EngineError(
            "TensorRT builds for the GPU at hand, and there is none that pycuda can use here; build on the machine that"
            " will run it, or with --flavour tensorrt_rtx for GeForce and RTX GPUs"
        )
    for asked in options.compute_capabilities:
        if asked != here:
            raise EngineError(
                f"--compute-capability: TensorRT builds for the GPU at hand, which has {here}, not {asked}; build on"
                " such a GPU, or with --hardware-compatible or --flavour tensorrt_rtx"
            )
    return [], (PORTABLE,) if options.hardware_compatible else (here,)


def _capability_here() -> str | None:
    try:
        driver = CudaDriver()
    except EngineError:
        return None
    try:
        return driver.compute_capability
    finally:
        driver.close()


def _known(bundle: Bundle, wanted: EngineFile) -> tuple[str, EngineFile] | None:
    """The engine that would be built, where the bundle has it whole."""
    attentions = (wanted.attention, "decomposed") if wanted.attention == "native" else (wanted.attention,)
    for attention in attentions:
        name = named(replace(wanted, attention=attention))
        entry = bundle.manifest.engines.get(name)
        if entry is not None:
            try:
                read_engine(bundle, name, entry)
            except EngineError:
                continue
            return name, entry
    return None


def _keep(bundle: Bundle, entry: EngineFile, content: bytes) -> tuple[Bundle, str]:
    """Write an engine and record it; engines of this graph that its new content has made stale are removed."""
    name = named(entry)
    path = bundle.file(name)
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be written: {error.strerror}") from None
    write_file(path, [content])
    whole = with_engine(bundle, name, entry)
    stale = [
        old
        for old, known in whole.manifest.engines.items()
        if (known.graph, known.precision) == (entry.graph, entry.precision) and known.source != entry.source
    ]
    for old in stale:
        whole = with_engine(whole, old, None)
        whole.file(old).unlink(missing_ok=True)
    return replace(whole, manifest=whole.manifest.at(entry.precision)), name


def _sizes(manifest: Manifest, graph: Graph, streams: int) -> dict[str, tuple[int, int, int]]:
    """Least, usual and most of each symbol in the shapes of a graph; empty where it does not run on streams."""
    known = {STREAMS: (1, streams, streams), "C": LABELS}
    if manifest.language is not None:
        known[TOKENS] = (1, 1, manifest.language.chunk)
    used = {n for port in (*graph.inputs, *graph.outputs) for n in port.shape if isinstance(n, str)}
    return known if STREAMS in used and used <= set(known) else {}


class _Maker:
    """Builds the engine of one graph."""

    def __init__(
        self,
        trt: Any,
        flavour: str,
        bundle: Bundle,
        name: str,
        options: BuildOptions,
        targets: Sequence[Any],
        progress: Progress,
    ) -> None:
        self.trt, self.flavour, self.bundle, self.options = trt, flavour, bundle, options
        self.graph = bundle.manifest.graphs[name]
        self.path = bundle.file(self.graph.file)
        self.states = {state.name: state for state in bundle.manifest.states}
        self.targets, self.progress = targets, progress
        self.messages = Messages(trt)
        self.builder = trt.Builder(self.messages.logger)

    def make(self) -> tuple[bytes, Network, bool]:
        """The engine, what the network was like, and whether its attention is made of separate layers."""
        try:
            return self._make(decompose=False)
        except _NoFusedAttention:
            return self._make(decompose=True)

    def _make(self, decompose: bool) -> tuple[bytes, Network, bool]:
        trt = self.trt
        self.messages.errors.clear()
        network = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        by_plugin = self._parse(network)
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        found = self._examine(network, layers, by_plugin)
        for layer in layers:
            if layer.type != trt.LayerType.ATTENTION_INPUT:
                continue
            # its kernels are for half precision only: do not let TensorRT find that out, it is noisy about it
            decompose |= layer.get_input(0).dtype == trt.DataType.FLOAT
            if decompose:
                layer.__class__ = trt.IAttentionInputLayer  # the bindings give every layer as its base class
                layer.attention.decomposable = True
        config = self._configure()
        content = self._run(network, config)
        self._write_timing_cache(config)
        return content, found, decompose

    def _parse(self, network: Any) -> list[tuple[str, str]]:
        """Fill the network. Returns input and output of the states that our plugin updates."""
        path = self.path
        parser = self.trt.OnnxParser(network, self.messages.logger)
        if self._uses_plugin():
            from .tensorrt_plugin import insert_plugins, mark_sites, parse_marked

            model, sites = mark_sites(self.bundle, self.graph)
            if parse_marked(parser, model, path):
                position = next(port.name for port in self.graph.inputs if port.role == "position")
                insert_plugins(self.trt, network, sites, position, _capability_here() or "")
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

    def _uses_plugin(self) -> bool:
        return self.options.attention == "triton" and bool(self.graph.states)

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

    def _configure(self) -> Any:
        trt, options = self.trt, self.options
        config = self.builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is not to be rounded to 10 bits
        if self.targets:
            config.num_compute_capabilities = len(self.targets)
            for index, target in enumerate(self.targets):
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
        if self._uses_plugin():
            from .tensorrt_plugin import allow_aliases

            allow_aliases(trt, config)
        profile = self.builder.create_optimization_profile()
        for name, shape in self._input_shapes().items():
            if any(isinstance(n, str) for n in shape):
                profile.set_shape(name, *self._profile(shape))
        config.add_optimization_profile(profile)
        return config

    def _input_shapes(self) -> dict[str, tuple[int | str, ...]]:
        shapes = {port.name: port.shape for port in self.graph.inputs}
        return shapes | {use.input: self.states[use.state].shape for use in self.graph.states}

    def _profile(self, shape: Sequence[int | str]) -> list[tuple[int, ...]]:
        """Least, usual and largest sizes of one input."""
        sizes = _sizes(self.bundle.manifest, self.graph, self.options.streams)
        return [tuple(sizes[n][which] if isinstance(n, str) else n for n in shape) for which in range(3)]

    def _run(self, network: Any, config: Any) -> bytes:
        monitor, stopped = _monitor(self.trt, self.progress)
        config.progress_monitor = monitor
        content = self.builder.build_serialized_network(network, config)
        if stopped:
            raise stopped[0]
        if content is not None:
            return bytes(content)
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
                f"{self.path}: not enough GPU memory to build: {size}, {_free()} are free; end what else uses the GPU,"
                " or give fewer --streams or less --workspace"
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


def _on_device(trt: Any, content: bytes, options: BuildOptions) -> tuple[int | None, int | None]:
    """Bytes of activations and layers after fusion, where there is a GPU on which the engine can be loaded."""
    try:
        driver = CudaDriver()
    except EngineError:
        return None, None
    try:
        with driver.current():
            messages = Messages(trt)
            runtime = trt.Runtime(messages.logger)
            runtime.engine_host_code_allowed = options.version_compatible
            engine = runtime.deserialize_cuda_engine(content)
            if engine is None:  # built for another GPU
                return None, None
            return int(engine.device_memory_size_v2), int(engine.num_layers)
    except FramestepError:
        return None, None
    finally:
        driver.close()


def _free() -> str:
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
