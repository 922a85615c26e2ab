"""What happens in a dialogue about a video."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        time: seconds of the stream, the end of the turn that it belongs to.
    """

    time: float


@dataclass(frozen=True)
class Asked(Event):
    """A question stands from this turn on."""

    text: str


@dataclass(frozen=True)
class Withdrawn(Event):
    """A question stands no longer, from this turn on."""

    text: str


@dataclass(frozen=True)
class Decision(Event):
    """What the model makes of a turn.

    Attributes:
        turn: its number; turns have the length that the dialogue was given, the first is 0.
        state: "silence", "standby" or "response".
        probabilities: of the three states; None where nothing was decided: no question stood, or the turn had passed
            while an answer was given, and was caught up with later ones.
        seconds: that it took, with what was caught up.
        lag: seconds from the capture of the turn's last frame to the decision; None for files, which wait.
        tokens: taken in for it, with those left from the turn before; those that caught up count at the last.
        pruned: visual tokens left out.
    """

    turn: int
    state: str
    probabilities: dict[str, float] | None
    seconds: float
    lag: float | None
    tokens: int
    pruned: int


@dataclass(frozen=True)
class AnswerText(Event):
    """Some more text of an answer."""

    turn: int
    text: str


@dataclass(frozen=True)
class Answer(Event):
    """An answer is complete.

    Attributes:
        reason: "stop", "length" (the longest that was asked for), "capacity" (the cache holds no more) or "interrupted"
            (by `ask_to_stop`).
        tokens: how many it has.
        first_token: seconds from the capture of the last frame to the first token of text, or of files, which wait,
            from when the turn was taken; None where it has none.
        seconds: from the decision to the end.
    """

    turn: int
    text: str
    reason: str
    tokens: int
    first_token: float | None
    seconds: float


@dataclass(frozen=True)
class Notice(Event):
    """Something went wrong and was survived."""

    text: str


@dataclass(frozen=True)
class FrameShown(Event):
    """A frame became visible to text.

    Attributes:
        index: in its source.
        position: of the text at its moment; see `Rebased`.
        token: number of the first text token that could see it, of all since the beginning.
    """

    index: int
    position: int
    token: int


@dataclass(frozen=True)
class Rebased(Event):
    """Positions went back, because the model's last one was near.

    Attributes:
        token: number of the first text token afterwards.
        shift: by how much all positions went back, which changes nothing.
        gap: by how much more all did but those of what is pinned. That brings what is pinned nearer to the rest.
    """

    token: int
    shift: int
    gap: int


@dataclass(frozen=True)
class Spoken(AnswerText):
    """Some more text of an answer.

    Attributes:
        frame: index of the newest frame that its last token could see.
        age: seconds from the capture of that frame to the text; of a file, of its time.
    """

    frame: int
    age: float
