"""A stream whose runs of graphs are written down for the oracle: who stood where, and who saw whom."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import golden
import numpy as np
from streamchat_oracle import Oracle


class Recorder:
    """Stands in for a `Stream`.

    Attributes:
        runs: how often each graph ran.
        tokens: of every token that went through the decoder.
        last: number of the token that each logits follow.
        during: called while a frame is being encoded, with its number.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._lock = threading.Lock()
        self.runs: Counter[str] = Counter()
        self.tokens: list[int] = []
        self.logits: list[np.ndarray] = []
        self.last: list[int] = []
        self.frames: list[np.ndarray] = []
        self.during: Callable[[int], None] = lambda number: None
        self._embedded: list[int] = []
        self._slots: dict[int, int] = {}  # of text: slot -> token
        self._ring: dict[int, int] = {}  # slot -> frame
        self._places: list[int] = []  # of tokens, now
        self._times: list[int] = []  # of frames, now
        self._in_flight: int | None = None
        self._rows: list[tuple[list[int], list[int], list[int], list[int]]] = []  # of each token

    def run(self, graph: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        with self._lock:
            self.runs[graph] += 1
            number = len(self.frames)
            getattr(self, f"_{graph}")(inputs)
        try:
            if graph == "frame":
                self.during(number)
            found = self._stream.run(graph, inputs)
        finally:
            if graph == "frame":
                self._in_flight = None
        if graph == "decoder":
            self.logits.append(found["logits"])
        return found

    def _embed(self, inputs: dict[str, np.ndarray]) -> None:
        self._embedded += inputs["tokens"].tolist()

    def _frame(self, inputs: dict[str, np.ndarray]) -> None:
        assert self._in_flight is None, "two frames at once"
        rows = inputs["position_ids"].shape[1]
        self._in_flight = int(inputs["write_index"]) // rows
        self._ring[self._in_flight] = len(self.frames)
        self.frames.append(inputs["frame"].copy())
        self._times.append(int(inputs["position_ids"][0, 0]))

    def _decoder(self, inputs: dict[str, np.ndarray]) -> None:
        shown = np.flatnonzero(inputs["visual_slot_mask"])
        assert self._in_flight not in shown, "a frame is seen while it is being written"
        at, count = int(inputs["write_index"]), len(inputs["embeddings"])
        old = [self._slots[slot] for slot in np.flatnonzero(inputs["slot_mask"]) if not at <= slot < at + count]
        first = len(self.tokens)
        for offset in range(count):
            self._slots[at + offset] = first + offset
            self._places.append(int(inputs["position_ids"][0, offset]))
            seen = [*old, *range(first, first + offset + 1)]
            self._rows.append((seen, [self._ring[slot] for slot in shown], list(self._places), list(self._times)))
        self.tokens += self._embedded[:count]
        self._embedded = self._embedded[count:]
        self.last.append(len(self.tokens) - 1)

    def _rebase(self, inputs: dict[str, np.ndarray]) -> None:
        for slot, token in self._slots.items():
            self._places[token] = int(inputs["slot_positions"][0, slot])

    def _rebase_frames(self, inputs: dict[str, np.ndarray]) -> None:
        assert self._in_flight is None, "positions go back while a frame is being written"
        self._times = [time - int(inputs["position_shift"]) for time in self._times]

    def check(self, oracle: Oracle) -> None:
        """All logits are those of a recompute of everything."""
        T, M = len(self.tokens), len(self.frames)
        kept, visible = np.zeros((T, T), bool), np.zeros((T, M), bool)
        places, times = np.zeros((T, T), np.int64), np.zeros((T, M), np.int64)
        for token, (seen, frames, where, when) in enumerate(self._rows):
            kept[token, seen] = visible[token, frames] = True
            places[token, : len(where)], times[token, : len(when)] = where, when
        expected = oracle.logits(np.array(self.tokens), places, np.stack(self.frames), times, visible, kept)
        golden.assert_close(np.stack(self.logits), expected[self.last])
