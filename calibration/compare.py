"""Two precisions of a model side by side on the same frames: how alike, how right, by age of the stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..runtime.bundle import Bundle
from ..runtime.engines.choosing import choose_engine
from ..runtime.session import NonFiniteOutputError, Session
from .clips import Clip, there_and_back
from .errors import CalibrationError

WARM_UP = 3  # steps before latencies count


@dataclass(frozen=True)
class Comparison:
    """One entry a frame, in arrays of the same length.

    Attributes:
        age: frames since the stream's start.
        cosine: of `pooled`, between the two.
        agrees: whether both give the highest score to the same label; None without labels.
        reference_hits, hits: whether that label is the true one, for the reference and the other; None without truth.
        reference_ms, ms: median latency of a step.
    """

    age: np.ndarray
    cosine: np.ndarray
    agrees: np.ndarray | None
    reference_hits: np.ndarray | None
    hits: np.ndarray | None
    reference_ms: float
    ms: float

    @property
    def drop(self) -> float | None:
        """Percentage points of accuracy lost against the reference."""
        if self.hits is None or self.reference_hits is None:
            return None
        lost = int(self.reference_hits.sum()) - int(self.hits.sum())
        return 100 * lost / len(self.hits)  # whole numbers first: five of a hundred are 5 and no more


def engine_of(bundle: Bundle) -> str:
    """The engine that a precision is measured with on a CPU: ONNX Runtime, where it runs it."""
    return choose_engine(bundle.manifest, "auto", "cpu", bundle.manifest.precision).engine


def compare(reference: Bundle, other: Bundle, clips: Sequence[Clip]) -> Comparison:
    """Step both over the clips, frame by frame in turn, with a reset before each clip.

    Raises:
        CalibrationError: the other gives NaN or infinity.
    """
    engine = engine_of(other)
    threads = None if engine == "onnxruntime" else 1  # PyTorch's would spin on the cores that the reference wants
    labelled = reference.manifest.labels is not None
    outputs = ("pooled", "scores") if labelled else ("pooled",)
    ages: list[int] = []
    cosines: list[float] = []
    best: list[tuple[int, int]] = []
    truth: list[int] = []
    times: list[tuple[float, float]] = []
    with (
        Session(reference, "onnxruntime", "cpu", outputs=outputs, precision=reference.manifest.precision) as left,
        Session(other, engine, "cpu", outputs=outputs, threads=threads, precision=other.manifest.precision) as right,
    ):
        left_stream, right_stream = left.open_stream(), right.open_stream()
        left.warm_up(WARM_UP)
        right.warm_up(WARM_UP)
        for clip in clips:
            left_stream.reset()
            right_stream.reset()
            for age, rgb in enumerate(clip.played()):
                expected = left_stream.step(rgb)
                try:
                    found = right_stream.step(rgb)
                except NonFiniteOutputError as error:
                    precision = other.manifest.precision
                    raise CalibrationError(f"{precision}: NaN or infinity at frame {age} of {clip.name}") from error
                ages.append(age)
                cosines.append(_cosine(expected["pooled"], found["pooled"]))
                times.append((expected.latency_ms, found.latency_ms))
                if labelled:
                    best.append((int(expected["scores"].argmax()), int(found["scores"].argmax())))
                if clip.truth is not None:
                    truth.append(int(clip.truth[age]))
    chosen = np.array(best, np.int64).reshape(-1, 2)
    true = np.array(truth, np.int64)
    whole = labelled and len(true) == len(chosen)
    medians = np.median(times, axis=0)
    return Comparison(
        age=np.array(ages),
        cosine=np.array(cosines),
        agrees=chosen[:, 0] == chosen[:, 1] if labelled else None,
        reference_hits=chosen[:, 0] == true if whole else None,
        hits=chosen[:, 1] == true if whole else None,
        reference_ms=float(medians[0]),
        ms=float(medians[1]),
    )


def long_clip(clips: Sequence[Clip], length: int) -> Clip:
    """The longest clip, played forwards and backwards until it has `length` frames."""
    longest = max(clips, key=lambda clip: len(clip.frames))
    order = there_and_back(len(longest.frames), length)
    return Clip(f"{longest.name} (there and back)", longest.frames, order=order)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / lengths if lengths else 1.0
