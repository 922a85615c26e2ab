"""Which tokens of a frame are taken in, with angles between tokens that are known."""

from __future__ import annotations

import numpy as np
import pytest

from framestep.runtime.errors import FramestepError
from framestep.runtime.pruning import Pruner

DEGREES_25 = float(np.cos(np.radians(25)))


def tokens(*degrees: float, length: float = 1.0) -> np.ndarray:
    """One token [2] for each angle."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32) * length


def test_a_slow_change_is_taken_in_when_it_has_come_far_enough() -> None:
    pruner = Pruner(DEGREES_25)
    taken = [bool(pruner(tokens(10 * turn), turn, 0)[0]) for turn in range(8)]
    # 30 degrees from the last one that was taken in, never more than 10 from the last one that was seen
    assert taken == [True, False, False, True, False, False, True, False]
    assert (pruner.seen, pruner.left_out) == (8, 5)


def test_every_place_is_compared_with_itself_and_by_its_direction_alone() -> None:
    pruner = Pruner(DEGREES_25)
    pruner(tokens(0, 90, 180), 0, 0)
    assert pruner(tokens(20, 120, 180, length=7.0), 1, 0).tolist() == [False, True, False]
    assert pruner(tokens(30, 140, 150), 2, 0).tolist() == [True, False, True]


def test_what_a_forgotten_turn_showed_is_shown_again() -> None:
    pruner = Pruner(DEGREES_25)
    pruner(tokens(0, 0), 4, 4)
    pruner(tokens(0, 90), 5, 4)
    assert pruner(tokens(0, 90), 6, 4).tolist() == [False, False]
    assert pruner(tokens(0, 90), 7, 5).tolist() == [True, False]  # turn 4 had the first one
    assert pruner(tokens(0, 90), 8, 6).tolist() == [False, True]


def test_after_a_reset_all_of_a_frame_is_taken_in() -> None:
    pruner = Pruner(DEGREES_25)
    pruner(tokens(0, 0), 0, 0)
    pruner.reset()
    assert pruner(tokens(0, 0), 1, 0).all()


def test_a_token_of_zeros_is_like_no_other() -> None:
    pruner = Pruner(DEGREES_25)
    black = np.zeros((1, 2), np.float32)
    assert all(pruner(black, turn, 0).all() for turn in range(3))


@pytest.mark.parametrize("similarity", [0.0, -0.5, 1.01, float("nan")])
def test_what_is_no_similarity_is_refused(similarity: float) -> None:
    with pytest.raises(FramestepError, match=f"prune: expected a cosine similarity .* found {similarity}"):
        Pruner(similarity)
