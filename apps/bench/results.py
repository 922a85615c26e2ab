"""From what processes said to the entries of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...runtime.bundle import Bundle
from ...runtime.manifest import Manifest
from .measure import CAMERA_FRAME, Job, PositionSamples
from .paths import window_of
from .report import (
    Around,
    BundleFacts,
    Interleaved,
    JitterReport,
    Latency,
    PositionReport,
    SplitReport,
    SteadyReport,
    StreamsReport,
)


def position_report(position: int, found: Sequence[PositionSamples]) -> PositionReport:
    on_device = [entry.device_bytes for entry in found if entry.device_bytes is not None]
    return PositionReport(
        position=position,
        latency_ms=Latency.of([entry.latencies_ms for entry in found]),
        process_p50_ms=tuple(round(float(np.median(entry.latencies_ms)), 4) for entry in found),
        resident_bytes=int(np.median([entry.resident_bytes for entry in found])),
        peak_bytes=int(np.median([entry.peak_bytes for entry in found])),
        device_bytes=int(np.median(on_device)) if on_device else None,
    )


def interleaved(job: Job, result: Mapping[str, Any]) -> Interleaved:
    ours, other = Latency.of([result["a_ms"]]), Latency.of([result["b_ms"]])
    return Interleaved(job.other, job.positions[0], ours, other, round(ours.p50 / other.p50, 4))


def streams(job: Job, result: Mapping[str, Any]) -> StreamsReport:
    together, single, alone = (Latency.of([result[f"{name}_ms"]]) for name in ("together", "single", "alone"))
    return StreamsReport(
        streams=job.streams,
        step_ms=together,
        single_ms=single,
        alone_ms=alone,
        frames_per_second=round(job.streams * 1e3 / together.p50, 3),
        cost=round(together.p50 / single.p50, 4),
        alone_ratio=round(alone.p50 / single.p50, 4),
        peak_bytes=int(result["peak_bytes"]),
    )


def jitter(result: Mapping[str, Any]) -> JitterReport:
    return JitterReport(Latency.of([result["frame_ms"]]), Latency.of([result["fixed_ms"]]))


def split(result: Mapping[str, Any]) -> SplitReport:
    medians = {name: round(float(np.median(values)), 4) for name, values in result.items()}
    return SplitReport(
        CAMERA_FRAME[:2],
        medians["preprocess"],
        medians["bind"],
        medians["engine"],
        medians["results"],
        medians["total"],
    )


def bundle_facts(bundle: Bundle) -> BundleFacts:
    manifest: Manifest = bundle.manifest
    graph = next((graph for graph in manifest.graphs.values() if graph.states), None)
    return BundleFacts(
        path=bundle.path.name,
        family=manifest.family,
        precision=manifest.precision,
        frame=(manifest.frame.height, manifest.frame.width),
        window=window_of(manifest),
        state_bytes=bundle.bytes_per_stream(),
        checkpoint=Path(manifest.origin.checkpoint).name,
        backbone_sha256=manifest.files[graph.file].sha256 if graph else "",
    )


def steady(result: Mapping[str, Any], positions: Sequence[int]) -> SteadyReport:
    latencies = [round(value, 4) for value in result["latencies_ms"]]
    memory = [(int(frame), int(size)) for frame, size in result["memory"]]
    tenth = max(1, len(latencies) // 10)
    settled = next((size for frame, size in memory if frame > tenth), memory[-1][1])
    around = []
    for position in positions:
        near = latencies[position - 1 - position // 8 : position + position // 8]
        if position <= len(latencies):
            around.append(Around(position, len(near), round(float(np.median(near)), 4)))
    return SteadyReport(
        frames=len(latencies),
        latency_ms=Latency.of([latencies]),
        spread_ms=round(float(np.std(latencies)), 4),
        drift=round(float(np.median(latencies[-tenth:]) / np.median(latencies[:tenth])), 4),
        around=tuple(around),
        growth_bytes=memory[-1][1] - settled,
        memory=tuple(number for pair in memory for number in pair),
        latencies_ms=tuple(latencies),
    )
