"""Clips: stretches of video at the model's size and rate, with the truth about their frames where it is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..runtime.manifest import Manifest
from ..runtime.preprocess import Preprocess
from ..runtime.sources import open_source
from ..runtime.sources.redaction import redacted
from .errors import CalibrationError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v")
TRUTH_SUFFIX = ".labels.txt"
FEWEST_FRAMES = 8
FLAT = 2  # grey levels; a picture whose pixels differ by no more shows nothing


@dataclass(frozen=True)
class Clip:
    """A stretch of video.

    Attributes:
        name: where it is from: a file's name, an address without its password.
        frames: uint8 [T, height, width, 3], at the model's size.
        truth: index of each frame's label among the bundle's labels, int64 [T]; None where it is not known.
        order: the frames as they are played, int64 of any length; None for each once.
    """

    name: str
    frames: np.ndarray
    truth: np.ndarray | None = None
    order: np.ndarray | None = None

    def played(self) -> Iterator[np.ndarray]:
        """The frames in their order; none is copied, however long it is."""
        return iter(self.frames) if self.order is None else (self.frames[index] for index in self.order)


def read_clips(specs: Sequence[str], manifest: Manifest, most: int) -> list[Clip]:
    """Read clips as the model is to see them.

    Args:
        specs: video files, folders of them, folders of images, cameras or `synthetic`. `CLIP.labels.txt` beside
            `CLIP.mp4` names the label of each frame, one a line, counted before the bundle's rate is applied.
        manifest: gives size, rate and labels.
        most: frames to read in all; every clip gives an equal share.

    Raises:
        CalibrationError: nothing readable, too few frames, nothing to be seen in them, or a truth that does not fit.
        SourceError: a source cannot be opened.
    """
    names = [name for spec in specs for name in _expand(spec)]
    clips: list[Clip] = []
    for position, name in enumerate(names):
        left = most - sum(len(clip.frames) for clip in clips)
        share = -(-left // (len(names) - position))
        if share > 0:
            clips.append(_read(name, manifest, share))
    clips = [clip for clip in clips if len(clip.frames)]
    count = sum(len(clip.frames) for clip in clips)
    listed = ", ".join(specs)
    if count == 0:
        raise CalibrationError(f"--video {listed}: no frame could be read")
    if count < FEWEST_FRAMES:
        raise CalibrationError(
            f"--video {listed}: too few frames to calibrate on: {count}; give at least {FEWEST_FRAMES}"
        )
    # what differs within a picture or from one picture to another
    if all(_flat(clip.frames) for clip in clips):
        raise CalibrationError(
            f"--video {listed}: every frame is one even colour; ranges from it would fit nothing else"
        )
    return clips


def there_and_back(count: int, length: int) -> np.ndarray:
    """Indices of `count` frames forwards, backwards and so on, `length` in all: a long stream without a jump."""
    there_and_back = np.concatenate([np.arange(count), np.arange(count - 2, 0, -1)])
    return there_and_back[np.arange(length) % len(there_and_back)]


def _expand(spec: str) -> list[str]:
    path = Path(spec)
    if not path.is_dir():
        return [spec]
    videos = sorted(file for file in path.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
    return [str(file) for file in videos] or [spec]  # else a folder of images, which is one clip


def _read(name: str, manifest: Manifest, most: int) -> Clip:
    preprocess = Preprocess(manifest.frame)
    size = (manifest.frame.height, manifest.frame.width, 3)
    frames: list[np.ndarray] = []
    indices: list[int] = []
    with open_source(name, rate=manifest.rate) as source:
        for frame in source:
            frames.append(np.empty(size, np.uint8))
            preprocess(frame.rgb, frames[-1])
            indices.append(frame.index)
            if len(frames) == most:
                break
    stacked = np.stack(frames) if frames else np.zeros((0, *size), np.uint8)
    return Clip(_shown(name), stacked, _truth(name, manifest, indices))


def _shown(name: str) -> str:
    """As a report may name it, which travels with the bundle: no folder of this machine, no password."""
    return redacted(name) if "://" in name or name.startswith("gst:") else Path(name).name


def _truth(name: str, manifest: Manifest, indices: list[int]) -> np.ndarray | None:
    file = Path(name).with_suffix(TRUTH_SUFFIX) if "://" not in name else None
    if file is None or not file.is_file() or manifest.labels is None:
        return None
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise CalibrationError(f"{file}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise CalibrationError(f"{file}: cannot be read: not UTF-8 text") from None
    known = {label: number for number, label in enumerate(manifest.labels.names)}
    truth = []
    for index in indices:
        label = lines[index].strip() if index < len(lines) else ""
        if label not in known:
            found = f"'{label}'" if label else "nothing"
            raise CalibrationError(
                f"{file}: line {index + 1}: expected a label of the bundle for the frame, found {found}"
            )
        truth.append(known[label])
    return np.array(truth, np.int64)


def _flat(frames: np.ndarray) -> bool:
    return int((frames.max((1, 2)).astype(int) - frames.min((1, 2))).max()) <= FLAT
