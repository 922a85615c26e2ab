"""The files of a bench's report: `report.json` for machines, `report.md` for people."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...runtime.counted import counted
from ...runtime.durable import write_file
from ...runtime.schema import to_json
from .machine import Machine
from .report import Latency, PathReport, Report


def write_report(report: Report, folder: Path, plots: Sequence[Path]) -> None:
    """Write `report.json` and `report.md` into the folder, in which no other report's plots stay."""
    text = json.dumps(to_json(report), indent=1, ensure_ascii=False, allow_nan=False)
    write_file(folder / "report.json", [(text + "\n").encode()])
    write_file(folder / "report.md", [markdown(report, [plot.name for plot in plots]).encode()])
    for name in {"latency.png", "memory.png", "histogram.png"} - {plot.name for plot in plots}:
        (folder / name).unlink(missing_ok=True)  # of an earlier report


def markdown(report: Report, plots: Sequence[str]) -> str:
    """The report for people; `plots` are file names beside it."""
    machine, asked, bundle = report.machine, report.asked, report.bundle
    lines = [
        "# framestep bench",
        "",
        f"{machine.title()}. {_megabytes(bundle.state_bytes)} of state per stream, window {bundle.window},"
        f" {bundle.frame[0]}x{bundle.frame[1]} pixels, {bundle.precision}, {counted(asked.threads, 'thread')};"
        f" {report.engine}. {report.created}.",
        "",
        f"    {asked.command}",
        "",
    ]
    lines += _plot(plots, "latency.png", "Latency against stream position")
    lines += _latency_table(report)
    lines += _path_notes(report)
    lines += _interleaved_table(report)
    lines += _plot(plots, "memory.png", "Memory against stream position")
    lines += _memory_table(report)
    lines += _streams_table(report)
    lines += _steady_section(report, plots)
    lines += _jitter_table(report)
    lines += _split_table(report)
    lines += _machine_section(machine)
    if report.problems:
        lines += ["## Not measured", "", *(f"- {problem}" for problem in report.problems), ""]
    return "\n".join(lines)


def _latency_table(report: Report) -> list[str]:
    if not any(path.positions for path in report.paths):
        return []
    positions = report.asked.frames
    lines = [
        "## Latency of one frame, ms",
        "",
        f"p50 / p95 / p99 / max. The p50 is the median of the medians of {counted(report.asked.processes, 'process')},"
        " each fresh and alone; the others are of all samples together, and – where there are too few.",
        "",
        *_positions_header(positions),
    ]
    for path in report.paths:
        cells = []
        for position in positions:
            entry = path.at(position)
            cells.append(_distribution(entry.latency_ms) if entry else "")
        lines.append(f"| {path.title} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _path_notes(report: Report) -> list[str]:
    if not report.paths:
        return []
    lines = ["## What was measured", ""]
    for path in report.paths:
        words = [f"**{path.title}** (`{path.name}`): {path.description} Precision: {path.precision}."]
        if path.environment:
            words.append("Environment: " + ", ".join(f"`{k}={v}`" for k, v in path.environment.items()) + ".")
        if path.verification is not None:
            words.append(_verified(path))
        counts = [entry.latency_ms.samples for entry in path.positions]
        if counts:
            samples = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
            words.append(f"{samples} samples a position from {counted(path.processes, 'process')}.")
        if path.stopped:
            words.append(f"Drawn up to frame {path.positions[-1].position:,}: {path.stopped}."
                         if path.positions else f"{path.stopped}.")  # fmt: skip
        lines.append("- " + " ".join(words))
    return [*lines, ""]


def _verified(path: PathReport) -> str:
    found = path.verification
    assert found is not None
    against = "its definition" if path.name == "pytorch-bidirectional" else "the session"
    text = f"Largest difference from {against} over {counted(found.frames, 'frame')}: {found.difference:.1e}"
    if found.tolerance is not None:
        return f"{text} (accepted: {found.tolerance:.1e})."
    if found.largest_output is not None:
        return f"{text}, where the largest output is {found.largest_output:.1f} (lower precision; not held to a limit)."
    return f"{text}."


def _interleaved_table(report: Report) -> list[str]:
    if not report.interleaved:
        return []
    lines = [
        "## In turns in one process (A B A B)",
        "",
        "| other path | frame | framestep p50, ms | other p50, ms | framestep / other |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for pair in report.interleaved:
        lines.append(
            f"| {pair.other} | {pair.position:,} | {_ms(pair.framestep_ms.p50)} | {_ms(pair.other_ms.p50)}"
            f" | {pair.ratio:.3f} |"
        )
    return [*lines, ""]


def _memory_table(report: Report) -> list[str]:
    if not any(path.positions for path in report.paths):
        return []
    positions = report.asked.frames
    on_device = any(entry.device_bytes is not None for path in report.paths for entry in path.positions)
    lines = [
        "## Memory of the process, MB",
        "",
        "Resident / peak" + (" / on the GPU" if on_device else "") + ", weights and libraries included.",
        "",
        *_positions_header(positions),
    ]
    for path in report.paths:
        cells = []
        for position in positions:
            entry = path.at(position)
            if entry is None:
                cells.append("")
                continue
            numbers = [entry.resident_bytes, entry.peak_bytes]
            if entry.device_bytes is not None:
                numbers.append(entry.device_bytes)
            cells.append(" / ".join(f"{number / 1e6:,.0f}" for number in numbers))
        lines.append(f"| {path.title} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _streams_table(report: Report) -> list[str]:
    if not report.streams:
        return []
    lines = [
        "## Several streams in one step",
        "",
        "Cost: the step's p50 over that of a session of one stream. Idle room: p50 of one stream in a session with room"
        " for so many, over the same.",
        "",
        "| streams | step p50 / p95 / p99 / max, ms | frames a second | cost | idle room |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for entry in report.streams:
        lines.append(
            f"| {entry.streams} | {_distribution(entry.step_ms)} | {entry.frames_per_second:.2f} | {entry.cost:.2f}"
            f" | {entry.alone_ratio:.3f} |"
        )
    return [*lines, ""]


def _steady_section(report: Report, plots: Sequence[str]) -> list[str]:
    steady = report.steady
    if steady is None:
        return []
    lines = [
        "## Steady run",
        "",
        f"{steady.frames:,} frames, each fed: {_distribution(steady.latency_ms)} ms (p50 / p95 / p99 / max),"
        f" standard deviation {_ms(steady.spread_ms)} ms, last tenth over first tenth {steady.drift:.3f},"
        f" memory {steady.growth_bytes / 1e6:+.1f} MB.",
        "",
    ]
    if steady.around:
        around = ", ".join(f"{entry.position:,}: {_ms(entry.p50_ms)}" for entry in steady.around)
        lines += [f"Medians around positions, ms: {around}.", ""]
    return lines + _plot(plots, "histogram.png", "Latency histogram of the steady run")


def _jitter_table(report: Report) -> list[str]:
    jitter = report.jitter
    if jitter is None:
        return []
    lines = [
        "## The machine's own jitter",
        "",
        f"{counted(jitter.frame_ms.samples, 'frame')} in turns with fixed arithmetic on as many cores: products of"
        " matrices that stay in the cache, as many as last a frame. What it is late by is the machine's doing: other"
        " programs, other guests of a host, clocks.",
        "",
        "| ms | p50 / p95 / p99 / max | p95 / p50 | p99 / p50 |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, latency in (("frame", jitter.frame_ms), ("fixed arithmetic", jitter.fixed_ms)):
        over = ("–" if value is None else f"{value / latency.p50:.2f}" for value in (latency.p95, latency.p99))
        lines.append(f"| {name} | {_distribution(latency)} | {' | '.join(over)} |")
    return [*lines, ""]


def _split_table(report: Report) -> list[str]:
    split = report.split
    if split is None:
        return []
    return [
        f"## Where the time of a {split.frame[1]}x{split.frame[0]} frame goes, ms (medians)",
        "",
        "| preprocess | bind | engine | results | total |",
        "| ---: | ---: | ---: | ---: | ---: |",
        f"| {split.preprocess_ms:.3f} | {split.bind_ms:.3f} | {split.engine_ms:.3f} | {split.results_ms:.3f}"
        f" | {split.total_ms:.3f} |",
        "",
    ]


def _machine_section(machine: Machine) -> list[str]:
    facts = [
        ("processor", f"{machine.cpu}, {machine.cores} of {machine.online_cores} cores usable"),
        ("board", machine.board),
        ("power mode", machine.power_mode),
        ("flags", " ".join(flag for flag in machine.flags if _is_vector(flag))),
        ("caches", ", ".join(machine.caches)),
        ("governor", machine.governor),
        ("virtual machine", "yes" if machine.virtual else "no"),
        ("memory", f"{machine.memory_bytes / 1e9:.1f} GB"),
        ("transparent huge pages", machine.huge_pages),
        ("GPU", "; ".join(machine.gpus)),
        ("C library, kernel", f"{machine.libc}, {machine.kernel}"),
        ("environment", ", ".join(f"{k}={v}" for k, v in machine.environment.items()) or "no allocator settings"),
        ("Python", machine.python),
        ("packages", ", ".join(f"{name} {version}" for name, version in machine.packages.items())),
        ("load average at the start", f"{machine.load}; well above 0 where others were at work"),
    ]
    rows = [f"| {name} | {value} |" for name, value in facts if value]
    return ["## Machine", "", "| | |", "| --- | --- |", *rows, ""]


def _is_vector(flag: str) -> bool:
    return flag.startswith(("avx", "amx", "fma", "sve", "asimd", "sse4_2", "i8mm", "bf16"))


def _plot(plots: Sequence[str], name: str, caption: str) -> list[str]:
    return [f"![{caption}]({name})", ""] if name in plots else []


def _positions_header(positions: Sequence[int]) -> list[str]:
    columns = " | ".join(f"frame {position:,}" for position in positions)
    return [f"| path | {columns} |", "| --- |" + " ---: |" * len(positions)]


def _distribution(latency: Latency) -> str:
    values = (latency.p50, latency.p95, latency.p99, latency.max)
    return " / ".join("–" if value is None else _ms(value) for value in values)


def _ms(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.3f}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
