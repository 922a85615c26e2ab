"""From a float32 bundle and clips to a quantized bundle with its report."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from ..export.graph import WeightFile, save_graph
from ..export.half import FLOAT, HALF, LARGEST, centre_pixels, round_as_half, to_half
from ..export.linears import Linear, linears
from ..runtime.bundle import Bundle, BundleWriter
from ..runtime.counted import counted
from ..runtime.engines.choosing import choose_engine
from ..runtime.manifest import Manifest, State, Variant
from ..runtime.session import NonFiniteOutputError, Session
from .clips import Clip
from .compare import Comparison, compare, engine_of, long_clip
from .errors import CalibrationError
from .integer import IntegerProducts, integer_products
from .memory import cached_projections, head_scales, quantize_memory
from .observe import PERCENTILE, Observations, largest_values, observe
from .quantize import LEVELS, check_float, quantize
from .report import Accuracy, Drift, Report, write_report
from .sensitivity import LayerNoise, Trial, fewest_kept, layer_noise
from .smooth import smooth

INT8 = "int8"
INT8_MEMORY = "+kv8"  # ends the name of a precision that keeps keys and values as INT8
PRECISIONS = (INT8, HALF, "fp16+int8", INT8 + INT8_MEMORY, FLOAT + INT8_MEMORY, HALF + INT8_MEMORY)


@dataclass(frozen=True)
class CalibrationOptions:
    """How to quantize.

    Attributes:
        precisions: of `PRECISIONS`; the first is the bundle's main one.
        keep_float: whether the float32 graphs stay in the bundle as a variant.
        method: how ranges are taken: "minmax", "percentile" or "entropy".
        percentile: of absolute values, for "percentile".
        smooth: whether outlier channels move into the weights.
        max_drop: percentage points of accuracy that "int8" and "int8+kv8" may lose on labelled clips; None for no
            budget.
        min_cosine: least mean cosine of `pooled` with either; None for no budget.
        drift_frames: length of the stream on which drift is measured; 0 for none.
    """

    precisions: tuple[str, ...] = (INT8,)
    keep_float: bool = False
    method: str = "percentile"
    percentile: float = PERCENTILE
    smooth: bool = False
    max_drop: float | None = None
    min_cosine: float | None = None
    drift_frames: int = 1100


def calibrate(
    bundle: Bundle,
    clips: Sequence[Clip],
    check: Sequence[Clip],
    path: Path,
    options: CalibrationOptions,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Quantize a bundle.

    Args:
        bundle: has float32.
        clips: to take the ranges from.
        check: to measure accuracy on.
        path: of the bundle to write.
        options: see there.
        overwrite: whether a bundle at `path` is replaced.
        progress: takes a line about each stage.

    Raises:
        CalibrationError: see the functions of this folder.
        OutputError: the bundle cannot be written.
    """
    _check_options(bundle, options, check)
    bundle = replace(bundle, manifest=bundle.manifest.at(FLOAT))
    start = time.perf_counter()
    models = _read_models(bundle)
    with BundleWriter(path, overwrite, progress) as writer:
        frames = counted(sum(len(clip.frames) for clip in clips), "frame")
        progress(f"observing {frames} of {counted(len(clips), 'clip')}")
        seen, smoothed = _observe(bundle, models, clips, options)
        noise = layer_noise(models, seen)
        trials: list[Trial] = []
        compared: dict[tuple[str, tuple[str, ...]], Comparison] = {}
        if any(INT8 in precision for precision in options.precisions):
            trials, compared = _choose(bundle, models, seen, noise, check, options, progress)
        kept = trials[-1].kept if trials else ()
        seconds = time.perf_counter() - start
        progress("writing")
        manifest, products = _write(writer.folder, bundle, models, seen, kept, options)
        accuracies, drifts = [], []
        for precision in options.precisions:
            progress(f"comparing {precision} with fp32")
            written = Bundle(writer.folder, manifest.at(precision))
            known = compared.get((precision, kept))
            accuracy, drift = _measure(bundle, written, check, options, models, seen, kept, known)
            accuracies.append(accuracy)
            drifts += [drift] if drift else []
        report = Report(
            source=bundle.path.name,
            clips=[clip.name for clip in clips],
            frames=sum(len(clip.frames) for clip in clips),
            checked_on=[clip.name for clip in check],
            method=options.method,
            smoothed_norms=smoothed,
            calibration_seconds=round(seconds, 1),
            layers=noise,
            kept=list(kept),
            trials=trials,
            integer_products=products,
            accuracy=accuracies,
            drift=drifts,
        )
        write_report(writer.folder, report)
        writer.finish(manifest)
    return report


def _check_options(bundle: Bundle, options: CalibrationOptions, check: Sequence[Clip]) -> None:
    for precision in options.precisions:
        if precision not in PRECISIONS:
            raise CalibrationError(f"--precision: expected {', '.join(PRECISIONS)}, found '{precision}'")
    if bundle.manifest.language is not None:
        raise CalibrationError(
            f"{bundle.path}: has a decoder; choose its precision when it is exported (framestep export --precision)"
        )
    if FLOAT not in bundle.manifest.precisions:
        found = ", ".join(bundle.manifest.precisions)
        raise CalibrationError(
            f"{bundle.path}: is quantized already ({found}); calibrate the float32 bundle of its checkpoint"
        )
    if options.max_drop is not None and options.min_cosine is not None:
        raise CalibrationError("--max-drop and --min-cosine: give one of them")
    for name, value, least, most in (
        ("--max-drop", options.max_drop, 0, 100),
        ("--min-cosine", options.min_cosine, -1, 1),
    ):
        if value is not None and not least <= value <= most:
            raise CalibrationError(f"{name}: expected {least} to {most}, found {value:g}")
    budget = "--max-drop" if options.max_drop is not None else "--min-cosine"
    if _has_budget(options) and not any(INT8 in precision for precision in options.precisions):
        raise CalibrationError(
            f"{budget}: leaves layers in float that would be INT8, and {', '.join(options.precisions)} has none;"
            " leave it out, or give a --precision with int8"
        )
    if options.max_drop is not None and any(clip.truth is None for clip in check):
        raise CalibrationError(
            "--max-drop: needs the truth about every frame: put CLIP.labels.txt beside CLIP.mp4, one label a line,"
            " or give --min-cosine instead"
        )
    if HALF + INT8_MEMORY in options.precisions:
        choose_engine(bundle.manifest, "torch", "cpu")  # measures it; better missing now than after the observation


def _has_budget(options: CalibrationOptions) -> bool:
    return options.max_drop is not None or options.min_cosine is not None


def _tried(options: CalibrationOptions) -> tuple[str, ...]:
    """The precisions that have to keep a budget; INT8 stands for those of FP16."""
    return tuple(one for one in options.precisions if one in (INT8, INT8 + INT8_MEMORY)) or (INT8,)


def _read_models(bundle: Bundle) -> dict[str, onnx.ModelProto]:
    """The graphs that have linear layers and run on frames."""
    models = {}
    for name, graph in bundle.manifest.graphs.items():
        if any(port.role == "input_ids" for port in graph.inputs):
            continue
        model = onnx.load(bundle.file(graph.file))
        check_float(model)
        if linears(model):
            models[name] = model
    if not models:
        raise CalibrationError(f"{bundle.path}: has no linear layer to quantize")
    return models


def _observe(
    bundle: Bundle, models: Mapping[str, onnx.ModelProto], clips: Sequence[Clip], options: CalibrationOptions
) -> tuple[Observations, int]:
    pixels = {name: centre_pixels(model) for name, model in models.items()}
    smoothed = 0
    if options.smooth:
        first = observe(bundle, models, clips, "minmax")
        shared = _shared_weights(models)
        smoothed = sum(smooth(model, first[name], shared) for name, model in models.items())
    cached = {
        name: {
            item.value: f"the state {item.state}"
            for item in cached_projections(model, bundle.manifest.graphs[name].states)
        }
        for name, model in models.items()
    }
    seen = observe(bundle, models, clips, options.method, options.percentile, cached)
    for name, value in pixels.items():
        if value is not None:
            seen[name][value].amax = float(LEVELS)  # a scale of 1: every pixel value exactly
    return seen, smoothed


def _shared_weights(models: Mapping[str, onnx.ModelProto]) -> set[str]:
    names = [item.name for model in models.values() for item in model.graph.initializer]
    return {name for name in names if names.count(name) > 1}


def _choose(
    bundle: Bundle,
    models: Mapping[str, onnx.ModelProto],
    seen: Observations,
    noise: list[LayerNoise],
    check: Sequence[Clip],
    options: CalibrationOptions,
    progress: Callable[[str], None],
) -> tuple[list[Trial], dict[tuple[str, tuple[str, ...]], Comparison]]:
    """The layers that stay in float, by trials of whole graphs; the comparisons, by precision and layers left."""
    compared: dict[tuple[str, tuple[str, ...]], Comparison] = {}
    if not _has_budget(options):
        return [], compared
    of_backbone = [item for item in noise if item.graph != "patch_label"]  # the only one that the budget sees

    def trial_of(precision: str, kept: tuple[str, ...]) -> Trial:
        with tempfile.TemporaryDirectory(prefix="framestep-") as folder:
            only = replace(options, precisions=(precision,), keep_float=False)
            manifest, _ = _write(Path(folder), bundle, models, seen, kept, only)
            found = compared[precision, kept] = compare(bundle, Bundle(Path(folder), manifest), check)
        drop = found.drop
        reached, told = float(found.cosine.mean()), f"cosine {found.cosine.mean():.5f}"
        if options.max_drop is not None and drop is not None:
            reached, told = -drop, f"{drop:.2f} points of accuracy lost"
        progress(f"{precision}, {counted(len(kept), 'layer')} in float: {told}")
        return Trial(kept, reached, round(found.ms, 2))

    def trial(kept: tuple[str, ...]) -> Trial:
        return min((trial_of(precision, kept) for precision in _tried(options)), key=lambda one: one.reached)

    if options.max_drop is not None:
        most = options.max_drop
        return fewest_kept(of_backbone, trial, lambda reached: -reached <= most, f"--max-drop {most:g}"), compared
    least = options.min_cosine
    assert least is not None
    return fewest_kept(of_backbone, trial, lambda reached: reached >= least, f"--min-cosine {least:g}"), compared


def _write(
    folder: Path,
    bundle: Bundle,
    models: Mapping[str, onnx.ModelProto],
    seen: Observations,
    kept: Collection[str],
    options: CalibrationOptions,
) -> tuple[Manifest, list[IntegerProducts]]:
    """Write graphs and all other files of the bundle into `folder`."""
    old = bundle.manifest
    variants: dict[str, Variant] = {}
    products: list[IntegerProducts] = []
    quantized: dict[tuple[str, str], list[Linear]] = {}  # by precision and graph
    with contextlib.ExitStack() as files:
        weights: dict[str, WeightFile] = {}  # precisions that differ in their memory alone share one
        for precision in options.precisions:
            base, graphs = precision.removesuffix(INT8_MEMORY), {}
            if base not in weights:
                weights[base] = files.enter_context(_weights(folder, base))
            for name, model in _copies(models):
                graph = old.graphs[name]
                scales = head_scales(model, graph.states, seen[name]) if _int8_memory(precision) else None
                if INT8 in base:
                    quantized[precision, name] = quantize(model, seen[name], kept)
                if HALF in base:
                    to_half(model, [port for use in graph.states for port in (use.input, use.output) if port])
                if scales is not None:
                    quantize_memory(model, graph.states, scales)
                graphs[name] = replace(graph, file=f"{name}.{_suffix(precision)}.onnx")
                save_graph(model, folder / graphs[name].file, weights[base])
            variants[precision] = Variant(graphs, _states(old.states, precision))
    for precision, variant in variants.items():
        for name, graph in variant.graphs.items():
            onnx.checker.check_model(str(folder / graph.file), full_check=True)
            if precision.removesuffix(INT8_MEMORY) == INT8 and all(item.graph != name for item in products):
                products.append(integer_products(folder / graph.file, name, quantized[precision, name]))
    if options.keep_float:
        variants[FLOAT] = Variant({name: old.graphs[name] for name in models}, old.states)
    main, *others = variants
    manifest = replace(
        old,
        precision=main,
        graphs={**old.graphs, **variants[main].graphs},
        states=variants[main].states,
        variants={name: variants[name] for name in others},
    )
    for name in _other_files(bundle, manifest):
        shutil.copyfile(bundle.file(name), folder / name)
    return manifest, products


def _write_rounded(
    folder: Path,
    bundle: Bundle,
    models: Mapping[str, onnx.ModelProto],
    seen: Observations,
    kept: Collection[str],
    precision: str,
) -> Bundle:
    """Write a stand-in for an FP16 precision that rounds as it does, in float32; see `round_as_half`."""
    graphs, states = dict(bundle.manifest.graphs), bundle.manifest.states
    with _weights(folder, precision) as weights:
        for name, model in _copies(models):
            uses = graphs[name].states
            scales = head_scales(model, uses, seen[name]) if _int8_memory(precision) else None
            if INT8 in precision:
                quantize(model, seen[name], kept)
            round_as_half(model)
            if scales is not None:
                quantize_memory(model, uses, scales)
                states = _states(states, precision)
            graphs[name] = replace(graphs[name], file=f"{name}.rounded.onnx")
            save_graph(model, folder / graphs[name].file, weights)
    manifest = replace(bundle.manifest, precision=precision, graphs=graphs, states=states)
    for name in _other_files(bundle, manifest):
        shutil.copyfile(bundle.file(name), folder / name)
    return Bundle(folder, manifest)


def _copies(models: Mapping[str, onnx.ModelProto]) -> Iterator[tuple[str, onnx.ModelProto]]:
    for name, model in models.items():
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        yield name, copy


@contextlib.contextmanager
def _weights(folder: Path, precision: str) -> Iterator[WeightFile]:
    weights = WeightFile(folder / f"{_suffix(precision)}.bin")
    try:
        yield weights
    finally:
        weights.close()


def _suffix(precision: str) -> str:
    return precision.replace("+", "-")


def _int8_memory(precision: str) -> bool:
    return precision.endswith(INT8_MEMORY)


def _states(states: Sequence[State], precision: str) -> tuple[State, ...]:
    dtype = "int8" if _int8_memory(precision) else "float16" if HALF in precision else None
    return tuple(replace(state, dtype=dtype) if dtype else state for state in states)


def _other_files(bundle: Bundle, manifest: Manifest) -> set[str]:
    """Files of the old bundle that the new one goes on using."""
    old = bundle.manifest
    graphs = [graph for precision in manifest.precisions for graph in manifest.at(precision).graphs.values()]
    files = {file for graph in graphs if graph.file in old.files for file in bundle.graph_files(graph)}
    if old.labels is not None:
        files.add(old.labels.file)
    if old.text is not None:
        files.add(old.text.tokenizer)
    return files


def _measure(
    reference: Bundle,
    written: Bundle,
    check: Sequence[Clip],
    options: CalibrationOptions,
    models: Mapping[str, onnx.ModelProto],
    seen: Observations,
    kept: Collection[str],
    known: Comparison | None,
) -> tuple[Accuracy, Drift | None]:
    """How a precision compares with the reference; `known` is what a trial of the same graphs found already."""
    precision = written.manifest.precision
    with tempfile.TemporaryDirectory(prefix="framestep-") as folder:
        measured = written
        if HALF in precision:
            _run_once(written, check[0])
            measured = _write_rounded(Path(folder), reference, models, seen, kept, precision)
        try:
            found = known or compare(reference, measured, check)
        except CalibrationError as error:
            if HALF not in precision:
                raise
            raise CalibrationError(
                f"{error}; {_largest(reference, models, check[0])}; leave {precision} out"
            ) from error
        timed = measured is written
        accuracy = Accuracy.of(precision, found, written, reference, timed)
        if not options.drift_frames:
            return accuracy, None
        return accuracy, Drift.of(precision, compare(reference, measured, [long_clip(check, options.drift_frames)]))


def _run_once(bundle: Bundle, clip: Clip) -> None:
    """Whether the graph that goes into the bundle runs at all."""
    with Session(bundle, engine_of(bundle), "cpu", precision=bundle.manifest.precision) as session:
        try:
            session.open_stream().step(clip.frames[0])
        except NonFiniteOutputError as error:
            raise CalibrationError(f"{bundle.manifest.precision}: NaN or infinity at the first frame") from error


def _largest(bundle: Bundle, models: Mapping[str, onnx.ModelProto], clip: Clip) -> str:
    """Where float32 first exceeds what FP16 holds, in words."""
    for graph, value, largest in largest_values(bundle, models, clip):
        if largest > LARGEST:
            return f"FP16 holds up to {LARGEST:g}, and {graph} reaches {largest:.3g} in {value}"
    return f"no value of the float32 graphs exceeds {LARGEST:g}"
