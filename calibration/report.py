"""The accuracy report of a calibration: `report.json` for machines, `report.md` and plots for people, in the bundle."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.bundle import Bundle
from ..runtime.counted import counted
from .compare import Comparison
from .integer import IntegerProducts
from .sensitivity import LayerNoise, Trial

JSON, MARKDOWN = "report.json", "report.md"
AGES = (0, 16, 50, 100, 250, 500, 750, 1000)  # lower edges of the age groups, in frames
EARLY, LATE = 50, 1000  # frames after which agreement is compared
STRETCH = 100  # frames that such a figure is taken over


@dataclass(frozen=True)
class Accuracy:
    """A precision against float32 on the clips checked.

    Attributes:
        agreement: share of frames whose best label is the same, None without labels.
        reference_accuracy, accuracy: share of frames whose best label is the true one, None without truth.
        bytes: of the files that a run in this precision reads.
        reference_state_bytes, state_bytes: per stream.
        reference_ms, ms: median latency of a step, measured in turn in one process. None for FP16.
    """

    precision: str
    frames: int
    cosine: float
    lowest_cosine: float
    agreement: float | None
    reference_accuracy: float | None
    accuracy: float | None
    reference_bytes: int
    bytes: int
    reference_state_bytes: int
    state_bytes: int
    reference_ms: float | None
    ms: float | None

    @classmethod
    def of(cls, precision: str, found: Comparison, bundle: Bundle, reference: Bundle, timed: bool) -> Accuracy:
        return cls(
            precision,
            len(found.age),
            _rounded(found.cosine.mean()),
            _rounded(found.cosine.min()),
            None if found.agrees is None else _rounded(found.agrees.mean()),
            None if found.reference_hits is None else _rounded(found.reference_hits.mean()),
            None if found.hits is None else _rounded(found.hits.mean()),
            read_bytes(reference),
            read_bytes(bundle),
            reference.bytes_per_stream(),
            bundle.bytes_per_stream(),
            round(found.reference_ms, 2) if timed else None,
            round(found.ms, 2) if timed else None,
        )


@dataclass(frozen=True)
class AgeGroup:
    """Frames from `first` on, up to the next group, of one long stream."""

    first: int
    frames: int
    cosine: float
    agreement: float | None


@dataclass(frozen=True)
class Drift:
    """Whether the error builds up: one long stream in both precisions, by age.

    Attributes:
        early, late: cosine and agreement over `STRETCH` frames from frame `EARLY` and `LATE` on (or the last ones).
        slope: of the cosine over 1,000 frames, from frame `EARLY` on.
    """

    precision: str
    frames: int
    groups: list[AgeGroup]
    early_cosine: float
    late_cosine: float
    early_agreement: float | None
    late_agreement: float | None
    slope: float

    @classmethod
    def of(cls, precision: str, found: Comparison) -> Drift:
        count = len(found.age)
        edges = [first for first in AGES if first < count] + [count]
        groups = [
            AgeGroup(first, end - first, _mean(found.cosine, first, end), _share(found.agrees, first, end))
            for first, end in pairwise(edges)
        ]
        early = (min(EARLY, count // 2), min(EARLY + STRETCH, count))
        late = (max(0, min(LATE, count - STRETCH)), min(LATE + STRETCH, count))
        later = found.age >= early[0]
        slope = np.polyfit(found.age[later], found.cosine[later], 1)[0] * 1000 if later.sum() > 1 else 0.0
        return cls(
            precision,
            count,
            groups,
            _mean(found.cosine, *early),
            _mean(found.cosine, *late),
            _share(found.agrees, *early),
            _share(found.agrees, *late),
            _rounded(slope),
        )


@dataclass(frozen=True)
class Report:
    """Everything that a calibration found. `kept` are the layers left in float; `trials` how they were chosen."""

    source: str
    clips: list[str]
    frames: int
    checked_on: list[str]
    method: str
    smoothed_norms: int
    calibration_seconds: float
    layers: list[LayerNoise]
    kept: list[str]
    trials: list[Trial]
    integer_products: list[IntegerProducts]
    accuracy: list[Accuracy]
    drift: list[Drift]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_bytes(bundle: Bundle) -> int:
    """Bytes of the files that a run reads: graphs, weights, labels."""
    manifest = bundle.manifest
    files = {file for graph in manifest.graphs.values() for file in bundle.graph_files(graph)}
    if manifest.labels is not None:
        files.add(manifest.labels.file)
    if manifest.text is not None:
        files.add(manifest.text.tokenizer)
    return sum(bundle.file(name).stat().st_size for name in files)


def write_report(folder: Path, report: Report) -> None:
    """Write the report into a bundle's folder; plots only where matplotlib is installed."""
    (folder / JSON).write_text(json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n", "utf-8")
    plots = _plots(folder, report) if importlib.util.find_spec("matplotlib") else []
    (folder / MARKDOWN).write_text(markdown(report, plots), "utf-8")


def markdown(report: Report, plots: list[str]) -> str:
    """The report as text."""
    lines = [
        "# Calibration report",
        "",
        f"From `{report.source}`: {counted(report.frames, 'frame')} of {counted(len(report.clips), 'clip')},"
        f" stepped with live memory; ranges by {report.method}"
        + (
            f"; outliers of {counted(report.smoothed_norms, 'layer norm')} moved into weights"
            if report.smoothed_norms
            else ""
        )
        + f"; {report.calibration_seconds:g} s. Checked on {', '.join(report.checked_on)}.",
        "",
        "| precision | cosine of pooled (lowest) | same best label | accuracy (fp32) | MB read (fp32)"
        " | state, MB a stream (fp32) | p50 ms (fp32) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for item in report.accuracy:
        accuracy = "" if item.accuracy is None else f"{item.accuracy:.2%} ({item.reference_accuracy:.2%})"
        lines.append(
            f"| {item.precision} | {item.cosine:.5f} ({item.lowest_cosine:.5f}) | {_percent(item.agreement)}"
            f" | {accuracy}"
            f" | {item.bytes / 1e6:.1f} ({item.reference_bytes / 1e6:.1f})"
            f" | {item.state_bytes / 1e6:.2f} ({item.reference_state_bytes / 1e6:.2f})"
            f" | {'' if item.ms is None else f'{item.ms:.2f} ({item.reference_ms:.2f})'} |"
        )
    lines += [
        "",
        "Latencies are of the engine `onnxruntime` on the CPU, both precisions stepped in turn. It emulates FP16, which"
        " is not timed, and whose accuracy with INT8 memory (fp16+kv8) is that of the engine `torch`.",
        "",
    ]
    for products in report.integer_products:
        lines.append(
            f"Graph `{products.graph}`: {counted(products.integer, 'integer product')} for"
            f" {counted(products.quantized, 'quantized layer')} in ONNX Runtime's optimised graph"
            " (`onnxruntime:plain`)"
            + (f"; in float: {', '.join(products.in_float)}" if products.in_float else "")
            + "."
        )
    lines += ["", "## Layers in float", ""]
    lines.append(", ".join(report.kept) if report.kept else "None.")
    for trial in report.trials:
        lines.append(f"- {len(trial.kept)} in float: reached {trial.reached + 0:.5g}, p50 {trial.milliseconds:g} ms")
    for drift in report.drift:
        lines += ["", f"## {drift.precision} by age of the stream ({drift.frames} frames)", ""]
        lines += ["| frames from | cosine of pooled | same best label |", "| --- | --- | --- |"]
        lines += [f"| {group.first} | {group.cosine:.5f} | {_percent(group.agreement)} |" for group in drift.groups]
        lines += [
            "",
            f"{STRETCH} frames from {EARLY} on: cosine {drift.early_cosine:.5f}{_same(drift.early_agreement)};"
            f" from {LATE} on: {drift.late_cosine:.5f}{_same(drift.late_agreement)}."
            f" Slope of the cosine: {drift.slope:+.5f} in 1,000 frames.",
        ]
    lines += [
        "",
        "## Noise by layer",
        "",
        "| layer | signal to noise, dB | largest input | range |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {item.graph}: {item.layer} | {item.decibels:.1f} | {item.largest:.3g} | {item.amax:.3g} |"
        for item in report.layers
    ]
    for plot in plots:
        lines += ["", f"![{Path(plot).stem}]({plot})"]
    return "\n".join(lines) + "\n"


def _plots(folder: Path, report: Report) -> list[str]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    made = []
    if report.drift:
        figure, axes = pyplot.subplots(figsize=(7, 3.5))
        for drift in report.drift:
            axes.plot(
                [g.first + g.frames / 2 for g in drift.groups],
                [g.cosine for g in drift.groups],
                "o-",
                label=drift.precision,
            )
        axes.set(xlabel="age of the stream, frames", ylabel="cosine of pooled with fp32")
        axes.legend()
        figure.tight_layout()
        figure.savefig(folder / "drift.png", dpi=110)
        pyplot.close(figure)
        made.append("drift.png")
    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    axes.bar(range(len(report.layers)), [item.decibels for item in report.layers])
    axes.set(xlabel="linear layers, the noisiest first", ylabel="signal to noise, dB")
    figure.tight_layout()
    figure.savefig(folder / "layers.png", dpi=110)
    pyplot.close(figure)
    return [*made, "layers.png"]


def _mean(values: np.ndarray, first: int, end: int) -> float:
    return _rounded(values[first:end].mean())


def _share(values: np.ndarray | None, first: int, end: int) -> float | None:
    return None if values is None else _rounded(values[first:end].mean())


def _same(share: float | None) -> str:
    return "" if share is None else f", same label {share:.2%}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _rounded(value: float) -> float:
    return round(float(value), 6)
