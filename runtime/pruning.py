"""Leaving out what a frame shows again: tokens that differ little from the same place in an earlier frame."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import FramestepError

Array = npt.NDArray[Any]


class Pruner:
    """Says which tokens of a frame to take in.

    A token is left out where its cosine similarity with the last one that was taken in at its place reaches
    `similarity`, so that slow changes are noticed, and where that one is still remembered.

    Args:
        similarity: 0 to 1.

    Attributes:
        seen, left_out: tokens so far.
    """

    def __init__(self, similarity: float) -> None:
        if not 0 < similarity <= 1:
            raise FramestepError(f"prune: expected a cosine similarity above 0 and at most 1, found {similarity}")
        self._similarity = similarity
        self._last: Array | None = None  # [tokens, D], unit norm
        self._taken_at: Array | None = None  # [tokens], the turn
        self.seen = self.left_out = 0

    def __call__(self, visual: Array, turn: int, oldest: int) -> Array:
        """Which tokens to take in, bool [tokens].

        Args:
            visual: a frame's tokens, float32 [tokens, D].
            turn: number of its turn.
            oldest: number of the oldest turn that will be remembered after this one.
        """
        unit = visual / np.maximum(np.linalg.norm(visual, axis=1, keepdims=True), 1e-12)
        if self._last is None or self._taken_at is None:
            taken = np.ones(len(visual), bool)
            self._last, self._taken_at = unit.copy(), np.full(len(visual), turn)
        else:
            taken = ((unit * self._last).sum(axis=1) < self._similarity) | (self._taken_at < oldest)
            self._last[taken], self._taken_at[taken] = unit[taken], turn
        self.seen += len(visual)
        self.left_out += int((~taken).sum())
        return taken

    def reset(self) -> None:
        """Take all tokens of the next frame."""
        self._last = self._taken_at = None
