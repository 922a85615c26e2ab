"""Numbers with their nouns."""

from __future__ import annotations

import pytest

from framestep.runtime.counted import counted


@pytest.mark.parametrize(
    ("number", "noun", "expected"),
    [
        (0, "frame", "0 frames"),
        (1, "frame", "1 frame"),
        (2, "frame", "2 frames"),
        (1_234_567, "token", "1234567 tokens"),
        (1, "process", "1 process"),
        (2, "process", "2 processes"),
        (1.0, "frame", "1 frame"),
        (0.5, "frame", "0.5 frames"),
        (29.97, "frame", "29.97 frames"),
    ],
)
def test_one_is_singular(number: float, noun: str, expected: str) -> None:
    assert counted(number, noun) == expected
