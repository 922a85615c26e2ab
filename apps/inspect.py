"""What is in a bundle, told without running it."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..runtime.bundle import Bundle


def describe(bundle: Bundle) -> dict[str, Any]:
    """Everything that `framestep inspect` tells, as plain data."""
    manifest = bundle.manifest
    graphs = {}
    for name, graph in manifest.graphs.items():
        graphs[name] = {
            "file": graph.file,
            "inputs": {port.name: f"{port.dtype} {_shape(port.shape)}" for port in graph.inputs},
            "outputs": {port.name: f"{port.dtype} {_shape(port.shape)}" for port in graph.outputs},
            "states": len(graph.states),
        }
    frames = {state.capacity // state.rows_per_slot for state in manifest.states}
    return {
        "path": str(bundle.path),
        "family": manifest.family,
        "precision": manifest.precision,
        "origin": manifest.origin.checkpoint,
        "written_by": f"framestep {manifest.origin.framestep}",
        "frame": f"{manifest.frame.height}x{manifest.frame.width}, {manifest.frame.resize}",
        "rate": manifest.rate,
        "window": max(frames, default=0),
        "trained_frames": manifest.origin.trained_frames,
        "graphs": graphs,
        "states": len(manifest.states),
        "bytes_per_stream": bundle.bytes_per_stream(),
        "bytes_on_disk": sum(entry.bytes for entry in manifest.files.values()),
        "labels": list(manifest.labels.names) if manifest.labels else [],
        "background": manifest.labels.background if manifest.labels else None,
        "scores": _scores(bundle),
        "text_graph": manifest.text is not None,
        "state_key": bundle.state_key(),
        "notes": _notes(bundle),
    }


def table(bundle: Bundle) -> Table:
    """The same for a person."""
    facts = describe(bundle)
    rows = Table(show_header=False, box=None, pad_edge=False)
    rows.add_column(style="bold")
    rows.add_column()
    rate = "every frame" if facts["rate"] is None else f"{facts['rate']:g} frames a second"
    rows.add_row(
        "bundle", f"{facts['path']}  ({facts['family']}, {facts['precision']}, {_size(facts['bytes_on_disk'])})"
    )
    rows.add_row("from", f"{facts['origin']}, written by {facts['written_by']}")
    rows.add_row("sees", f"{facts['frame']}; {rate}")
    rows.add_row("remembers", f"{facts['window']} frames, the current one included")
    rows.add_row("state", f"{facts['states']} tensors, {_size(facts['bytes_per_stream'])} per stream")
    for name, graph in facts["graphs"].items():
        rows.add_row(f"graph {name}", graph["file"])
        for kind in ("inputs", "outputs"):
            for port, kind_shape in graph[kind].items():
                rows.add_row("", f"{'<-' if kind == 'inputs' else '->'} {port}: {kind_shape}")
    if facts["labels"]:
        rows.add_row("labels", ", ".join(facts["labels"]))
    rows.add_row("scores", facts["scores"])
    for note in facts["notes"]:
        rows.add_row("note", note)
    return rows


def _scores(bundle: Bundle) -> str:
    scoring = bundle.manifest.scoring
    if scoring is None:
        return "none yet; add labels with 'framestep label'"
    if scoring.calibrated:
        return f"calibrated, from the task head {scoring.head}"
    return "uncalibrated: scale and bias are the original SigLIP's; compare scores, do not read them as probabilities"


def _notes(bundle: Bundle) -> list[str]:
    manifest = bundle.manifest
    notes = []
    trained = manifest.origin.trained_frames
    window = max((state.capacity for state in manifest.states), default=0)
    if trained is not None:
        notes.append(
            f"time embeddings were trained for {trained} frames; from frame {trained} on every frame carries the last"
            " one, so the model knows what was in its window but not in which order"
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
