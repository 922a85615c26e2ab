"""How to hold a dialogue: its options, and which kinds of models have them."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import FramestepError
from .manifest import Manifest

NEVER = 1.0  # as `response_from` and `standby_from`: a probability that no state reaches


@dataclass(frozen=True)
class DialogueOptions:
    """How to hold a dialogue.

    Attributes:
        turn: seconds of video in a turn.
        rate: frames a second that the model is shown; None for the bundle's rate, or one where it has none.
        system: the system prompt; None for the chat format's own.
        eviction: what happens when the cache is full, "slots" or "cut"; see `Decoder`.
        prune: leave out visual tokens that are as similar to the same place before, 0 to 1; None for none.
        response_from, standby_from: probability from which the model answers or stands by, of the three states; None
            for whatever is likeliest.
        max_tokens: of an answer.
        temperature, top_p, seed, top_k: see `Sampler`.
        frames: newest frames that a question is about, where a model answers when asked; None for as many as it was
            trained with, or eight, and as fit.
        words_per_second: words of an answer for each second of a file, where an answer follows the video while it is
            being spoken; live sources go on by themselves.
    """

    turn: float = 1.0
    rate: float | None = None
    system: str | None = None
    eviction: str = "slots"
    prune: float | None = None
    response_from: float | None = None
    standby_from: float | None = None
    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    frames: int | None = None
    words_per_second: float = 1.0
    top_k: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("turn", self.turn), ("rate", self.rate), ("words_per_second", self.words_per_second)):
            if value is not None and not 0 < value < float("inf"):
                raise FramestepError(f"{name}: expected a number above 0, found {value}")
        for name in ("response_from", "standby_from"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise FramestepError(f"{name}: expected a probability from 0 to 1, found {value}")
        for name in ("max_tokens", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FramestepError(f"{name}: expected at least 1, found {value}")

    def refuse(self, why: str, *names: str) -> None:
        """Refuse options of which a kind of model would take no notice.

        Raises:
            FramestepError: one of `names` is set, with `why` that is of no use.
        """
        for name in names:
            if getattr(self, name) != getattr(DialogueOptions, name):
                raise FramestepError(f"{name}: {why}; leave the option out")

    def frames_a_second(self, manifest: Manifest) -> float:
        """What `rate` stands for."""
        return self.rate or manifest.rate or 1.0

    def frames_a_turn(self, manifest: Manifest) -> int:
        return max(1, round(self.turn * self.frames_a_second(manifest)))
