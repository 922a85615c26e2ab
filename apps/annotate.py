"""Drawing results onto frames: labels with their scores, where in the frame a label is, and the latency.

The picture grows at its lower edge by a strip with the latency, so nothing of the frame is covered by it.
Frames narrower than 640 pixels are enlarged first; text is too coarse to read below that.
"""

from __future__ import annotations

import colorsys
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ..runtime.errors import FramestepError
from ..runtime.masks import NOT_SEEN, class_map, score_maps
from ..runtime.preprocess import Preprocess
from .latency import Latencies

Colour = tuple[int, int, int]  # BGR

SMALLEST_WIDTH = 640
MOST_ENLARGED = 4096  # height to which a narrow picture is enlarged
MOST_LABELS_SHOWN = 8
LARGEST_MAP = 512  # pixels on the long side at which maps are computed; then they are enlarged
FONT = cv2.FONT_HERSHEY_SIMPLEX
DRAWS_UNICODE = hasattr(cv2, "FontFace")  # from OpenCV 5 on; before, its fonts hold no more than ASCII
WHITE: Colour = (245, 245, 245)
GREY: Colour = (170, 170, 170)
PANEL: Colour = (26, 24, 22)
TRACK: Colour = (70, 66, 62)
QUIET: Colour = (196, 160, 84)  # a bar below the threshold
LOUD: Colour = (66, 165, 255)  # a bar at or above it
MEDIAN: Colour = (130, 205, 120)
TAIL: Colour = (80, 170, 250)
LATE: Colour = (80, 80, 240)
HEAT = cv2.COLORMAP_TURBO
# Letters that Unicode does not take apart into a plain one and an accent
WITHOUT_ACCENTS = str.maketrans(
    {"ß": "ss", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "đ": "d", "Đ": "D", "ł": "l", "Ł": "L"}
    | {"ı": "i", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"'}
)
# Okabe and Ito's colours, told apart with every kind of colour vision, in BGR
DISTINCT: tuple[Colour, ...] = (
    (0, 159, 230),
    (233, 180, 86),
    (115, 158, 0),
    (66, 228, 240),
    (178, 114, 0),
    (0, 94, 213),
    (167, 121, 204),
    (150, 150, 150),
)


@dataclass(frozen=True, slots=True)
class Shown:
    """What is drawn onto one frame. `scores` [C] and `patch_scores` [C, grid_h, grid_w] are None where not
    computed.
    """

    rgb: np.ndarray
    index: int
    timestamp: float
    latency_ms: float
    scores: np.ndarray | None = None
    patch_scores: np.ndarray | None = None


def check_overlay(overlay: str, labels: Sequence[str]) -> None:
    """Raises FramestepError unless `overlay` is "all" or one of `labels`."""
    if not labels:
        raise FramestepError(
            f"--overlay {overlay}: this bundle has no labels; add some with `framestep label BUNDLE --labels FILE`"
        )
    if overlay != "all" and overlay not in labels:
        shown = ", ".join(labels[:12]) + (", ..." if len(labels) > 12 else "")
        raise FramestepError(f"--overlay {overlay}: no such label; give `all` or one of: {shown}")


class Annotator:
    """Draws the results of one stream.

    Args:
        labels: names of the rows of `scores` and `patch_scores`; may be empty.
        preprocess: the session's; it knows which part of a frame the model sees.
        latencies: the stream's latencies, for the strip; whoever runs the stream adds to them.
        overlay: None, a label (heat map of its patch scores) or "all" (class map).
        background: a label that stays clear in the class map, or None.
        on: score from which a label counts as present; its bar is highlighted.
        deadline_ms: drawn into the latency strip, or None.
    """

    def __init__(
        self,
        labels: Sequence[str],
        preprocess: Preprocess,
        latencies: Latencies,
        *,
        overlay: str | None = None,
        background: str | None = None,
        on: float = 0.5,
        deadline_ms: float | None = None,
    ) -> None:
        if overlay is not None:
            check_overlay(overlay, labels)
        self._labels = tuple(labels)
        self._preprocess = preprocess
        self._latencies = latencies
        self._overlay = overlay
        self._background = background
        self._on = on
        self._deadline_ms = deadline_ms
        self._colours = _distinct_colours(len(labels))
        self._heat_range = _SlowRange()

    def draw(self, shown: Shown) -> np.ndarray:
        """The annotated picture, uint8 BGR [height, width, 3] with even sides, a new array."""
        canvas = _enlarged(cv2.cvtColor(shown.rgb, cv2.COLOR_RGB2BGR))
        width = canvas.shape[1]
        areas = None
        if self._overlay is not None and shown.patch_scores is not None:
            if self._overlay == "all":
                areas = self._draw_class_map(canvas, shown.rgb, shown.patch_scores)
            else:
                self._draw_heat_map(canvas, shown.rgb, shown.patch_scores[self._labels.index(self._overlay)])
            self._draw_region(canvas, shown.rgb)
        strip = self._latency_strip(width, shown)
        if shown.scores is not None and self._labels:
            self._draw_labels(canvas, shown.scores, areas)
        return np.vstack([canvas, strip])

    def _draw_heat_map(self, canvas: np.ndarray, rgb: np.ndarray, scores: np.ndarray) -> None:
        low, high = self._heat_range.follow(float(scores.min()), float(scores.max()))
        relative = np.clip((scores.astype(np.float32) - low) / (high - low), 0, 1)
        heat = score_maps(relative[None], rgb.shape[0], rgb.shape[1], self._preprocess, _map_size(canvas))[0]
        opacity = np.where(np.isnan(heat), 0, 0.15 + 0.45 * heat)
        colour = cv2.applyColorMap(np.round(np.nan_to_num(heat) * 255).astype(np.uint8), HEAT)
        _blend(canvas, _as_large(canvas, colour), _as_large(canvas, opacity))

    def _draw_class_map(self, canvas: np.ndarray, rgb: np.ndarray, patch_scores: np.ndarray) -> np.ndarray:
        """Returns the share of the map that each label covers, [C]."""
        found = class_map(patch_scores, rgb.shape[0], rgb.shape[1], self._preprocess, _map_size(canvas))
        palette = np.array(self._colours, np.uint8)
        opacity = np.full(len(self._labels), 0.5, np.float32)
        if self._background in self._labels:
            opacity[self._labels.index(self._background)] = 0.0
        seen = found.classes != NOT_SEEN
        strength = np.where(seen, opacity[found.classes] * (0.35 + 0.65 * found.probability), 0)
        _blend(canvas, _as_large(canvas, palette[found.classes]), _as_large(canvas, strength))
        areas = np.bincount(found.classes[seen], minlength=len(self._labels))
        return areas / max(1, int(areas.sum()))

    def _draw_region(self, canvas: np.ndarray, rgb: np.ndarray) -> None:
        """A thin frame about what the model sees, where that is not everything."""
        down, across = canvas.shape[0] / rgb.shape[0], canvas.shape[1] / rgb.shape[1]
        region = self._preprocess.region(rgb.shape[0], rgb.shape[1])
        top, left, height, width = (round(side * scale) for side, scale in zip(region, (down, across) * 2, strict=True))
        if top > 0 or left > 0 or top + height < canvas.shape[0] or left + width < canvas.shape[1]:
            cv2.rectangle(canvas, (left, top), (left + width - 1, top + height - 1), (225, 225, 225), 1, cv2.LINE_AA)

    def _draw_labels(self, canvas: np.ndarray, scores: np.ndarray, areas: np.ndarray | None) -> None:
        """A panel at the upper left. With more labels than fit: the largest areas, or else the highest
        scores.
        """
        height, width = canvas.shape[:2]
        unit = _unit(width)
        row, margin, bar = round(23 * unit), round(8 * unit), max(2, round(3 * unit))
        heat = self._overlay is not None and areas is None
        room = (height - 3 * margin) // row - (2 if heat else 0)
        count = max(1, min(len(scores), MOST_LABELS_SHOWN, room))
        order = np.arange(len(scores))
        if len(scores) > count:
            importance = scores if areas is None else areas
            order = np.argsort(-importance, kind="stable")[:count]
        font = 0.46 * unit
        value_width = _text_width("0.00", font) + margin
        wanted = max(_text_width(self._labels[i], font) for i in order) + value_width + 2 * margin
        swatch = 0 if areas is None else round(14 * unit)
        panel_width = min(max(wanted + swatch, round(150 * unit)), max(round(0.45 * width), round(150 * unit)))
        panel_height = count * row + margin + (2 * row if heat else 0)
        _panel(canvas, margin, margin, panel_width, panel_height)
        left, right = 2 * margin, panel_width
        for line, i in enumerate(order):
            baseline = margin + round(16 * unit) + line * row
            if swatch:
                side = round(9 * unit)
                outline = 1 if self._labels[i] == self._background else cv2.FILLED
                cv2.rectangle(canvas, (left, baseline - side), (left + side, baseline), self._colours[i], outline)
            label = _shortened(self._labels[i], font, right - left - swatch - value_width)
            score = float(scores[i])
            present = score >= self._on
            _text(canvas, label, left + swatch, baseline, font, WHITE)
            _text(
                canvas,
                f"{score:.2f}",
                right - value_width + margin,
                baseline,
                font,
                WHITE if present else GREY,
            )
            top = baseline + max(2, round(3 * unit))
            cv2.rectangle(canvas, (left, top), (right, top + bar - 1), TRACK, cv2.FILLED)
            end = left + round((right - left) * min(max(score, 0.0), 1.0))
            if end > left:
                cv2.rectangle(canvas, (left, top), (end, top + bar - 1), LOUD if present else QUIET, cv2.FILLED)
        if heat:
            self._draw_heat_scale(canvas, left, right, margin + count * row, unit)

    def _draw_heat_scale(self, canvas: np.ndarray, left: int, right: int, top: int, unit: float) -> None:
        low, high = self._heat_range.low, self._heat_range.high
        font = 0.4 * unit
        row = round(23 * unit)
        name = _shortened(f"map: {self._overlay}", font, right - left)
        _text(canvas, name, left, top + round(19 * unit), font, GREY)
        top += row
        first, last = _score_text(low), _score_text(high)
        gap = round(5 * unit)
        start = left + _text_width(first, font) + gap
        end = right - _text_width(last, font) - gap
        baseline = top + round(16 * unit)
        _text(canvas, first, left, baseline, font, GREY)
        _text(canvas, last, end + gap, baseline, font, GREY)
        if end > start:
            ramp = np.linspace(0, 255, end - start).astype(np.uint8)[None]
            thick = round(8 * unit)
            canvas[baseline - thick : baseline, start:end] = cv2.applyColorMap(ramp, HEAT)

    def _latency_strip(self, width: int, shown: Shown) -> np.ndarray:
        unit = _unit(width)
        height = 2 * round(27 * unit)
        strip = np.empty((height, width, 3), np.uint8)
        strip[:] = PANEL
        margin = round(10 * unit)
        recent = self._latencies.recent()
        late = self._deadline_ms is not None and shown.latency_ms > self._deadline_ms
        first, second = round(23 * unit), round(43 * unit)
        _text(
            strip,
            f"{_milliseconds(shown.latency_ms)} ms",
            margin,
            first,
            0.62 * unit,
            LATE if late else WHITE,
        )
        _text(strip, f"#{shown.index}   {_clock(shown.timestamp)}", margin, second, 0.42 * unit, GREY)
        small = 0.42 * unit
        rows = (
            (f"p50  {_milliseconds(recent.p50)} ms", MEDIAN),
            (f"p99  {_milliseconds(recent.p99)} ms", TAIL),
        )
        column = _text_width("p99  8888.8 ms", small)
        for baseline, (text, colour) in zip((first, second), rows, strict=True):
            _text(strip, text, width - margin - column, baseline, small, colour)
        graph_left = margin + max(_text_width("#888888   88:88.88", small), round(130 * unit)) + margin
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


class _SlowRange:
    """The range of a heat map: widens at once, narrows slowly, so that colours do not flicker from frame to
    frame.
    """

    narrowing = 0.03
    smallest = 1e-3

    def __init__(self) -> None:
        self.low = np.inf
        self.high = -np.inf

    def follow(self, low: float, high: float) -> tuple[float, float]:
        if not np.isfinite(self.low):
            self.low, self.high = low, high
        self.low = min(low, self.low + self.narrowing * (low - self.low))
        self.high = max(high, self.high + self.narrowing * (high - self.high))
        if self.high - self.low < self.smallest:
            self.high = self.low + self.smallest
        return self.low, self.high


def _enlarged(bgr: np.ndarray) -> np.ndarray:
    """`bgr` at least 640 pixels wide, with even sides (video codecs want them), but not enlarged to just any height."""
    height, width = bgr.shape[:2]
    scale = max(1.0, SMALLEST_WIDTH / width)
    size = (_even(width * scale), _even(min(height * scale, max(height, MOST_ENLARGED))))
    if size == (width, height):
        return bgr
    return cv2.resize(bgr, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_LINEAR)


def _even(length: float) -> int:
    return max(2, 2 * round(length / 2))


def _unit(width: int) -> float:
    """Scale of text and margins: 1 at 640 pixels, growing more slowly than the picture."""
    return (width / SMALLEST_WIDTH) ** 0.8


def _map_size(canvas: np.ndarray) -> tuple[int, int]:
    """The size at which maps for this canvas are computed."""
    height, width = canvas.shape[:2]
    shrink = min(1.0, LARGEST_MAP / max(height, width))
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def _as_large(canvas: np.ndarray, layer: np.ndarray) -> np.ndarray:
    size = (canvas.shape[1], canvas.shape[0])
    return cv2.resize(layer.astype(np.float32, copy=False) if layer.ndim == 2 else layer, size)


def _blend(canvas: np.ndarray, colour: np.ndarray, opacity: np.ndarray) -> None:
    """canvas = canvas + opacity * (colour - canvas), in place; opacity is float32 [height, width]."""
    # blendLinear divides by the sum of the weights, which is 1
    canvas[:] = cv2.blendLinear(colour, canvas, opacity, 1 - opacity)


def _panel(canvas: np.ndarray, left: int, top: int, width: int, height: int) -> None:
    """Darkens a rectangle so that text on it can be read."""
    part = canvas[top : top + height, left : left + width]
    if not part.size:  # a picture of a few rows
        return
    background = np.empty_like(part)
    background[:] = PANEL
    part[:] = cv2.addWeighted(part, 0.28, background, 0.72, 0)


def _text(canvas: np.ndarray, text: str, left: int, baseline: int, scale: float, colour: Colour) -> None:
    cv2.putText(canvas, _drawable(text), (left, baseline), FONT, scale, colour, _stroke(scale), cv2.LINE_AA)


def _text_width(text: str, scale: float) -> int:
    return int(cv2.getTextSize(_drawable(text), FONT, scale, _stroke(scale))[0][0])


def _drawable(text: str) -> str:
    """What this OpenCV can draw of a text: all of it, or its letters without their accents."""
    # A line break has no glyph, and half a surrogate pair cannot be handed to OpenCV at all.
    text = "".join(c if c.isprintable() else " " for c in text)
    if DRAWS_UNICODE or text.isascii():
        return text
    plain = unicodedata.normalize("NFKD", text.translate(WITHOUT_ACCENTS))
    return "".join(c for c in plain if not unicodedata.combining(c)).encode("ascii", "replace").decode()


def _stroke(scale: float) -> int:
    return 2 if scale > 0.9 else 1


def _shortened(text: str, scale: float, room: int) -> str:
    if _text_width(text, scale) <= room:
        return text
    count = bisect_right(range(len(text)), room, key=lambda count: _text_width(text[:count] + "...", scale)) - 1
    return text[: max(0, count)] + "..."


def _score_text(score: float) -> str:
    return f"{score:.2f}" if score == 0 or score >= 0.01 else f"{score:.0e}"


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(seconds, 0.0), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:05.2f}" if hours else f"{minutes:02d}:{rest:05.2f}"


def _distinct_colours(count: int) -> list[Colour]:
    colours = list(DISTINCT[:count])
    for i in range(len(colours), count):  # hues at the golden angle stay apart however many there are
        red, green, blue = colorsys.hsv_to_rgb((0.11 + i * 0.618034) % 1, 0.55 + 0.3 * (i % 2), 0.95)
        colours.append((round(255 * blue), round(255 * green), round(255 * red)))
    return colours
