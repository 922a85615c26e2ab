"""What was asked: numbered, so that it can be withdrawn, and waiting for its time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .chat_format import well_formed
from .errors import FramestepError


@dataclass(frozen=True)
class Question:
    """A question, and the second of the stream from which it stands; 0 for the newest turn when it is asked."""

    text: str
    time: float = 0.0


def as_question(asked: str | Question) -> Question:
    """What is asked, without white space around it and without what is no character.

    Raises:
        FramestepError: it is empty.
    """
    question = asked if isinstance(asked, Question) else Question(asked)
    text = well_formed(question.text).strip()
    if not text:
        raise FramestepError("a question is empty")
    return Question(text, question.time)


class Questions:
    """Questions that wait for their time, by their numbers. Whoever uses them from several threads holds a lock."""

    def __init__(self) -> None:
        self._count = 0
        self._waiting: dict[int, Question] = {}

    def add(self, question: Question) -> int:
        """Its number; the first is 1."""
        self._count += 1
        self._waiting[self._count] = question
        return self._count

    def due(self, before: float, untimed: bool = True) -> dict[int, str]:
        """Take out those whose time is before a second of the stream, in the order of their numbers.

        Args:
            untimed: with those of no time; they are asked now, which is not when a turn was that passed meanwhile.
        """
        due = {
            number: question.text
            for number, question in self._waiting.items()
            if question.time < before and (untimed or question.time > 0)
        }
        for number in due:
            del self._waiting[number]
        return due

    def put_back(self, due: dict[int, str]) -> None:
        """Let them wait again, for what comes next."""
        waiting = {**{number: Question(text) for number, text in due.items()}, **self._waiting}
        self._waiting = dict(sorted(waiting.items()))

    def waiting(self) -> dict[int, Question]:
        return dict(self._waiting)

    def withdraw(self, number: int, others: Iterable[int] = ()) -> str:
        """The text of a question that no longer waits.

        Args:
            others: numbers that there are beside.

        Raises:
            FramestepError: no such question waits.
        """
        question = self._waiting.pop(number, None)
        if question is None:
            numbers = ", ".join(map(str, sorted([*self._waiting, *others])))
            raise FramestepError(
                f"there is no question {number}; " + (f"expected {numbers}" if numbers else "there is none at all")
            )
        return question.text
