"""Questions about the newest frames, answered when they are asked: for models that do not decide when to speak."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from .chat_format import Words
from .counted import counted
from .decoding import Array, CapacityError, Decoder, GraphRunner, Piece, Turn, visual_tokens
from .dialogue_options import DialogueOptions
from .events import Asked, Event, Notice
from .manifest import Manifest
from .questions import Question, Questions, as_question
from .session import NonFiniteOutputError
from .speaking import Clock, Seen, Speaker

FRAMES = 8  # of models that were not trained with a fixed number
ANSWER = 0.25  # of the cache that is left to an answer where nobody says how many frames a question is about


class Answering:
    """Remembers what was seen of the newest frames; each question is asked about them anew.

    Args and methods are those of `Dialogue`.

    Attributes:
        frames: how many frames a question is about, at most.
    """

    def __init__(
        self,
        stream: GraphRunner,
        manifest: Manifest,
        words: Words,
        options: DialogueOptions,
        clock: Clock = time.perf_counter,
    ) -> None:
        options.refuse(
            "this model is asked about whole frames; only one that decides when to speak has it",
            "prune", "eviction", "response_from", "standby_from",
        )  # fmt: skip
        options.refuse("of this model an answer does not follow the video", "words_per_second")
        self._words = words
        self._options = options
        self._clock = clock
        self._manifest = manifest
        self.decoder = Decoder(stream, manifest, options.eviction)
        self._speaker = Speaker(self.decoder, words, options, clock)
        self._lock = threading.Lock()
        self._questions = Questions()
        self._opening = words.opening(options.system)
        self._around = len(self._opening) + len(words.user_end()) + len(words.assistant()) + 1
        visual = visual_tokens(manifest)
        fitting = (self.decoder.capacity - self._around) // (visual + 2)
        wanted = options.frames or manifest.origin.trained_frames or FRAMES
        answer = min(options.max_tokens, int(ANSWER * self.decoder.capacity))
        comfortable = max(1, (self.decoder.capacity - self._around - answer) // (visual + 2))
        self.frames = min(wanted, fitting, fitting if options.frames else comfortable) if visual else 0
        if (visual and self.frames < 1) or (options.frames or 0) > fitting:
            raise CapacityError(
                f"{counted(options.frames or 1, 'frame')} of {counted(visual, 'token')} and a question do not fit:"
                f" the cache holds {self.decoder.capacity} tokens; export the bundle with a larger --capacity"
            )
        self._newest: deque[Array] = deque(maxlen=self.frames)

    def ask(self, question: str | Question) -> int:
        """Ask at the next turn that ends after the question's time; see `Dialogue.ask`."""
        asked = as_question(question)
        head, rest = self._words.user(asked.text)
        visual = visual_tokens(self._manifest) + 2
        taken = self._around + len(head) + len(rest)
        if taken + (visual if self.frames else 0) > self.decoder.capacity:
            raise CapacityError(
                f"the question of {counted(len(head) + len(rest), 'token')} does not fit:"
                f" the cache holds {self.decoder.capacity}; export the bundle with a larger --capacity"
            )
        with self._lock:
            return self._questions.add(asked)

    def questions(self) -> dict[int, str]:
        """What waits for its time, by number."""
        with self._lock:
            return {number: question.text for number, question in self._questions.waiting().items()}

    def withdraw(self, number: int) -> bool:
        """Do not ask what waits.

        Returns:
            False: it did not stand; see `Dialogue.withdraw`.

        Raises:
            FramestepError: there is no such question, or it is asked already.
        """
        with self._lock:
            self._questions.withdraw(number)
        return False

    def ask_to_stop(self) -> None:
        """See `Dialogue.ask_to_stop`."""
        self._speaker.stopped = True

    def unasked(self) -> list[Question]:
        """What was asked and is not answered yet."""
        with self._lock:
            return list(self._questions.waiting().values())

    def take(self, turns: Sequence[Seen]) -> Iterator[Event]:
        """Take turns in, and answer what is asked in them about the frames up to the last."""
        for seen in turns:
            self._newest.extend(seen.visual)
        seen = turns[-1]
        with self._lock:
            due = self._questions.due(seen.stop)
        for text in due.values():
            if self._speaker.stopped:
                return
            begun = self._clock()
            yield Asked(seen.stop, text)
            self.decoder.reset()
            try:
                count, pieces = self._prompt(text)
                if count < len(self._newest):
                    yield Notice(
                        seen.stop,
                        f"asked about {counted(count, 'frame')}, not {len(self._newest)}: the cache holds no more",
                    )
                yield from self._speaker.answer(seen, pieces, begun)
            except NonFiniteOutputError as error:
                yield Notice(seen.stop, str(error))

    def _prompt(self, question: str) -> tuple[int, list[Piece]]:
        """System prompt, frames, question: one turn, so that nothing of it is forgotten for an answer; and how many
        frames these are.
        """
        turn, decoder, words = Turn(), self.decoder, self._words
        tokens = words.language.tokens
        frames = list(self._newest)
        text = f"\n{question}" if frames else question
        before, after = words.user(text)
        room = decoder.capacity - self._around - len(before) - len(after)
        frames = frames[len(frames) - min(len(frames), room // (visual_tokens(self._manifest) + 2)) :]
        opening = [*self._opening, *before]
        pieces = []
        for visual in frames:
            opening += [tokens["vision_start"]] if "vision_start" in tokens else []
            pieces += [decoder.text(turn, opening)] if opening else []
            pieces.append(decoder.picture(turn, visual))
            opening = [tokens["vision_end"]] if "vision_end" in tokens else []
        if frames and "newline" in tokens:
            opening = [*opening, tokens["newline"]]
        pieces.append(decoder.text(turn, [*opening, *after, *words.user_end(), *words.assistant()]))
        return len(frames), pieces
