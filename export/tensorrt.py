"""From a bundle's step graphs to TensorRT engines in the bundle, by the full package or by TensorRT for RTX.

One engine for each graph that runs on streams. Networks are strongly typed: a precision is a graph of the bundle, never
a flag of the builder.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from dataclasses import dataclass, field, replace
from typing import Any

from ..runtime.bundle import Bundle
from ..runtime.durable import write_file
from ..runtime.engines.choosing import check_memory
from ..runtime.engines.cuda_driver import CudaDriver
from ..runtime.engines.engine_files import PRECISIONS, named, read_engine, source_key, with_engine
from ..runtime.engines.tensorrt import TensorRtEngine
from ..runtime.engines.tensorrt_package import Messages, choose_flavour, import_flavour
from ..runtime.errors import EngineError, FramestepError, OutputError
from ..runtime.manifest import EngineFile, Manifest
from .tensorrt_network import (
    ATTENTIONS,
    LABELS,
    BuildOptions,
    EngineMaker,
    Network,
    Progress,
    Target,
    profiles,
)

PORTABLE = "8.0+"  # what TensorRT for RTX builds for where nothing is named, and the full package on demand
WARM_STEPS, TIMED_STEPS, ROUNDS = 50, 200, 2  # of each engine in turn, where the faster one is kept
DECODERS = ("fp16", "fp16+w4", "fp32")  # precisions of decoders that TensorRT takes
PLUGIN_ERRORS = (AttributeError, ImportError, TypeError, ValueError)  # TensorRT calls its interface experimental


@dataclass(frozen=True)
class GraphReport:
    """An engine that was built, or was there already.

    Attributes:
        network: None where the engine was there.
        fused: attention layers that run in a kernel of their own; None where the engine was there.
        seconds: of parsing and building; 0 where the engine was there.
        activations: bytes on the device beside weights and state; None where there was no GPU to ask.
        engine_layers: layers after fusion, as the engine inspector counts them; None likewise.
        step_ms: median milliseconds of a step by attention, where the attention was chosen by measuring.
    """

    graph: str
    file: str
    bytes: int
    network: Network | None
    fused: int | None
    seconds: float
    activations: int | None
    engine_layers: int | None
    step_ms: dict[str, float] = field(default_factory=dict)


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
    precision = _default_precision(bundle.manifest) if options.precision is None else options.precision
    if precision in bundle.manifest.precisions:
        check_memory(bundle.manifest, precision, "tensorrt")
    _check_options(options)
    trt = import_flavour(choose_flavour(options.flavour))
    flavour = trt.__name__.partition(".")[0]
    target = _target(trt, flavour, options)
    notes: list[str] = []
    if options.attention == "auto" and flavour == "tensorrt_rtx":
        options = replace(options, attention="native")
        notes.append("attention: native, because TensorRT for RTX has no plugin layers")
    if precision not in bundle.manifest.precisions:
        bundle = _derive(bundle, precision)
        notes.append("the bundle had no fp16: derived from its fp32 graphs and added")
    flat = replace(bundle, manifest=bundle.manifest.at(precision))
    graphs = [name for name, graph in flat.manifest.graphs.items() if profiles(flat.manifest, graph, 1)]
    if not graphs:
        raise EngineError(f"{bundle.path}: has no graph that runs on streams")
    if options.attention == "triton" and not any(_has_rings(flat.manifest, name) for name in graphs):
        raise EngineError(f"{bundle.path}: has no attention over rings, which is what --attention triton replaces")
    work = _Work(trt, flavour, target, options, progress, notes)
    reports = []
    for name in graphs:
        progress.graph(name)
        if not _has_rings(flat.manifest, name):
            flat, item = work.one(flat, name, "native")
        elif options.attention == "auto":
            flat, item = work.fastest(flat, name)
        else:
            flat, item = work.one(flat, name, options.attention)
        reports.append(item)
    report = BuildReport(
        str(bundle.path),
        precision,
        flavour,
        str(trt.__version__),
        target.compute_capabilities,
        options.streams,
        tuple(reports),
        flat.bytes_per_stream(),
        tuple(notes),
    )
    return Bundle.open(bundle.path, verify=False), report


@dataclass(frozen=True)
class _Work:
    """Builds engines into a bundle that was flattened to one precision, and notes what was decided."""

    trt: Any
    flavour: str
    target: Target
    options: BuildOptions
    progress: Progress
    notes: list[str]

    def one(self, flat: Bundle, name: str, attention: str) -> tuple[Bundle, GraphReport]:
        """The engine of a graph, new or the one that is there."""
        known = None if self.options.again else _known(flat, self._wanted(flat, name, attention))
        if known is None:
            return self.new(flat, name, attention)
        file, entry = known
        return flat, GraphReport(name, file, entry.bytes, None, None, 0.0, None, None)

    def new(self, flat: Bundle, name: str, attention: str) -> tuple[Bundle, GraphReport]:
        begin = time.perf_counter()
        maker = EngineMaker(self.trt, self.flavour, flat, name, attention, self.options, self.target, self.progress)
        content, network = maker.make()
        wanted = self._wanted(flat, name, attention)
        entry = replace(wanted, bytes=content.nbytes, sha256=hashlib.sha256(content).hexdigest())
        if network.decomposed is not None:
            entry = replace(entry, attention="decomposed")
            self.notes.append(
                f"{name}: TensorRT has no fused attention for {network.decomposed}: built from separate layers"
            )
        if network.copied_states:
            self.notes.append(f"{name}: copied in every step, not updated in place: {', '.join(network.copied_states)}")
        seconds = round(time.perf_counter() - begin, 2)
        flat, file = _keep(flat, entry, content)
        on_device = _on_device(self.trt, content, self.options)
        fused = 0 if network.decomposed is not None else network.attentions
        return flat, GraphReport(name, file, entry.bytes, network, fused, seconds, *on_device)

    def fastest(self, flat: Bundle, name: str) -> tuple[Bundle, GraphReport]:
        """TensorRT's attention and ours, each built anew and measured in turn; the slower one is thrown away."""
        flat, native = self.new(flat, name, "native")
        try:
            flat, ours = self.new(flat, name, "triton")
        except (EngineError, *PLUGIN_ERRORS) as error:
            self.notes.append(f"{name}: attention native, the other could not be built: {error}")
            return flat, native
        found = {"native": native, "triton": ours}
        spent: dict[str, list[float]] = {attention: [] for attention in found}
        try:
            for _ in range(ROUNDS):
                for attention, item in found.items():
                    spent[attention] += _step_ms(flat, item, self.options.streams)
        except EngineError as error:
            self.notes.append(f"{name}: attention native, the other could not be measured: {error}")
            return _strike(flat, ours.file), native
        step_ms = {attention: round(statistics.median(times), 4) for attention, times in spent.items()}
        kept = min(found, key=lambda attention: step_ms[attention])
        told = ", ".join(f"{attention} {ms:.3f} ms" for attention, ms in step_ms.items())
        self.notes.append(f"{name}: a step of {self.options.streams} with attention {told}: {kept} is kept")
        for attention, item in found.items():
            if attention != kept:
                flat = _strike(flat, item.file)
        return flat, replace(found[kept], step_ms=step_ms)

    def _wanted(self, flat: Bundle, name: str, attention: str) -> EngineFile:
        graph, options = flat.manifest.graphs[name], self.options
        return EngineFile(
            graph=name,
            precision=flat.manifest.precision,
            flavour=self.flavour,
            version=str(self.trt.__version__),
            compute_capabilities=self.target.compute_capabilities,
            streams=options.streams,
            source=source_key(flat, graph),
            bytes=0,
            sha256="",
            labels=LABELS[2] if any("C" in port.shape for port in graph.inputs) else None,
            attention=attention,
            version_compatible=options.version_compatible,
        )


def _default_precision(manifest: Manifest) -> str:
    """FP16, with INT4 weights where that is what a decoder was exported in, if not for TensorRT."""
    if "fp16" not in manifest.precisions and {"fp16+w4", "w4"} & set(manifest.precisions):
        return "fp16+w4"
    return "fp16"


def _derive(bundle: Bundle, precision: str) -> Bundle:
    """The bundle with fp16 added, where that can be derived."""
    found = ", ".join(bundle.manifest.precisions)
    if bundle.manifest.language is not None:
        raise EngineError(
            f"{bundle.path}: has no {precision} (it has {found}); TensorRT takes decoders in fp16, fp16+w4 and fp32,"
            f" made from the checkpoint: framestep export --precision {precision if precision in DECODERS else 'fp16'}"
        )
    if "w8" in bundle.manifest.precisions:
        raise EngineError(
            f"{bundle.path}: has no {precision} (it has {found}); TensorRT takes fp32 and what is made of it:"
            " framestep export --precision fp32"
        )
    if precision != "fp16":
        ways = {
            "fp16+int8": "make it with 'framestep calibrate --precision fp16+int8'",
            "fp16+w4": "only language decoders are exported in it",
            "fp32": "export the checkpoint again",
        }
        raise EngineError(f"{bundle.path}: has no {precision} (it has {found}); {ways[precision]}")
    try:
        from .half import add_half
    except ImportError as error:
        raise EngineError(
            f"{bundle.path}: has no fp16, and to derive it needs onnx ({error}): pip install onnx"
        ) from None
    return add_half(bundle)


def _has_rings(manifest: Manifest, name: str) -> bool:
    kinds = {state.name: state.kind for state in manifest.states}
    return any(kinds[use.state] == "ring" for use in manifest.graphs[name].states)


def _step_ms(flat: Bundle, item: GraphReport, streams: int) -> list[float]:
    """Milliseconds of steps by one engine, with full rings, as a session runs them."""
    engines = {item.file: flat.manifest.engines[item.file]}
    only = replace(flat, manifest=replace(flat.manifest, engines=engines))
    engine = TensorRtEngine(only, [item.graph], (), streams)
    spent = []
    try:
        engine.positions[:] = max(state.capacity for state in flat.manifest.states)
        for _ in range(WARM_STEPS):
            engine.run_range(0, streams)
        for _ in range(TIMED_STEPS):
            begin = time.perf_counter()
            engine.run_range(0, streams)
            spent.append((time.perf_counter() - begin) * 1e3)
    finally:
        engine.close()
    return spent


def _check_options(options: BuildOptions) -> None:
    if options.precision not in (None, *PRECISIONS):
        raise EngineError(f"--precision: expected {', '.join(PRECISIONS)}, found '{options.precision}'")
    if options.attention not in ATTENTIONS:
        raise EngineError(f"--attention: expected {', '.join(ATTENTIONS)}, found '{options.attention}'")
    if options.streams < 1:
        raise EngineError(f"--streams: expected at least 1, found {options.streams}")
    if options.hardware_compatible and options.compute_capabilities:
        raise EngineError("--hardware-compatible is for all GPUs from 8.0 on: give no --compute-capability with it")


def _target(trt: Any, flavour: str, options: BuildOptions) -> Target:
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
            asked_for = tuple(known[name] for name in options.compute_capabilities)
            return Target(asked_for, options.compute_capabilities, None)
        here = None if options.hardware_compatible else _capability_here()
        return (
            Target((), (PORTABLE,), None) if here is None else Target((trt.ComputeCapability.CURRENT,), (here,), here)
        )
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
    return Target((), (PORTABLE,) if options.hardware_compatible else (here,), here)


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


def _keep(bundle: Bundle, entry: EngineFile, content: Any) -> tuple[Bundle, str]:
    """Write an engine and record it; engines of this graph that its new content has made stale are removed."""
    name = named(entry)
    path = bundle.file(name)
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be written: {error.strerror}") from None
    write_file(path, [content])
    whole = with_engine(bundle, name, entry)
    flat = replace(whole, manifest=whole.manifest.at(entry.precision))
    for old, known in whole.manifest.engines.items():
        if (known.graph, known.precision) == (entry.graph, entry.precision) and known.source != entry.source:
            flat = _strike(flat, old)
    return flat, name


def _strike(flat: Bundle, file: str) -> Bundle:
    """Remove an engine from the bundle."""
    whole = with_engine(flat, file, None)
    whole.file(file).unlink(missing_ok=True)
    return replace(whole, manifest=whole.manifest.at(flat.manifest.precision))


def _on_device(trt: Any, content: Any, options: BuildOptions) -> tuple[int | None, int | None]:
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
