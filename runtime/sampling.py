"""From logits to the next token."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import FramestepError

Array = npt.NDArray[Any]


class Sampler:
    """Takes the likeliest token, or draws one.

    Args:
        temperature: logits are divided by it before the softmax; 0 takes the likeliest token.
        top_p: draws among the fewest tokens that have this probability together, of those that `top_k` leaves.
        seed: of the draws.
        top_k: draws among so many of the likeliest tokens; None for all.

    Raises:
        FramestepError: a number out of its range, or one of a draw at temperature 0.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, top_k: int | None = None) -> None:
        if not 0 <= temperature < np.inf:
            raise FramestepError(f"temperature: expected 0 or more, found {temperature}")
        if not 0 < top_p <= 1:
            raise FramestepError(f"top_p: expected more than 0 and at most 1, found {top_p}")
        if top_k is not None and top_k < 1:
            raise FramestepError(f"top_k: expected at least 1, found {top_k}")
        if seed < 0:
            raise FramestepError(f"seed: expected 0 or more, found {seed}")
        for name, given in (("top_p", top_p < 1), ("top_k", top_k is not None), ("seed", seed != 0)):
            if given and temperature == 0:
                raise FramestepError(f"{name}: is of draws, and none is made at temperature 0; give a higher one")
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._generator = np.random.default_rng(seed)

    def __call__(self, logits: Array) -> int:
        """A token for logits [V]."""
        if self._temperature == 0:
            return int(logits.argmax())
        probabilities = softmax(logits.astype(np.float64) / self._temperature)
        order = np.argsort(-probabilities, kind="stable")[: self._top_k]
        share = probabilities[order] / probabilities[order].sum()
        count = np.count_nonzero(np.cumsum(share) - share < self._top_p)  # the likeliest always
        return int(self._generator.choice(order[:count], p=share[:count] / share[:count].sum()))


def softmax(logits: Array) -> Array:
    """Probabilities of logits along the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    found: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return found
