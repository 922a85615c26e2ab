"""What is in a bundle, told without running it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from ..runtime.bundle import Bundle
from ..runtime.counted import counted
from .inspect_language import blocks_of, describe_language, in_blocks, language_rows


def describe(bundle: Bundle) -> dict[str, Any]:
    """Everything that `framestep inspect` tells, as plain data."""
    manifest = bundle.manifest
    steps = [name for name, graph in manifest.graphs.items() if graph.states]
    graphs = {}
    for name, graph in manifest.graphs.items():
        graphs[name] = {
            "file": graph.file,
            "inputs": {port.name: f"{port.dtype} {_shape(port.shape)}" for port in graph.inputs},
            "outputs": {port.name: f"{port.dtype} {_shape(port.shape)}" for port in graph.outputs},
            "states": len(graph.states),
        }
    return {
        "path": str(bundle.path),
        "family": manifest.family,
        "precision": manifest.precision,
        "precisions": list(manifest.precisions),
        "origin": manifest.origin.checkpoint,
        "written_by": f"framestep {manifest.origin.framestep}",
        "frame": f"{manifest.frame.height}x{manifest.frame.width}, {manifest.frame.resize}",
        "rate": manifest.rate,
        "window": _window(bundle),
        "weight_blocks": blocks_of(bundle, steps) if manifest.language is None else None,
        "language": describe_language(bundle),
        "trained_frames": manifest.origin.trained_frames,
        "graphs": graphs,
        "states": len(manifest.states),
        "bytes_per_stream": bundle.bytes_per_stream(),
        "bytes_per_stream_by_precision": {
            precision: sum(state.bytes_per_stream() for state in manifest.at(precision).states)
            for precision in manifest.precisions
        },
        "bytes_on_disk": sum(entry.bytes for entry in manifest.files.values()),
        "labels": list(manifest.labels.names) if manifest.labels else [],
        "background": manifest.labels.background if manifest.labels else None,
        "scores": _scores(bundle),
        "text_graph": manifest.text is not None,
        "state_key": bundle.state_key(),
        "calibration": _calibration(bundle),
        "notes": _notes(bundle),
    }


def table(bundle: Bundle) -> Table:
    """The same for a person."""
    facts = describe(bundle)
    rows = Table(show_header=False, box=None, pad_edge=False)
    rows.add_column(style="bold", overflow="fold")
    rows.add_column(overflow="fold")

    def add(name: str, told: str) -> None:
        rows.add_row(Text(name), Text(told))  # a label such as [b] is no markup

    rate = "every frame" if facts["rate"] is None else f"{counted(facts['rate'], 'frame')} a second"
    add("bundle", f"{facts['path']}  ({facts['family']}, {facts['precision']}, {_size(facts['bytes_on_disk'])})")
    add("from", f"{facts['origin']}, written by {facts['written_by']}")
    add("sees", f"{facts['frame']}; {rate}")
    if facts["window"]:
        add("remembers", f"{counted(facts['window'], 'frame')}, the current one included")
    if facts["weight_blocks"]:
        add("weights", in_blocks("INT8", facts["weight_blocks"]))
    if facts["language"] is not None:
        for name, told in language_rows(facts["language"]):
            add(name, told)
    add("state", f"{counted(facts['states'], 'tensor')}, {_size(facts['bytes_per_stream'])} per stream")
    for name, graph in facts["graphs"].items():
        add(f"graph {name}", graph["file"])
        for kind in ("inputs", "outputs"):
            for port, kind_shape in graph[kind].items():
                add("", f"{'<-' if kind == 'inputs' else '->'} {port}: {kind_shape}")
    if facts["labels"]:
        add("labels", ", ".join(facts["labels"]))
    if facts["language"] is None:
        add("scores", facts["scores"])
    if len(facts["precisions"]) > 1:
        sizes = facts["bytes_per_stream_by_precision"]
        add("precisions", "; ".join(f"{name}, {_size(sizes[name])} of state per stream" for name in sizes))
    if facts["calibration"] is not None:
        for line in _calibration_lines(facts["calibration"]):
            rows.add_row("calibrated", line)
        rows.add_row("", f"see {bundle.path / 'report.md'}")
    for note in facts["notes"]:
        add("note", note)
    return rows


def _window(bundle: Bundle) -> int:
    """Frames that a stream remembers, the current one included; 0 without memory of frames."""
    return max((state.capacity for state in bundle.manifest.states if state.kind == "ring"), default=0)


def _scores(bundle: Bundle) -> str:
    scoring = bundle.manifest.scoring
    if scoring is None:
        return "none yet; add labels with 'framestep label'"
    if scoring.calibrated:
        return f"calibrated, from the task head {scoring.head}"
    return "uncalibrated: scale and bias are the original SigLIP's; compare scores, do not read them as probabilities"


def _calibration(bundle: Bundle) -> dict[str, Any] | None:
    """The calibration's report, without what it says of each layer."""
    if "report.json" not in bundle.manifest.files:
        return None
    report = json.loads(bundle.file("report.json").read_text("utf-8"))
    return {name: value for name, value in report.items() if name not in ("layers", "trials")}


def _calibration_lines(report: dict[str, Any]) -> Iterator[str]:
    for item in report["accuracy"]:
        line = f"{item['precision']}: cosine of pooled {item['cosine']:.5f} with fp32"
        if item["accuracy"] is not None:
            line += f", accuracy {item['accuracy']:.2%} ({item['reference_accuracy']:.2%})"
        if item["ms"] is not None:
            line += f", p50 {item['ms']:.1f} ms ({item['reference_ms']:.1f})"
        yield line
    for item in report["drift"]:
        early, late = item["early_cosine"], item["late_cosine"]
        yield f"{item['precision']} over {counted(item['frames'], 'frame')}: cosine {early:.5f} early, {late:.5f} late"


def _notes(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    notes = []
    trained = manifest.origin.trained_frames
    window = _window(bundle)
    if trained is not None:
        notes.append(
            f"time embeddings were trained for {counted(trained, 'frame')}; from frame {trained} on every frame carries"
            " the last one, so the model knows what was in its window but not in which order"
        )
        if window > trained:
            notes.append(f"a window of {window} frames is longer than the {trained} that the checkpoint was trained on")
    if manifest.rate is None:
        notes.append("no rate is recorded: feed frames at the rate of the training clips (export with --rate)")
    return notes


def _shape(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
