"""What a source delivers, and what every source can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import numpy as np
import numpy.typing as npt

from ..counted import counted

RgbImage = npt.NDArray[np.uint8]  # [height, width, 3]


@dataclass(frozen=True, slots=True)
class Frame:
    """One picture and when it was taken."""

    rgb: RgbImage
    index: int  # 0-based index of the frame in the source, counted before sampling by rate
    timestamp: float  # seconds since the first frame: by presentation times in a file, by arrival for a live source
    captured: float  # time.perf_counter() when it was read from the source: age = perf_counter() - captured


class Source(ABC):
    """An iterator over frames and a context manager that closes it.

    `name` is the source as the user named it, without the user and password of an address. `fps` is nominal,
    and None where nobody knows it; `length` is the number of frames before sampling, where that is known (a
    video file's as its header states it: in some containers a duration times a rate).
    `dropped` counts live frames that were never delivered because a newer one replaced them (frames skipped
    by `rate` are not dropped); `bad_frames` counts frames that could not be decoded. `ended` is true once no
    frame will come any more.
    """

    live: bool

    def __init__(self, name: str, on_report: Callable[[str], None]) -> None:
        self.name = name
        self.fps: float | None = None
        self.length: int | None = None
        self.dropped = 0
        self.bad_frames = 0
        self.ended = False
        self._on_report = on_report

    @abstractmethod
    def read(self, timeout: float | None = None) -> Frame | None:
        """The next frame; None at the end, or where a live source has none within `timeout` seconds.

        None waits for as long as the source lives; 0 does not wait. Files never wait. Raises `SourceError`
        where nothing in the source can be read at all.
        """

    def stop(self) -> None:
        """End reading without waiting for the device, as `close` may have to; close it all the same."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Give the source back. Reading then ends; closing twice is fine."""

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> Frame:
        frame = self.read()
        if frame is None:
            raise StopIteration
        return frame

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _report(self, text: str) -> None:
        self._on_report(f"{self.name}: {text}")

    def _report_rate_above_fps(self, rate: float | None) -> None:
        if rate is not None and self.fps is not None and rate > self.fps * 1.001:
            self._report(
                f"rate {rate:g} is above the source's {counted(self.fps, 'frame')} a second: all are delivered"
            )
