"""The strip below an annotated picture: the latency of its frame, and how recent frames did."""

from __future__ import annotations

import cv2
import numpy as np

from .drawing import GREY, PANEL, WHITE, Colour, put_text, text_unit, text_width
from .latency import Latencies

MEDIAN: Colour = (130, 205, 120)
TAIL: Colour = (80, 170, 250)
LATE: Colour = (80, 80, 240)


class LatencyStrip:
    """Draws the strip of one stream.

    Args:
        latencies: the stream's; whoever runs the stream adds to them.
        deadline_ms: drawn into the graph, or None.
    """

    def __init__(self, latencies: Latencies, deadline_ms: float | None) -> None:
        self._latencies = latencies
        self._deadline_ms = deadline_ms

    def draw(self, width: int, index: int, timestamp: float, latency_ms: float) -> np.ndarray:
        """uint8 BGR [height, width, 3], a new array, for a frame of this index, time (seconds) and latency."""
        unit = text_unit(width)
        height = 2 * round(27 * unit)
        strip = np.empty((height, width, 3), np.uint8)
        strip[:] = PANEL
        margin = round(10 * unit)
        recent = self._latencies.recent()
        late = self._deadline_ms is not None and latency_ms > self._deadline_ms
        first, second = round(23 * unit), round(43 * unit)
        put_text(
            strip,
            f"{_milliseconds(latency_ms)} ms",
            margin,
            first,
            0.62 * unit,
            LATE if late else WHITE,
        )
        put_text(strip, f"#{index}   {_clock(timestamp)}", margin, second, 0.42 * unit, GREY)
        small = 0.42 * unit
        rows = (
            (f"p50  {_milliseconds(recent.p50)} ms", MEDIAN),
            (f"p99  {_milliseconds(recent.p99)} ms", TAIL),
        )
        column = text_width("p99  8888.8 ms", small)
        for baseline, (text, colour) in zip((first, second), rows, strict=True):
            put_text(strip, text, width - margin - column, baseline, small, colour)
        graph_left = margin + max(text_width("#888888   88:88.88", small), round(130 * unit)) + margin
        graph_right = width - 2 * margin - column
        if graph_right - graph_left > 40:
            self._draw_graph(strip[round(6 * unit) : height - round(6 * unit), graph_left:graph_right], unit)
        return strip

    def _draw_graph(self, area: np.ndarray, unit: float) -> None:
        """Recent latencies, the newest at the right; zero is the lower edge."""
        height, width = area.shape[:2]
        area[:] = (38, 35, 32)
        values = np.array(self._latencies.recent_values()[-width:])
        if not len(values):
            return
        recent = self._latencies.recent()
        # one outlier may leave the graph; a line of nothing but the outlier shows nothing else
        top = 1.25 * max(recent.p99 if recent.p99 < 4 * recent.p50 else 4 * recent.p50, 1e-3)
        if self._deadline_ms is not None:
            top = max(top, 1.1 * self._deadline_ms)
        step = width / max(60, len(values))
        right = np.round(width - step * np.arange(len(values))[::-1]).astype(int)
        left = np.round(right - step).astype(int)
        heights = np.round(np.minimum(values / top, 1) * (height - 1)).astype(int)
        gap = 1 if step >= 4 else 0
        for x0, x1, tall, value in zip(left, right, heights, values, strict=True):
            late = self._deadline_ms is not None and value > self._deadline_ms
            cv2.rectangle(
                area,
                (int(x0), height - 1 - int(tall)),
                (max(int(x0), int(x1) - 1 - gap), height - 1),
                LATE if late else (150, 120, 78),
                cv2.FILLED,
            )
        thickness = max(1, round(unit))
        for level, colour in ((recent.p50, MEDIAN), (recent.p99, TAIL)):
            y = height - 1 - round(min(level / top, 1) * (height - 1))
            cv2.line(area, (0, y), (width - 1, y), colour, thickness)
        if self._deadline_ms is not None:
            y = height - 1 - round(self._deadline_ms / top * (height - 1))
            for x in range(0, width, round(10 * unit)):
                cv2.line(area, (x, y), (min(x + round(5 * unit), width - 1), y), LATE, thickness)


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(seconds, 0.0), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:05.2f}" if hours else f"{minutes:02d}:{rest:05.2f}"
