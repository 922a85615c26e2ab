"""The newest frames of a stream, as a decoder with cross-attention reads them: first in, first out.

The ring has one slot more than frames that text may see. A frame is encoded into that hidden slot while text is
decoded, and becomes visible when it is committed, between two steps of the decoder.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from .decoding import Array, GraphRunner
from .errors import BundleError, FramestepError
from .manifest import Manifest
from .session import NonFiniteOutputError


@dataclass(frozen=True)
class EncodedFrame:
    """A frame in the ring.

    Attributes:
        index: in its source.
        timestamp: seconds, as its source tells them.
        captured: when it was read from its source.
        position: of the text at its moment.
    """

    index: int
    timestamp: float
    captured: float
    position: int


class Fit(Protocol):
    """Brings a frame to the model's size; see `Preprocess`."""

    def __call__(self, rgb: Array, out: Array) -> None: ...


class FrameRing:
    """Frames of one stream.

    Args:
        stream: runs the bundle's graphs; its ring is this one's alone.
        manifest: of the bundle, in one precision; it has `language.cross`.
        fit: brings frames to the model's size.

    Attributes:
        window: frames that text may see.
        reach: positions from a frame's own to that behind its last row or column.
        encoded: frames so far.

    Raises:
        BundleError: frames do not enter by cross-attention, or the graph takes other inputs.
    """

    def __init__(self, stream: GraphRunner, manifest: Manifest, fit: Fit) -> None:
        language = manifest.language
        if language is None or language.cross is None or manifest.grid is None:
            raise BundleError("this bundle's text does not attend to frames; export a StreamChat")
        self._stream, self._fit = stream, fit
        self._cross = language.cross
        graph = manifest.graphs[self._cross.graph]
        self._names = {port.role: port.name for port in graph.inputs}
        if set(self._names) != {"frame", "write_index", "position_ids"}:
            raise BundleError(
                f"graphs.{self._cross.graph}: expected inputs of the roles frame, write_index, position_ids;"
                f" found {', '.join(self._names)}"
            )
        if self._cross.rebase is not None:
            self._shift_name = next(
                port.name for port in manifest.graphs[self._cross.rebase].inputs if port.role == "position_shift"
            )
        written = {use.state for use in graph.states}
        state = next(state for state in manifest.states if state.name in written)
        self.window, self._rows = state.capacity - 1, state.rows_per_slot
        side_rows, side_columns = manifest.grid
        rows, columns = np.divmod(np.arange(self._rows), side_columns)
        self._grid = np.stack([np.zeros_like(rows), rows, columns])  # [3, N]
        literal = self._cross.positions == "literal"
        self._moving = np.array([1, 0, 0] if literal else [1, 1, 1])[:, None]
        self.reach = 1 if literal else max(side_rows, side_columns)
        self._pixels = np.empty((manifest.frame.height, manifest.frame.width, 3), np.uint8)
        self._visible: deque[int] = deque()  # slots, the oldest first
        self._frames: dict[int, EncodedFrame] = {}  # by slot
        self._hidden = 0
        self.encoded = 0

    @property
    def mask(self) -> Array:
        """Slots that text sees, bool [F + 1]."""
        found = np.zeros(self.window + 1, bool)
        found[list(self._visible)] = True
        return found

    @property
    def newest(self) -> EncodedFrame | None:
        """The newest frame that text sees."""
        return self._frames[self._visible[-1]] if self._visible else None

    @property
    def waiting(self) -> EncodedFrame | None:
        """What is encoded and not committed yet."""
        return self._frames.get(self._hidden)

    @property
    def first_position(self) -> int | None:
        """The lowest position of a frame in the ring."""
        return min((frame.position for frame in self._frames.values()), default=None)

    def encode(self, rgb: Array, frame: EncodedFrame) -> None:
        """Write a frame into the hidden slot, where nothing else waits.

        Args:
            rgb: uint8 [height, width, 3] of any size.
            frame: what is to be known of it.

        Raises:
            NonFiniteOutputError: the model gave NaN or infinity; the ring is empty.
        """
        assert self.waiting is None
        self._fit(rgb, self._pixels)
        inputs = {
            "frame": self._pixels,
            "write_index": np.array(self._hidden * self._rows),
            "position_ids": self._grid + frame.position * self._moving,
        }
        try:
            self._stream.run(self._cross.graph, {self._names[role]: value for role, value in inputs.items()})
        except NonFiniteOutputError:
            self.clear()
            raise
        self._frames[self._hidden] = frame
        self.encoded += 1

    def commit(self) -> EncodedFrame | None:
        """Let text see the frame that waits; the oldest is forgotten where there are more than `window`."""
        frame = self.waiting
        if frame is None:
            return None
        self._visible.append(self._hidden)
        if len(self._visible) > self.window:
            self._hidden = self._visible.popleft()
            del self._frames[self._hidden]
        else:
            self._hidden = len(self._visible)
        return frame

    def move_back(self, positions: int) -> None:
        """Turn all keys to lower positions; no frame is being encoded.

        Raises:
            FramestepError: the model's positions are literal, so that frames cannot move.
        """
        if self._cross.rebase is None:
            raise FramestepError(
                "the stream has come to the model's last position, and literal rows and columns cannot move with time;"
                " begin another stream, or make a checkpoint with parallel positions"
            )
        self._stream.run(self._cross.rebase, {self._shift_name: np.array(positions)})
        self._frames = {
            slot: replace(frame, position=frame.position - positions) for slot, frame in self._frames.items()
        }

    def clear(self) -> None:
        """Forget every frame."""
        self._visible.clear()
        self._frames.clear()
        self._hidden = 0
