"""A dialogue about a video, turn by turn: the model says itself when it is silent, waits or answers.

A turn is some seconds of video. As in Streamo, the user's part is `<Xs-Ys>` and the turn's frames, with new questions
before it; the model's part is one of three states, and an answer behind the last of them. Where a model has no such
states it answers questions about the newest frames when they are asked; see `answering.py`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from .chat_format import STATES, Words
from .decoding import Array, CapacityError, Decoder, GraphRunner, Piece, Turn, visual_tokens
from .dialogue_options import DialogueOptions
from .events import Asked, Decision, Event, Notice, Withdrawn
from .manifest import Manifest
from .pruning import Pruner
from .questions import Question, Questions, as_question
from .sampling import softmax
from .session import NonFiniteOutputError
from .speaking import Clock, Seen, Speaker

LONG_AGO = 1e8  # seconds that a stream may have gone on; a turn's longest tag counts for its room


@dataclass(frozen=True, eq=False)
class _Standing:
    """A question that stands, and the turn in which it was asked."""

    text: str
    turn: Turn


class Dialogue:
    """Turns in, events out. What concerns questions may be called from other threads.

    Args:
        stream: of a session that has loaded the bundle's decoder.
        manifest: of the bundle, in the session's precision.
        words: its tokenizer and chat format; it has the three states.
        clock: seconds.

    Raises:
        CapacityError: the cache does not hold the system prompt and a turn.
    """

    def __init__(
        self,
        stream: GraphRunner,
        manifest: Manifest,
        words: Words,
        options: DialogueOptions,
        clock: Clock = time.perf_counter,
    ) -> None:
        options.refuse("this model decides when to speak; only one that is asked has it", "frames")
        options.refuse("of this model an answer does not follow the video", "words_per_second")
        self._words = words
        self._options = options
        self._clock = clock
        self.decoder = Decoder(stream, manifest, options.eviction)
        self._speaker = Speaker(self.decoder, words, options, clock)
        self._pruner = None if options.prune is None else Pruner(options.prune)
        self._lock = threading.Lock()
        self._questions = Questions()  # asked, and in no turn yet
        self._standing: dict[int, _Standing] = {}  # by number
        self._withdrawn: list[tuple[int, _Standing]] = []  # since the last turn
        self._numbers: deque[tuple[int, Turn]] = deque()  # of turns that are remembered
        self._opening = words.opening(options.system)
        self._turn_tokens = turn_tokens(manifest, words, options)
        self._standing_tokens = 0
        self._begin()
        self._check_room(0, "")

    def ask(self, question: str | Question) -> int:
        """Let a question stand from the next turn on that ends after its time.

        Returns:
            Its number, for `withdraw`.

        Raises:
            FramestepError: it is empty.
            CapacityError: it does not fit beside what stands already.
        """
        asked = as_question(question)
        tokens = self._question_tokens(asked.text)
        with self._lock:
            self._check_room(tokens, f"the question '{_short(asked.text)}' ")
            self._standing_tokens += tokens
            return self._questions.add(asked)

    def questions(self) -> dict[int, str]:
        """What stands and what waits for its time, by number."""
        with self._lock:
            standing = {number: question.text for number, question in self._standing.items()}
            waiting = {number: question.text for number, question in self._questions.waiting().items()}
        return dict(sorted({**standing, **waiting}.items()))

    def withdraw(self, number: int) -> bool:
        """Let a question stand no longer, from the next turn on: no token sees any of it.

        What was taken in while it stood stays as it was then understood.

        Returns:
            Whether it stood: then the next turn tells by `Withdrawn`. One that waited for its time is just not asked.

        Raises:
            FramestepError: there is no such question.
        """
        with self._lock:
            stood = number in self._standing
            if stood:
                question = self._standing.pop(number)
                self._withdrawn.append((number, question))
                text = question.text
            else:
                text = self._questions.withdraw(number, self._standing)
            self._standing_tokens -= self._question_tokens(text)
        return stood

    def ask_to_stop(self) -> None:
        """End the answer that is being given, with its next token; from any thread or a signal handler."""
        self._speaker.stopped = True

    def unasked(self) -> list[Question]:
        """What was asked and stands in no turn yet."""
        with self._lock:
            return list(self._questions.waiting().values())

    def take(self, turns: Sequence[Seen]) -> Iterator[Event]:
        """Take turns in, all in one go, decide at the last of them, and answer if that is what was decided."""
        yield from self._forget_withdrawn(turns[0].stop)
        try:
            yield from self._take(turns)
        except NonFiniteOutputError as error:
            yield Notice(turns[-1].stop, f"{error}; the dialogue begins again with its questions")
            with self._lock:
                self._questions.put_back({number: question.text for number, question in self._standing.items()})
                self._standing = {}
            self._begin()

    def _begin(self) -> None:
        """The system prompt; it is taken in with the first turn."""
        self.decoder.reset()
        self._numbers.clear()
        if self._pruner is not None:
            self._pruner.reset()
        self._pending = [self.decoder.text(Turn(pinned=True), self._opening)] if self._opening else []

    def _forget_withdrawn(self, time: float) -> list[Event]:
        with self._lock:
            withdrawn, self._withdrawn = self._withdrawn, []
            standing = [question.turn for question in self._standing.values()]
        for number, question in withdrawn:
            self.decoder.forget_part(question.turn, number)
            if question.turn not in standing:  # the message around them
                self.decoder.let_go(question.turn)
        return [Withdrawn(time, question.text) for _, question in withdrawn]

    def _take(self, turns: Sequence[Seen]) -> Iterator[Event]:
        begun, pruned = self._clock(), []
        events: list[Event] = []  # given out when all is noted down: whoever listens may leave at any of them
        pieces, self._pending = self._pending, []
        new = [Turn() for _ in turns]
        due = [self._due(seen, turn, seen is turns[-1]) for seen, turn in zip(turns, new, strict=True)]
        needed = sum(len(piece.embeddings) for piece in pieces) + self._turn_tokens * len(turns)
        needed += sum(self._question_tokens(question) for asked in due for question in asked.values())
        for seen, turn, asked in zip(turns, new, due, strict=True):
            events += [Asked(seen.stop, question) for question in asked.values()]
            left_out = 0 if self._pruner is None else self._pruner.left_out
            pieces += self._user(turn, seen, asked, needed)
            pruned.append(0 if self._pruner is None else self._pruner.left_out - left_out)
            if seen is not turns[-1]:
                pieces += self._said(turn, "silence")
        before = self.decoder.taken
        logits = self.decoder.take(pieces)
        tokens, decided = self.decoder.taken - before, self._clock()
        for seen, count in zip(turns[:-1], pruned, strict=False):
            lag = _lag(seen, decided)
            events.append(Decision(seen.stop, seen.number, "silence", None, decided - begun, lag, 0, count))
        state, probabilities = "silence", None
        if self._standing:
            probabilities = self._probabilities(logits)
            state = choose_state(probabilities, self._options.response_from, self._options.standby_from)
        seen = turns[-1]
        lag = _lag(seen, decided)
        decision = Decision(seen.stop, seen.number, state, probabilities, decided - begun, lag, tokens, pruned[-1])
        self._pending = self._said(turn, state)
        yield from (*events, decision)
        if state == "response":
            start = [self.decoder.text(turn, [self._words.state(state)])]
            self._pending = [self.decoder.text(turn, self._words.close())]
            yield from self._speaker.answer(seen, start, begun)

    def _due(self, seen: Seen, turn: Turn, newest: bool) -> dict[int, str]:
        with self._lock:
            due = self._questions.due(seen.stop, newest)
            self._standing |= {number: _Standing(text, turn) for number, text in due.items()}
        return due

    def _user(self, turn: Turn, seen: Seen, questions: Mapping[int, str], needed: int) -> list[Piece]:
        """The user's part of a turn. When the turn is forgotten, what was asked stays as a message of its own."""
        decoder, tokens = self.decoder, self._words.language.tokens
        heads = [f"{question}\n" for question in questions.values()]
        text = "".join([*heads, f"{time_tag(seen.start, seen.stop)}\n"])
        opening, *asked, rest = self._words.user(text, *accumulate(map(len, heads)))
        pieces = []
        if questions:
            parts = [(0, opening), *zip(questions, asked, strict=True)]
            pieces = [decoder.text(turn, ids, kept=True, part=number) for number, ids in parts if ids]
        else:
            rest = opening + rest
        for visual in seen.visual:
            rest += [tokens["vision_start"]] if "vision_start" in tokens else []
            pieces += [decoder.text(turn, rest)] if rest else []
            pieces.append(decoder.picture(turn, visual, self._shown(turn, seen, visual, needed)))
            rest = [tokens["vision_end"]] if "vision_end" in tokens else []
        end = self._words.user_end()
        if questions and end:
            pieces += [decoder.text(turn, rest)] if rest else []
            pieces.append(decoder.text(turn, end, kept=True))
            rest = []
        else:
            rest = rest + end
        pieces.append(decoder.text(turn, rest + self._words.assistant()))
        return pieces

    def _said(self, turn: Turn, state: str) -> list[Piece]:
        return [self.decoder.text(turn, [self._words.state(state), *self._words.close()])]

    def _shown(self, turn: Turn, seen: Seen, visual: Array, needed: int) -> Array | None:
        """Which tokens of a frame to take in, when `needed` tokens in all are to be."""
        if self._pruner is None:
            return None
        while self._numbers and self._numbers[0][1].remnant:
            self._numbers.popleft()
        room, oldest = self.decoder.capacity - self.decoder.used - needed, seen.number
        for number, remembered in self._numbers:
            if room >= 0:
                oldest = number
                break
            room += remembered.kept.count(False)  # it will have to go, so what it showed is shown again
        if not self._numbers or self._numbers[-1][1] is not turn:
            self._numbers.append((seen.number, turn))
        return self._pruner(visual, seen.number, oldest)

    def _probabilities(self, logits: Array) -> dict[str, float]:
        found = softmax(logits[[self._words.state(state) for state in STATES]].astype(np.float64))
        return dict(zip(STATES, map(float, found), strict=True))

    def _question_tokens(self, text: str) -> int:
        """Of a question that stands as a message of its own."""
        opening, asked, _ = self._words.user(f"{text}\n", len(text) + 1)
        return len(opening) + len(asked) + len(self._words.user_end())

    def _check_room(self, more: int, what: str) -> None:
        stays = len(self._opening) + self._standing_tokens
        if stays + more + self._turn_tokens > self.decoder.capacity:
            raise CapacityError(
                f"{what or 'a dialogue '}does not fit: the cache holds {self.decoder.capacity} tokens;"
                f" the system prompt and standing questions take {stays}, a turn {self._turn_tokens}"
                + (f", this {more}" if more else "")
                + "; export the bundle with a larger --capacity or a smaller --frame-size,"
                " or take a shorter --system, or fewer frames a turn (--rate, --turn)"
            )


def choose_state(
    probabilities: dict[str, float], response_from: float | None = None, standby_from: float | None = None
) -> str:
    """The state that is taken: the likeliest, or by thresholds.

    With a threshold a state is taken from that probability on and never below it; what is left is decided among the
    others.
    """
    left = dict(probabilities)
    for state, threshold in (("response", response_from), ("standby", standby_from)):
        if threshold is None:
            continue
        if left.pop(state) >= threshold:
            return state
    return max(left, key=lambda state: left[state])


def time_tag(start: float, stop: float) -> str:
    """A turn's seconds, as `<7s-8s>`."""
    first, last = (f"{time:.3f}".rstrip("0").rstrip(".") for time in (start, stop))
    return f"<{first}s-{last}s>"


def turn_tokens(manifest: Manifest, words: Words, options: DialogueOptions) -> int:
    """Tokens of a turn at the longest, without an answer."""
    first, rest = words.user(f"{time_tag(LONG_AGO + 0.125, LONG_AGO + 1.125)}\n")
    text = len(first) + len(rest) + len(words.user_end()) + len(words.assistant())
    return options.frames_a_turn(manifest) * (visual_tokens(manifest) + 2) + text + 1 + len(words.close())


def _lag(seen: Seen, now: float) -> float | None:
    return now - seen.captured if seen.live else None


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
