"""What engines in Python share: a step around their `run`, over buffers of the host."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bundle import FrameSpec
from ..preprocess import Preprocess
from . import StepTimes

Array = npt.NDArray[Any]


class BufferEngine:
    """An engine that runs graphs over buffers, a slot of which belongs to each stream.

    Attributes:
        frames: uint8 [streams, height, width, 3], the input of the next step.
        positions: int64 [streams], frames since reset.
        outputs: [streams, ...] by name, filled by `run`.
    """

    frames: npt.NDArray[np.uint8]
    positions: npt.NDArray[np.int64]
    outputs: dict[str, Array]

    def __init__(self, frame: FrameSpec) -> None:
        self._preprocess = Preprocess(frame)
        self._times = StepTimes(0.0, 0.0, 0.0)

    def run(self, first: int, stop: int) -> None:
        """One step of the slots first..stop; every slot in the range runs, in place."""
        raise NotImplementedError

    def zero_states(self, slot: int) -> None:
        """Zero a slot's memory."""
        raise NotImplementedError

    def step(self, frames: Mapping[int, Array]) -> dict[int, tuple[str, ...]]:
        """See `Engine.step`."""
        start = time.perf_counter()
        for slot, rgb in frames.items():
            self._preprocess(rgb, self.frames[slot])
        fitted = time.perf_counter()
        self.run(min(frames), max(frames) + 1)
        ran = time.perf_counter()
        broken = {slot: names for slot in frames if (names := self.advance(slot))}
        end = time.perf_counter()
        self._times = StepTimes((fitted - start) * 1e3, (ran - fitted) * 1e3, (end - start) * 1e3)
        return broken

    def fit(self, frames: Sequence[Array]) -> npt.NDArray[np.uint8]:
        """Frames of any size as the model takes them: uint8 [frames, height, width, 3]."""
        fitted = np.empty((len(frames), *self.frames.shape[1:]), np.uint8)
        for rgb, out in zip(frames, fitted, strict=True):
            self._preprocess(rgb, out)
        return fitted

    def advance(self, slot: int) -> tuple[str, ...]:
        """Count a frame, or start again where an output is not finite; the names of such outputs."""
        bad = tuple(name for name, array in self.outputs.items() if not np.isfinite(array[slot]).all())
        if bad:
            self.zero_states(slot)  # a NaN in a hidden slot still counts: 0 * NaN is NaN
            self.positions[slot] = 0
        else:
            self.positions[slot] += 1
        return bad

    def output(self, slot: int) -> dict[str, Array]:
        """See `Engine.output`."""
        return {name: array[slot] for name, array in self.outputs.items()}

    def position(self, slot: int) -> int:
        """Frames since the slot's reset."""
        return int(self.positions[slot])

    def seek(self, slot: int, position: int) -> None:
        """Set the slot's clock and leave its memory."""
        self.positions[slot] = position

    def warm_up(self, steps: int) -> None:
        """Run every number of slots `steps` times; no clock moves."""
        for _ in range(steps):
            for count in range(1, len(self.positions) + 1):
                self.run(0, count)

    def last_step(self, slot: int) -> StepTimes:
        """Where the time of the last step went; of whichever slots it was."""
        return self._times
