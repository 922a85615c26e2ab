"""Drawing results onto frames: labels with their scores, where in the frame a label is, and the latency.

The picture grows at its lower edge by a strip with the latency, so nothing of the frame is covered by it.
Frames narrower than 640 pixels are enlarged first; text is too coarse to read below that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ..runtime.errors import FramestepError
from ..runtime.masks import NOT_SEEN, class_map, score_maps
from ..runtime.preprocess import Preprocess
from .drawing import (
    GREY,
    WHITE,
    Colour,
    blend,
    darken,
    distinct_colours,
    enlarged,
    put_text,
    shortened,
    text_unit,
    text_width,
)
from .latency import Latencies
from .latency_strip import LatencyStrip

MOST_LABELS_SHOWN = 8
LARGEST_MAP = 512  # pixels on the long side at which maps are computed; then they are enlarged
TRACK: Colour = (70, 66, 62)
QUIET: Colour = (196, 160, 84)  # a bar below the threshold
LOUD: Colour = (66, 165, 255)  # a bar at or above it
HEAT = cv2.COLORMAP_TURBO


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
        self._strip = LatencyStrip(latencies, deadline_ms)
        self._overlay = overlay
        self._background = background
        self._on = on
        self._colours = distinct_colours(len(labels))
        self._heat_range = _SlowRange()

    def draw(self, shown: Shown) -> np.ndarray:
        """The annotated picture, uint8 BGR [height, width, 3] with even sides, a new array."""
        canvas = enlarged(cv2.cvtColor(shown.rgb, cv2.COLOR_RGB2BGR))
        areas = None
        if self._overlay is not None and shown.patch_scores is not None:
            if self._overlay == "all":
                areas = self._draw_class_map(canvas, shown.rgb, shown.patch_scores)
            else:
                self._draw_heat_map(canvas, shown.rgb, shown.patch_scores[self._labels.index(self._overlay)])
            self._draw_region(canvas, shown.rgb)
        if shown.scores is not None and self._labels:
            self._draw_labels(canvas, shown.scores, areas)
        strip = self._strip.draw(canvas.shape[1], shown.index, shown.timestamp, shown.latency_ms)
        return np.vstack([canvas, strip])

    def _draw_heat_map(self, canvas: np.ndarray, rgb: np.ndarray, scores: np.ndarray) -> None:
        low, high = self._heat_range.follow(float(scores.min()), float(scores.max()))
        relative = np.clip((scores.astype(np.float32) - low) / (high - low), 0, 1)
        heat = score_maps(relative[None], rgb.shape[0], rgb.shape[1], self._preprocess, _map_size(canvas))[0]
        opacity = np.where(np.isnan(heat), 0, 0.15 + 0.45 * heat)
        colour = cv2.applyColorMap(np.round(np.nan_to_num(heat) * 255).astype(np.uint8), HEAT)
        blend(canvas, _as_large(canvas, colour), _as_large(canvas, opacity))

    def _draw_class_map(self, canvas: np.ndarray, rgb: np.ndarray, patch_scores: np.ndarray) -> np.ndarray:
        """Returns the share of the map that each label covers, [C]."""
        found = class_map(patch_scores, rgb.shape[0], rgb.shape[1], self._preprocess, _map_size(canvas))
        palette = np.array(self._colours, np.uint8)
        opacity = np.full(len(self._labels), 0.5, np.float32)
        if self._background in self._labels:
            opacity[self._labels.index(self._background)] = 0.0
        seen = found.classes != NOT_SEEN
        strength = np.where(seen, opacity[found.classes] * (0.35 + 0.65 * found.probability), 0)
        blend(canvas, _as_large(canvas, palette[found.classes]), _as_large(canvas, strength))
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
        unit = text_unit(width)
        row, margin, bar = round(23 * unit), round(8 * unit), max(2, round(3 * unit))
        heat = self._overlay is not None and areas is None
        room = (height - 3 * margin) // row - (2 if heat else 0)
        count = max(1, min(len(scores), MOST_LABELS_SHOWN, room))
        order = np.arange(len(scores))
        if len(scores) > count:
            importance = scores if areas is None else areas
            order = np.argsort(-importance, kind="stable")[:count]
        font = 0.46 * unit
        value_width = text_width("0.00", font) + margin
        wanted = max(text_width(self._labels[i], font) for i in order) + value_width + 2 * margin
        swatch = 0 if areas is None else round(14 * unit)
        panel_width = min(max(wanted + swatch, round(150 * unit)), max(round(0.45 * width), round(150 * unit)))
        panel_height = count * row + margin + (2 * row if heat else 0)
        darken(canvas, margin, margin, panel_width, panel_height)
        left, right = 2 * margin, panel_width
        for line, i in enumerate(order):
            baseline = margin + round(16 * unit) + line * row
            if swatch:
                side = round(9 * unit)
                outline = 1 if self._labels[i] == self._background else cv2.FILLED
                cv2.rectangle(canvas, (left, baseline - side), (left + side, baseline), self._colours[i], outline)
            label = shortened(self._labels[i], font, right - left - swatch - value_width)
            score = float(scores[i])
            present = score >= self._on
            put_text(canvas, label, left + swatch, baseline, font, WHITE)
            put_text(
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
        name = shortened(f"map: {self._overlay}", font, right - left)
        put_text(canvas, name, left, top + round(19 * unit), font, GREY)
        top += row
        first, last = _score_text(low), _score_text(high)
        gap = round(5 * unit)
        start = left + text_width(first, font) + gap
        end = right - text_width(last, font) - gap
        baseline = top + round(16 * unit)
        put_text(canvas, first, left, baseline, font, GREY)
        put_text(canvas, last, end + gap, baseline, font, GREY)
        if end > start:
            ramp = np.linspace(0, 255, end - start).astype(np.uint8)[None]
            thick = round(8 * unit)
            canvas[baseline - thick : baseline, start:end] = cv2.applyColorMap(ramp, HEAT)


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


def _map_size(canvas: np.ndarray) -> tuple[int, int]:
    """The size at which maps for this canvas are computed."""
    height, width = canvas.shape[:2]
    shrink = min(1.0, LARGEST_MAP / max(height, width))
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def _as_large(canvas: np.ndarray, layer: np.ndarray) -> np.ndarray:
    size = (canvas.shape[1], canvas.shape[0])
    return cv2.resize(layer.astype(np.float32, copy=False) if layer.ndim == 2 else layer, size)


def _score_text(score: float) -> str:
    return f"{score:.2f}" if score == 0 or score >= 0.01 else f"{score:.0e}"
