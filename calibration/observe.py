"""What enters the linear layers, seen while the graph steps over video with its memory filled.

The graphs get the linear layers' inputs as further outputs and run on ONNX Runtime as ever: state bound in place, a
reset between clips. Percentile and entropy thresholds are those of `onnxruntime.quantization`'s histogram collector,
whose own calibrators know no state.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..export.linears import linears
from ..runtime.bundle import Bundle
from ..runtime.cores import default_threads
from ..runtime.engines.onnxruntime import OnnxRuntimeEngine
from ..runtime.manifest import STREAMS, Graph, Port
from .clips import Clip
from .entropy import entropy_threshold
from .errors import CalibrationError

METHODS = ("minmax", "percentile", "entropy")
PERCENTILE = 99.999
HISTOGRAM_STEPS = 24  # steps that enter a histogram, spread over all ages; min-max sees every step
LARGEST_COPIED = 1024  # values of a constant that shape inference gets to see
SAMPLED_ROWS = 64  # rows of an activation kept for each of those steps
FIRST_FRAMES = 8  # of a clip, in which every value of the graphs is looked at


@dataclass
class Activation:
    """What was seen of one linear layer's input.

    Attributes:
        amax: the range to quantize is [-amax, amax].
        largest: the largest absolute value seen.
        channels: the largest absolute value of each channel, float32 [in].
        rows: a sample, float32 [rows, in].
    """

    amax: float
    largest: float
    channels: np.ndarray
    rows: np.ndarray


Observations = dict[str, dict[str, Activation]]  # graph -> name of the value -> what was seen


def observe(
    bundle: Bundle,
    models: Mapping[str, onnx.ModelProto],
    clips: Sequence[Clip],
    method: str,
    percentile: float = PERCENTILE,
    others: Mapping[str, Mapping[str, str]] | None = None,
) -> Observations:
    """Step over the clips, with live memory and a reset before each clip, and see what enters the linear layers.

    Args:
        bundle: gives the manifest; its precision is float32.
        models: graphs by name, with their weights; they run instead of the bundle's own.
        clips: video.
        method: one of `METHODS`.
        percentile: of absolute values that the range covers, for "percentile".
        others: by graph, further values to see, with what they enter in words. They may be zero throughout, and their
            range is the largest value seen.

    Raises:
        CalibrationError: NaN or infinity, or a layer that only ever saw zeros.
    """
    if method not in METHODS:
        raise CalibrationError(f"--method: expected {', '.join(METHODS)}, found '{method}'")
    entering = {name: list(dict.fromkeys(linear.input for linear in linears(model))) for name, model in models.items()}
    layer_of = {linear.input: linear.name for model in reversed(list(models.values())) for linear in linears(model)}
    others = others or {}
    for entered in others.values():
        layer_of.update(entered)
    wanted = {
        name: _in_order(models[name], [*values, *others.get(name, {})]) for name, values in entering.items()
    }  # so that the first NaN is named
    total = sum(len(clip.frames) for clip in clips)
    stride = max(1, total // HISTOGRAM_STEPS)
    seen: Observations = {name: {} for name in models}
    histograms = {name: _histogram(method, percentile) for name in models}
    with _stepper(bundle, models, wanted) as engine:
        count = 0
        for clip in clips:
            engine.seek(0, 0)
            for rgb in clip.frames:
                engine.step({0: rgb})
                outputs = engine.output(0)
                # not the first steps of every clip alone: a stride that no clip's length is a multiple of
                sampled = count % stride == stride // 2
                for graph, values in wanted.items():
                    for value in values:
                        _note(seen[graph], value, outputs[_alias(graph, value)], sampled, layer_of[value], count)
                    collector = histograms[graph]
                    if sampled and collector is not None:
                        inputs = {value: outputs[_alias(graph, value)] for value in entering[graph]}
                        with contextlib.redirect_stdout(io.StringIO()):  # it prints a line each time
                            collector.collect(inputs)
                count += 1
    for graph, collector in histograms.items():
        if collector is None or not entering[graph]:
            continue
        if method == "entropy":
            for value, (counts, edges, lowest, highest, *_) in collector.histogram_dict.items():
                seen[graph][value].amax = entropy_threshold(counts, edges, float(lowest), float(highest))
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            thresholds = collector.compute_collection_result()
        for value, (low, high, *_) in thresholds.items():
            seen[graph][value].amax = float(max(abs(low), abs(high)))
    for graph, values in entering.items():
        for value in values:
            if not seen[graph][value].amax > 0:
                raise CalibrationError(
                    f"{graph}: only zeros enter {layer_of[value]}; the video shows nothing to calibrate on"
                )
    return seen


def largest_values(
    bundle: Bundle, models: Mapping[str, onnx.ModelProto], clip: Clip
) -> Iterator[tuple[str, str, float]]:
    """The largest absolute value of every float value of the graphs, in the order in which they are computed.

    Yields:
        graph, name of the value, largest absolute value over the clip's first frames; infinite where it was.
    """
    wanted = {}
    for name, model in models.items():
        shapes = _shapes(model, onnx.TensorProto.FLOAT)
        made = [node.output[0] for node in model.graph.node if node.op_type != "TensorScatter"]
        wanted[name] = [value for value in made if len(shapes.get(value, ())) > 1 and shapes[value][0] == 1]
    with _stepper(bundle, models, wanted) as engine:
        largest: dict[tuple[str, str], float] = {}
        for rgb in clip.frames[:FIRST_FRAMES]:
            engine.step({0: rgb})
            outputs = engine.output(0)
            for graph, values in wanted.items():
                for value in values:
                    seen = float(np.abs(outputs[_alias(graph, value)]).max())
                    largest[graph, value] = max(largest.get((graph, value), 0.0), seen if np.isfinite(seen) else np.inf)
    yield from ((graph, value, number) for (graph, value), number in largest.items())


def _in_order(model: onnx.ModelProto, values: Sequence[str]) -> list[str]:
    """Values of a graph in the order in which they are computed."""
    places = {output: place for place, node in enumerate(model.graph.node) for output in node.output}
    return sorted(values, key=lambda value: places.get(value, -1))


def _note(seen: dict[str, Activation], value: str, array: np.ndarray, sampled: bool, layer: str, step: int) -> None:
    flat = array.reshape(-1, array.shape[-1])
    channels = np.maximum(flat.max(0), -flat.min(0))
    largest = float(channels.max())
    if not np.isfinite(largest):
        raise CalibrationError(f"step {step}: NaN or infinity enters {layer}; the float model itself is broken there")
    rows = flat[np.linspace(0, len(flat) - 1, min(SAMPLED_ROWS, len(flat))).astype(int)].copy() if sampled else flat[:0]
    known = seen.get(value)
    if known is None:
        seen[value] = Activation(largest, largest, channels, rows.copy())
        return
    known.largest = known.amax = max(known.largest, largest)
    known.channels = np.maximum(known.channels, channels)
    if sampled:
        known.rows = np.concatenate([known.rows, rows])


def _histogram(method: str, percentile: float) -> Any:
    from onnxruntime.quantization.calibrate import HistogramCollector

    if method == "minmax":
        return None
    return HistogramCollector(
        method=method, symmetric=True, num_bins=2048, num_quantized_bins=128, percentile=percentile, scenario="same"
    )


@contextlib.contextmanager
def _stepper(
    bundle: Bundle, models: Mapping[str, onnx.ModelProto], wanted: Mapping[str, Sequence[str]]
) -> Iterator[OnnxRuntimeEngine]:
    """An engine for one stream that runs `models` and fetches the `wanted` values."""
    graphs: dict[str, Graph] = {}
    outputs: list[str] = []
    with tempfile.TemporaryDirectory(prefix="framestep-") as folder:
        for name, model in models.items():
            graph = bundle.manifest.graphs[name]
            ports = _expose(model, name, wanted[name], Path(folder) / f"{name}.onnx")
            graphs[name] = replace(graph, file=f"{name}.onnx", outputs=(*graph.outputs, *ports))
            outputs += [port.name for port in ports]
        manifest = replace(bundle.manifest, graphs=graphs, labels=None, text=None, language=None)
        engine = OnnxRuntimeEngine(Bundle(Path(folder), manifest), outputs, 1, "cpu", default_threads())
    try:
        engine.set_constants(_any_labels(manifest.graphs))
        yield engine
    finally:
        engine.close()


def _expose(model: onnx.ModelProto, name: str, values: Sequence[str], path: Path) -> list[Port]:
    """Write a copy of a graph that has `values` as further outputs."""
    shapes = _shapes(model)
    exposed = onnx.ModelProto()
    exposed.CopyFrom(model)
    ports = []
    for value in values:
        port = Port(_alias(name, value), "output", "float32", (STREAMS, *shapes[value][1:]))
        exposed.graph.node.append(onnx.helper.make_node("Identity", [value], [port.name]))
        exposed.graph.output.append(
            onnx.helper.make_tensor_value_info(port.name, onnx.TensorProto.FLOAT, list(port.shape))
        )
        ports.append(port)
    onnx.save(exposed, path, save_as_external_data=True, location=f"{path.stem}.bin")
    return ports


def _shapes(model: onnx.ModelProto, kind: int | None = None) -> dict[str, tuple[int, ...]]:
    """Sizes of the values of a graph (of one type); the streams axis is 1."""
    small = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    for part in ("node", "input", "output", "value_info"):
        getattr(small.graph, part).extend(getattr(model.graph, part))
    for weight in model.graph.initializer:
        if math.prod(weight.dims) <= LARGEST_COPIED:
            small.graph.initializer.add().CopyFrom(weight)
        else:  # shapes do not depend on its values, and inference would copy them several times
            kept = onnx.TensorProto(name=weight.name, data_type=weight.data_type, dims=weight.dims)
            kept.data_location = onnx.TensorProto.EXTERNAL
            small.graph.initializer.append(kept)
    for item in (*small.graph.input, *small.graph.output):
        for extent in item.type.tensor_type.shape.dim:
            if extent.HasField("dim_param"):
                extent.dim_value = 1
    inferred = onnx.shape_inference.infer_shapes(small, data_prop=True)
    infos = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
    return {
        info.name: tuple(extent.dim_value for extent in info.type.tensor_type.shape.dim)
        for info in infos
        if kind is None or info.type.tensor_type.elem_type == kind
    }


def _alias(graph: str, value: str) -> str:
    return f"{graph}:{value}"


def _any_labels(graphs: Mapping[str, Graph]) -> dict[str, np.ndarray]:
    """Something for the label inputs: what enters the linear layers does not depend on them."""
    constants: dict[str, np.ndarray] = {
        "text_embeddings": np.ones((1, 1), np.float32),
        "patch_text_embeddings": np.ones((1, 1), np.float32),
        "logit_scale": np.zeros((), np.float32),
        "logit_bias": np.zeros((), np.float32),
    }
    for graph in graphs.values():
        for port in graph.inputs:
            if port.role in ("text_embeddings", "patch_text_embeddings"):
                constants[port.role] = np.ones((1, *(int(n) for n in port.shape[1:])), np.float32)
    return constants
