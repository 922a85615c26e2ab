"""What a measured path is, and ours.

Every path takes one model-sized frame after another and gives the newest frame's features and pooled vector as numpy
arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...runtime.bundle import Bundle
from ...runtime.errors import FramestepError
from ...runtime.manifest import Manifest

Array = npt.NDArray[Any]
FRAMESTEP = "framestep"
OUTPUTS = ("features", "pooled")


class MissingPackageError(FramestepError):
    """A path needs a package that is not installed; the message names the extra."""


class OutOfTimeError(FramestepError):
    """A position could not be reached in the time given."""


class MeasuredPath(Protocol):
    """A way to get the features of the newest frame.

    Attributes:
        walks: a position is reached only by feeding every frame before it, as in a stream; otherwise `seek` is free.
    """

    walks: bool

    def reset(self) -> None:
        """Forget every frame."""
        ...

    def seek(self, seen: int, deadline: float) -> None:
        """Bring the memory to where `seen` frames have been fed.

        Raises:
            OutOfTimeError: `time.perf_counter()` passed the deadline on the way.
        """
        ...

    def step(self, rgb: Array) -> tuple[Array, Array]:
        """One frame [height, width, 3] -> features [N, D], pooled [D]"""
        ...

    def bytes_at(self, position: int) -> int:
        """About how much memory a step at this position takes beyond the weights."""
        ...


@dataclass(frozen=True)
class PathSpec:
    """What a path needs to be set up in its own process."""

    name: str
    bundle: str
    checkpoint: str | None
    engine: str
    device: str
    threads: int
    precision: str = "auto"


def frame_at(manifest: Manifest, index: int) -> Array:
    """The frame of this index of the stream that every path sees: noise, the same in every process."""
    shape = (manifest.frame.height, manifest.frame.width, 3)
    return np.random.default_rng(index).integers(0, 256, shape, np.uint8)


def window_of(manifest: Manifest) -> int:
    """Frames that the model attends to, the newest included."""
    return max((state.capacity for state in manifest.states), default=1)


class FramestepPath:
    """A session on its engine, through the public interface.

    `seek` fills the ring with real frames once and then sets the stream's clock: from there on a step does what it does
    after that many frames, for a step's work depends on the clock and on the ring alone.
    """

    walks = False

    def __init__(self, spec: PathSpec, streams: int = 1) -> None:
        from ...runtime.session import Session

        bundle = Bundle.open(spec.bundle, verify=False)
        self.manifest = bundle.manifest
        self.session = Session(bundle, spec.engine, spec.device, streams, OUTPUTS, spec.threads, spec.precision)
        self.stream = self.session.open_stream()
        self._filled = False

    def reset(self) -> None:
        self.stream.reset()

    def seek(self, seen: int, deadline: float) -> None:
        if not self._filled:
            for index in range(window_of(self.manifest)):
                self.stream.step(frame_at(self.manifest, index))
            self._filled = True
        self.session._engine.seek(self.stream.slot, seen)

    def step(self, rgb: Array) -> tuple[Array, Array]:
        result = self.stream.step(rgb)
        return result["features"], result["pooled"]

    def bytes_at(self, position: int) -> int:
        return 0
