"""A decoder's cache beside a ring of frames: its text attends to them, and both share a clock.

The clock of the model is `TextCache.position`, the position of the next text token. A frame that begins to be encoded
while an answer is given gets that position; otherwise the clock first goes on by one.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from .decoding import Array, Decoder, GraphRunner, Piece, Turn
from .frame_ring import EncodedFrame, FrameRing
from .manifest import Manifest, Port
from .sources.frame import Frame


class TextCache(Decoder):
    """A decoder whose text sees the frames of a ring, and the clock that both share.

    `see` may be called by one thread while another takes tokens in. `lock` guards the clock and which frames are seen;
    whoever re-bases or encodes also holds `still`, which is taken first.

    Attributes:
        ring: the frames.
        answering: whether text is being taken in or generated.
        shown: frames that became visible, and the number of the first token that could see each, since they were last
            taken from here.
        moves: re-basings likewise, as the number of the first token afterwards, the shift and the gap.
    """

    def __init__(self, stream: GraphRunner, manifest: Manifest, ring: FrameRing) -> None:
        super().__init__(_WithFrames(stream, manifest, ring), _text_alone(manifest, ring))
        self.ring = ring
        self.answering = False
        self.lock = threading.Condition()
        self.still = threading.RLock()
        self.shown: deque[tuple[EncodedFrame, int]] = deque()
        self.moves: deque[tuple[int, int, int]] = deque()

    def take(self, pieces: Sequence[Piece]) -> Array:
        """Take tokens in, which all see the frames that are encoded now; see `Decoder.take`."""
        with self.lock:
            self.show()
        return super().take(pieces)

    def see(self, frame: Frame, at_once: bool) -> None:
        """Encode a frame.

        Args:
            at_once: whether it is seen from the next token on even while `take` is at work; else that waits for `take`.

        Raises:
            NonFiniteOutputError: the model gave NaN or infinity; no frame is seen any more.
        """
        with self.still:
            with self.lock:
                if not self.answering:
                    self._reserve(1)
                    self.position += 1
                encoded = EncodedFrame(frame.index, frame.timestamp, frame.captured, self.position)
            self.ring.encode(frame.rgb, encoded)
            with self.lock:
                if at_once or not self.answering:
                    self.show()
                self.lock.notify_all()

    def show(self) -> None:
        """Let text see the frame that waits. The lock is held."""
        frame = self.ring.commit()
        if frame is not None:
            self.shown.append((frame, self.taken))
            self.lock.notify_all()

    def rebase(self) -> None:
        """Bring everything to lower positions by one constant; if what is pinned stands at 0 already, all but that.

        The first changes nothing, for attention depends on distances. The second closes the gap behind what is pinned.

        Raises:
            FramestepError: the positions of frames are literal, so that they cannot move.
        """
        with self.still:
            pinned = [turn for turn in self.turns if turn.pinned]
            free = [turn for turn in self.turns if not turn.pinned]
            frames = [] if self.ring.first_position is None else [self.ring.first_position]
            lowest = min([*(turn.first for turn in free), *frames, self.position])
            shift = min([lowest, *(turn.first for turn in pinned)])
            gap = 0 if shift or not pinned else lowest - max(turn.stop for turn in pinned)
            if shift + gap == 0:
                return
            self.ring.move_back(shift + gap)
            for turns, positions in ((pinned, shift), (free, shift + gap)):
                for turn in turns:
                    self._positions[:, turn.slots] -= positions
                    turn.first -= positions
                    turn.stop -= positions
            self.position -= shift + gap
            self._stream.run(self._language.rebase, {self._names["slot_positions"]: self._positions})
            self.rebased += 1
            self.moves.append((self.taken, shift, gap))

    def _reserve(self, positions: int) -> None:
        """Make room for so many positions more; the oldest turns are forgotten if they keep it from being there."""
        while self.position + positions > self._language.positions:
            before = self.position
            self.rebase()
            if self.position == before:
                oldest = self._evict(Turn())
                self.forget(oldest)


class _WithFrames:
    """A stream whose decoder is told which frames are seen."""

    def __init__(self, stream: GraphRunner, manifest: Manifest, ring: FrameRing) -> None:
        assert manifest.language is not None
        self._stream, self._ring = stream, ring
        self._decoder = manifest.language.decoder
        self._mask = next(port.name for port in _of_frames(manifest))

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if graph == self._decoder:
            inputs = {**inputs, self._mask: self._ring.mask}
        return self._stream.run(graph, inputs)


def _of_frames(manifest: Manifest) -> list[Port]:
    """The decoder's inputs that speak of frames."""
    assert manifest.language is not None
    assert manifest.language.cross is not None
    group = next(port.states for port in manifest.graphs[manifest.language.cross.graph].inputs if port.states)
    return [port for port in manifest.graphs[manifest.language.decoder].inputs if port.states == group]


def _text_alone(manifest: Manifest, ring: FrameRing) -> Manifest:
    """The manifest of a decoder without frames, and with room for a frame's rows and columns above the clock."""
    language = manifest.language
    assert language is not None
    graph = manifest.graphs[language.decoder]
    inputs = tuple(port for port in graph.inputs if port not in _of_frames(manifest))
    return replace(
        manifest,
        graphs={**manifest.graphs, language.decoder: replace(graph, inputs=inputs)},
        language=replace(language, positions=language.positions - ring.reach),
    )
