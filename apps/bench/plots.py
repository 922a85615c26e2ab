"""The plots of a bench. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from ...runtime.counted import counted
from .paths import FRAMESTEP
from .report import PathReport, PositionReport, Report

Value = Callable[[PositionReport], float]

SIZE = (9.0, 5.4)  # inches
DPI = 150
INK, MUTED, GRID = "#1f2430", "#667085", "#e4e7ec"
OURS = "#0b6e4f"
# colour, dash, marker: told apart in print and by readers who do not see all colours alike
STYLES: dict[str, tuple[str, str, str]] = {
    FRAMESTEP: (OURS, "-", "o"),
    "pytorch-recompute": ("#c1440e", "-", "s"),
    "pytorch-bidirectional": ("#e08e45", "--", "D"),
    "pytorch-growing-cache": ("#3b5bdb", "-", "^"),
    "pytorch-growing-cache-tuned": ("#7c93f0", "--", "v"),
    "pytorch-compile": ("#9c36b5", "-", "P"),
    "openvino-f32": ("#0c8599", "-", "X"),
    "openvino-default": ("#5bc0d0", "--", "*"),
    "framestep-bf16": ("#5bb596", "--", "o"),
}
# of the bundle's other precisions, in the report's order
PRECISION_STYLES = (
    ("#74b816", "-", "p"),
    ("#a9c934", "--", "h"),
    ("#2f9e44", "-.", "d"),
    ("#94a3b8", ":", "<"),
    ("#5c940d", "--", ">"),
)


def draw(report: Report, folder: Path) -> list[Path]:
    """Draw what the report has measured.

    Returns:
        The files: `latency.png`, `memory.png`, `histogram.png`.
    """
    files = []
    drawn = [path for path in report.paths if path.positions]
    if drawn:
        files += [_latency(report, drawn, folder / "latency.png"), _memory(report, drawn, folder / "memory.png")]
    if report.steady is not None:
        files.append(_histogram(report, folder / "histogram.png"))
    return files


def _style(report: Report, path: PathReport) -> tuple[str, str, str]:
    if path.name in STYLES:
        return STYLES[path.name]
    others = [each.name for each in report.paths if each.name not in STYLES]
    return PRECISION_STYLES[others.index(path.name) % len(PRECISION_STYLES)]


def _latency(report: Report, paths: list[PathReport], file: Path) -> Path:
    """Figure 3 of the StreamFormer paper (arXiv 2504.20041), redrawn with our line."""
    figure, axes = _figure(report, "Latency of the newest frame against its position in the stream")
    lines = []
    for path in paths:
        x, y = _series(path, lambda entry: entry.latency_ms.p50)
        ours = path.name == FRAMESTEP
        colour, dash, marker = _style(report, path)
        axes.plot(
            x,
            y,
            dash,
            color=colour,
            marker=marker,
            markersize=6 if ours else 4.5,
            linewidth=2.8 if ours else 1.6,
            zorder=5 if ours else 3,
        )
        band = [entry for entry in path.positions if entry.latency_ms.p95 is not None]
        if ours and band:
            where = [float(entry.position) for entry in band]
            low = [entry.latency_ms.p50 for entry in band]
            high = [entry.latency_ms.p95 or 0.0 for entry in band]
            axes.fill_between(where, low, high, color=colour, alpha=0.15, linewidth=0)
        if path.stopped:
            axes.plot(x[-1], y[-1], marker="|", markersize=16, color=colour, markeredgewidth=2.2)
        lines.append((x[-1], y[-1], path, f"{_number(y[-1])} ms"))
    _position_axis(axes, report)
    _value_axis(axes, "p50 latency, ms")
    _name_lines(axes, report, lines)
    notes = ["p50, median over processes; logarithmic axes"]
    if any(path.stopped for path in paths):
        notes.append("a bar ends a line that ran out of time or memory")
    if any(entry.latency_ms.p95 for path in paths if path.name == FRAMESTEP for entry in path.positions):
        notes.append("shaded: framestep up to p95")
    return _save(figure, file, "; ".join(notes))


def _memory(report: Report, paths: list[PathReport], file: Path) -> Path:
    figure, axes = _figure(report, "Peak memory of the process against the position in the stream")
    lines = []
    for path in paths:
        x, y = _series(path, lambda entry: entry.peak_bytes / 1e6)
        colour, dash, marker = _style(report, path)
        ours = path.name == FRAMESTEP
        axes.plot(x, y, dash, color=colour, marker=marker, markersize=5, linewidth=2.8 if ours else 1.6)
        lines.append((x[-1], y[-1], path, f"{y[-1]:,.0f} MB"))
    _position_axis(axes, report)
    _value_axis(axes, "peak resident memory, MB")
    _name_lines(axes, report, lines)
    return _save(figure, file, "weights and libraries included; logarithmic axes")


def _histogram(report: Report, file: Path) -> Path:
    steady = report.steady
    assert steady is not None
    latency = steady.latency_ms
    figure, axes = _figure(report, f"Latency of {steady.frames:,} frames in a row", width=0.87)
    values = steady.latencies_ms
    # a lone outlier must not press all others into one bin
    tail = 4 * (latency.p99 - latency.p50) if latency.p99 is not None else latency.max
    right = min(latency.max, latency.p50 + tail) * 1.005
    beyond = sum(value > right for value in values)
    low = min(values)
    bins = max(12, min(80, len(values) // 8))
    axes.hist([value for value in values if value <= right], bins=bins, range=(low, right), color=OURS, alpha=0.85)
    top = axes.get_ylim()[1]
    axes.set_ylim(0, top * 1.3)
    marks = [("p50", latency.p50), ("p95", latency.p95), ("p99", latency.p99), ("max", latency.max)]
    shown = [(name, value) for name, value in marks if value is not None]
    for row, (name, value) in enumerate(shown):
        height = top * (1.25 - 0.07 * row)
        if value > right:
            text = f"{name} {_number(value)} ms →"
            axes.annotate(text, (right, height), ha="right", va="center", color=INK, fontsize=9.5)
            continue
        axes.plot([value, value], [0, height], color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        near_right = value > low + 0.8 * (right - low)
        axes.annotate(
            f"{name} {_number(value)} ms",
            (value, height),
            textcoords="offset points",
            xytext=(-5 if near_right else 5, 0),
            ha="right" if near_right else "left",
            va="center",
            color=INK,
            fontsize=9.5,
        )
    axes.set_xlabel("latency of a frame, ms")
    axes.set_ylabel("frames")
    axes.grid(True, axis="y", color=GRID, linewidth=0.8)
    note = f"standard deviation {_number(steady.spread_ms)} ms"
    if beyond:
        note += f"; {beyond} {'frame' if beyond == 1 else 'frames'} beyond the right edge"
    return _save(figure, file, note)


def _figure(report: Report, title: str, width: float = 0.605) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, dpi=DPI, facecolor="white")
    axes = figure.add_axes((0.1, 0.135, width, 0.70))
    bundle = report.bundle
    threads = counted(report.asked.threads, "thread")
    figure.text(0.02, 0.955, title, fontsize=13.5, fontweight="bold", color=INK, va="center")
    where = f"{report.machine.title()}; {threads}"
    what = f"{bundle.family}, {bundle.frame[0]}x{bundle.frame[1]} px, window {bundle.window}, {bundle.precision}"
    figure.text(0.02, 0.905, f"{where}; {what}", fontsize=9.5, color=MUTED, va="center")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=INK, which="both", labelsize=9.5)
    axes.set_axisbelow(True)
    return figure, axes


def _position_axis(axes: Axes, report: Report) -> None:
    axes.set_xscale("log", base=2)
    positions = report.asked.frames
    axes.set_xticks(list(positions), [f"{position:,}" for position in positions])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(positions[0] / 1.25, positions[-1] * 1.25)
    window = report.bundle.window
    if positions[0] < window < positions[-1]:
        axes.axvline(window, color=MUTED, linewidth=0.9, linestyle=(0, (2, 3)), zorder=1)
        axes.annotate(
            f"window {window}",
            (window, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(4, -4),
            textcoords="offset points",
            fontsize=8.5,
            color=MUTED,
            va="top",
        )
    axes.grid(True, which="major", color=GRID, linewidth=0.8)
    axes.set_xlabel("frame of the stream (1 is the first)")


def _value_axis(axes: Axes, label: str) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.set_ylim(low / 1.2, high * 1.2)
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(10, subs=subs, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _number(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)
    axes.set_ylabel(label)


def _name_lines(axes: Axes, report: Report, lines: list[tuple[float, float, PathReport, str]]) -> None:
    """Name each line at the right, in the order of the lines' ends, joined to them by their colour and marker."""
    ordered = sorted(lines, key=lambda line: -line[1])
    height = min(0.095, 0.9 / max(1, len(ordered)))
    for row, (x, _, path, value) in enumerate(ordered):
        colour, dash, marker = _style(report, path)
        y = 0.97 - row * height
        axes.plot(
            [1.03, 1.07],
            [y, y],
            dash,
            color=colour,
            marker=marker,
            markevery=[1],
            markersize=5,
            linewidth=2.6 if path.name == FRAMESTEP else 1.6,
            transform=axes.transAxes,
            clip_on=False,
        )
        weight = "bold" if path.name == FRAMESTEP else "normal"
        axes.text(1.09, y + 0.012, path.title, transform=axes.transAxes, fontsize=8.6, fontweight=weight, color=INK,
                  va="center")  # fmt: skip
        axes.text(1.09, y - 0.028, f"{value} at frame {x:,.0f}", transform=axes.transAxes, fontsize=7.8, color=MUTED,
                  va="center")  # fmt: skip


def _series(path: PathReport, value: Value) -> tuple[list[float], list[float]]:
    return [float(entry.position) for entry in path.positions], [value(entry) for entry in path.positions]


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}".removesuffix(".0")
    return f"{value:.3g}"


def _save(figure: Figure, file: Path, note: str) -> Path:
    figure.text(0.02, 0.02, note, fontsize=8.5, color=MUTED, va="bottom")
    figure.savefig(file)
    return file
