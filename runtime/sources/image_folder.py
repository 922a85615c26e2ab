"""A folder of images as a source, and a single image as a folder of one."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import SourceError
from ..manifest import MAX_SIDE
from .frame import Frame, RgbImage, Source
from .opencv import quiet, require_cv2, to_rgb
from .sampling import Sampler

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
ASSUMED_FPS = 25.0  # for the timestamps where neither the rate nor the images' fps is given


class ImageFolder(Source):
    """The images in a folder (not in folders below it), in natural order: `2.png` before `10.png`.

    The images may differ in size: each frame has its own. Images carry no times. `fps` says how many a
    second they were taken at; without it they are taken to be at `rate` already, and every one is delivered.
    An image that cannot be decoded, or is larger than any model takes, is skipped, counted in `bad_frames` and keeps
    its place in the index.
    """

    live = False

    def __init__(self, path: Path, *, fps: float | None, rate: float | None, on_report: Callable[[str], None]) -> None:
        super().__init__(str(path), on_report)
        require_cv2()
        self._images = sorted(_images_in(path), key=natural_key) if path.is_dir() else [path]
        if not self._images:
            raise SourceError(f"folder {path}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))}) directly in it")
        self.fps = fps or rate or ASSUMED_FPS
        self.length = len(self._images)
        self._sampler = Sampler(rate)
        self._next_index = 0
        self._delivered = 0
        if fps is None and rate is not None and len(self._images) > 1:
            self._report(f"images carry no times: taken to be {rate:g} a second, as no camera fps is given")
        self._report_rate_above_fps(rate)

    def read(self, timeout: float | None = None) -> Frame | None:
        assert self.fps is not None
        while not self.ended:
            index = self._next_index
            if index == len(self._images):
                self._finish()
                break
            self._next_index += 1
            timestamp = index / self.fps
            if not self._sampler.due(timestamp):
                continue
            rgb = _decode(self._images[index])
            if rgb is not None and max(rgb.shape) <= MAX_SIDE:
                self._delivered += 1
                return Frame(rgb, index, timestamp, time.perf_counter())
            self.bad_frames += 1
            self._sampler.restart()
            why = "cannot be decoded" if rgb is None else f"has more than {MAX_SIDE} pixels a side"
            self._report(f"{self._images[index].name} {why}; skipped")
        return None

    def close(self) -> None:
        self.ended = True

    def _finish(self) -> None:
        self.close()
        if self._delivered == 0:
            raise SourceError(f"{self.name}: no image in it can be decoded")


def natural_key(path: Path) -> tuple[list[str | int], str]:
    """Sort key under which numbers within names count as numbers."""
    # The split alternates text and digits, so that a number is only ever compared with a number.
    parts = re.split(r"([0-9]+)", path.name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path.name


def _images_in(folder: Path) -> list[Path]:
    # Names with a leading dot are leftovers such as macOS' `._1.jpg`, not pictures.
    return [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]


def _decode(path: Path) -> RgbImage | None:
    """The image as uint8 RGB whatever its depth, turned as its EXIF data says; None where that fails."""
    cv2 = require_cv2()
    try:
        # Not cv2.imread, which cannot open every name on every system.
        data = np.fromfile(path, dtype=np.uint8)
    except OSError:
        return None
    if data.size == 0:
        return None
    with quiet():
        try:
            picture = cv2.imdecode(data, cv2.IMREAD_COLOR)
        except cv2.error:  # for example dimensions beyond OpenCV's limit
            return None
    return None if picture is None else to_rgb(picture)
