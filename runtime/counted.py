"""Numbers with their nouns, as people read them."""

from __future__ import annotations


def counted(number: float, noun: str) -> str:
    """`1 frame`, `2 frames`, `0.5 frames`, `1 process`, `2 processes`."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    text = f"{number:g}" if isinstance(number, float) else str(number)
    return f"{text} {noun if number == 1 else plural}"
