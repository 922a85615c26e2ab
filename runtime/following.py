"""An answer that follows the video while it is being spoken: text that attends to the newest frames at every token.

One thread looks: it reads frames and encodes them into the ring. The other speaks: before each token it lets the newest
encoded frame be seen. A live source runs free. A file runs on a clock of words, as samples do in training: each word of
an answer takes some time of the video, and all tokens of a word see the same frames.
"""

from __future__ import annotations

import threading
import time
import unicodedata
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from types import TracebackType

from .chat_format import Words
from .conversation import GLANCE, FrameSource
from .counted import counted
from .decoding import CapacityError, Decoder, Turn
from .dialogue_options import DialogueOptions
from .errors import EngineError, FramestepError, SourceError
from .events import Answer, AnswerText, Asked, Event, FrameShown, Notice, Rebased, Spoken
from .frame_ring import FrameRing
from .questions import Question, Questions, as_question
from .session import NonFiniteOutputError, Session
from .sources.frame import Frame
from .speaking import Seen, Speaker
from .text_cache import TextCache


class Following:
    """Events of a conversation about what a source shows, one after the other; `ask` may be called meanwhile.

    Args:
        session: of a bundle whose text attends to frames; one of its places is taken.
        source: opened at the rate that the model is to be shown; the caller closes it.
        options: see `DialogueOptions`; "prune" and "cut" are not for such models.

    Raises:
        EngineError: the session has not loaded what is needed.
        FramestepError: options that do not fit the bundle, or one without a tokenizer.
    """

    decides = False

    def __init__(self, session: Session, source: FrameSource, options: DialogueOptions | None = None) -> None:
        options = options or DialogueOptions()
        manifest = session.bundle.manifest
        language = manifest.language
        if language is None or language.cross is None:
            raise EngineError(f"{session.bundle.path}: its text does not attend to frames")
        if not {language.embed, language.decoder, language.rebase, language.cross.graph} <= set(session.graphs):
            raise EngineError("this session was loaded without the decoder; load(path) without graphs does")
        options.refuse("frames are no tokens of this model's dialogue", "prune", "eviction")
        options.refuse(
            "this model answers when it is asked and sees the newest frames at every token",
            "turn", "frames", "response_from", "standby_from",
        )  # fmt: skip
        self._source, self._options = source, options
        self._words = Words(language, session.bundle.path)
        self._opening = self._words.opening(options.system)
        self._stream = session.open_stream()
        try:
            ring = FrameRing(self._stream, manifest, session.preprocess)
            self.cache = TextCache(self._stream, manifest, ring)
            self._speaker = Speaker(self.cache, self._words, options, time.perf_counter)
            rate = options.frames_a_second(manifest)
            if ring.window < rate:
                raise FramestepError(
                    f"rate: the bundle keeps {counted(ring.window, 'frame')}, less than one second at {rate:g} a"
                    " second; choose a lower rate, or export it with a larger --window"
                )
        except BaseException:
            self._stream.close()
            raise
        self._questions = Questions()
        self._count = 0  # questions asked
        self._time = 0.0  # of the stream, in seconds
        self._next: Frame | None = None  # of a file
        self._notices: deque[Notice] = deque()
        self._over = self._told = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def decoder(self) -> Decoder:
        """What counts tokens, and what was forgotten."""
        return self.cache

    @property
    def dropped(self) -> int:
        """Frames of a live source that were not encoded, because newer ones came."""
        return self._source.dropped

    def ask(self, question: str | Question) -> int:
        """Ask as soon as the stream has come to the question's time and a frame is seen.

        Raises:
            FramestepError: it is empty.
            CapacityError: it does not fit into the cache.
        """
        asked = as_question(question)
        room = self.cache.capacity - len(self._opening) - len(self._words.close()) - 1
        if (count := len(self._prompt(asked.text))) > room:
            raise CapacityError(
                f"the question of {counted(count, 'token')} does not fit: the cache has room for {room};"
                " export the bundle with a larger --capacity"
            )
        with self.cache.lock:
            number = self._questions.add(asked)
            self.cache.lock.notify_all()
        return number

    def questions(self) -> dict[int, str]:
        """What waits for its time, by number."""
        with self.cache.lock:
            return {number: question.text for number, question in self._questions.waiting().items()}

    def withdraw(self, number: int) -> bool:
        """Do not ask what waits.

        Returns:
            False: it did not stand; see `Dialogue.withdraw`.

        Raises:
            FramestepError: there is no such question, or it is asked already.
        """
        with self.cache.lock:
            self._questions.withdraw(number)
        return False

    def __iter__(self) -> Iterator[Event]:
        try:
            self._begin()
            yield from self._follow_live() if self._source.live else self._follow_file()
        finally:
            self._stop()

    def _follow_file(self) -> Iterator[Event]:
        self._next = self._source.read()
        if self._next is None:
            raise SourceError(f"source {self._source.name}: gave no frame, so there is nothing to see")
        while not self._speaker.stopped:
            for question in self._due():
                yield from self._answer(question)
            if self._next is None:
                break
            yield from self._advance(max(self._time, self._next.timestamp))
        if not self._speaker.stopped:
            yield from self._unasked()

    def _follow_live(self) -> Iterator[Event]:
        self._thread = threading.Thread(target=self._watch, name="framestep-watcher", daemon=True)
        self._thread.start()
        while not self._speaker.stopped:
            yield from self._happened()
            with self.cache.lock:
                over = self._over
            due = self._due()
            for question in due:
                yield from self._answer(question)
            if over and not due:
                break
            with self.cache.lock:
                self.cache.lock.wait(GLANCE)
        yield from self._happened()
        if self._error is not None:
            raise self._error
        if self._speaker.stopped:
            return
        if not self.cache.ring.encoded:
            raise SourceError(f"source {self._source.name}: gave no frame, so there is nothing to see")
        yield from self._unasked()

    def _answer(self, question: str) -> Iterator[Event]:
        if self._speaker.stopped:
            return
        cache, words, turn = self.cache, self._words, Turn()
        self._count += 1
        yield Asked(self._time, question)
        with cache.lock:
            cache.answering = True
            newest = cache.ring.newest or cache.ring.waiting
        captured = time.perf_counter() if newest is None else newest.captured
        seen = Seen(self._count - 1, self._time, self._time, (), captured, self._source.live)
        try:
            pieces = [cache.text(turn, self._prompt(question))]
            beginning = True
            for event in self._speaker.answer(seen, pieces, captured):
                yield from self._happened()
                if isinstance(event, AnswerText):
                    yield self._spoken(event)
                    if not self._source.live:
                        spoken = words_begun(event.text, beginning) / self._options.words_per_second
                        yield from self._advance(self._time + spoken)
                    beginning = event.text[-1:].isspace()
                elif isinstance(event, Answer):
                    with suppress(CapacityError):  # of an answer that filled the cache the end is not written
                        cache.take([cache.text(turn, words.close())])
                    yield replace(event, time=self._time)
                yield from self._ended()
        except CapacityError as error:
            yield Notice(self._time, str(error))
        except NonFiniteOutputError as error:
            yield Notice(self._time, f"{error}; the conversation begins again")
            self._begin()
        finally:
            with cache.lock:
                cache.answering = False
                cache.show()
                cache.lock.notify_all()

    def _spoken(self, event: AnswerText) -> Event:
        newest = self.cache.ring.newest
        if newest is None:
            return event
        age = time.perf_counter() - newest.captured if self._source.live else self._time - newest.timestamp
        return Spoken(self._time, event.turn, event.text, newest.index, age)

    def _advance(self, until: float) -> Iterator[Event]:
        """Let a file go on to a second of its time."""
        self._time = until
        while self._next is not None and self._next.timestamp <= until + 1e-6:
            self._see(self._next, at_once=True)
            self._next = self._source.read()
        yield from self._happened()

    def _watch(self) -> None:
        """Read and encode frames of a live source, the newest there is each time; in a thread of its own."""
        cache = self.cache
        try:
            while not self._speaker.stopped:
                with cache.lock:
                    while cache.ring.waiting is not None and not self._speaker.stopped:
                        cache.lock.wait(GLANCE)
                frame = self._source.read(GLANCE)
                if frame is not None:
                    self._see(frame, at_once=False)
                elif self._source.ended:
                    break
        except BaseException as error:  # it belongs to whoever takes events
            self._error = error
        finally:
            with cache.lock:
                self._over = True
                cache.lock.notify_all()

    def _see(self, frame: Frame, at_once: bool) -> None:
        try:
            self.cache.see(frame, at_once)
        except NonFiniteOutputError as error:
            self._notices.append(Notice(frame.timestamp, f"frame {frame.index}: {error}; no frame is seen any more"))

    def _happened(self) -> Iterator[Event]:
        """What frames and positions did meanwhile."""
        cache = self.cache
        while self._notices:
            yield self._notices.popleft()
        while cache.shown:
            frame, token = cache.shown.popleft()
            self._time = max(self._time, frame.timestamp)
            yield FrameShown(frame.timestamp, frame.index, frame.position, token)
        while cache.moves:
            token, shift, gap = cache.moves.popleft()
            yield Rebased(self._time, token, shift, gap)
            if gap:
                yield Notice(
                    self._time, f"positions ran out: what is pinned came {counted(gap, 'position')} nearer to the rest"
                )

    def _ended(self) -> Iterator[Event]:
        """Whether the source has ended during an answer; told once."""
        over = self._over if self._source.live else self._next is None
        if over and not self._told:
            self._told = True
            yield Notice(self._time, "the source has ended; the answer goes on about its last frames")

    def _due(self) -> list[str]:
        with self.cache.lock:
            if self.cache.ring.newest is None:
                return []
            return list(self._questions.due(self._time + 1e-6).values())

    def _unasked(self) -> Iterator[Event]:
        for question in self._questions.waiting().values():
            yield Notice(self._time, f"the source has ended before {question.time:g} s, when '{question.text}' was due")

    def _begin(self) -> None:
        """The system prompt, before all frames."""
        position = self.cache.position  # frames stay where they are
        self.cache.reset()
        self.cache.position = position
        if self._opening:
            self.cache.take([self.cache.text(Turn(pinned=True), self._opening)])

    def _prompt(self, question: str) -> list[int]:
        head, rest = self._words.user(question)
        return [*head, *rest, *self._words.user_end(), *self._words.assistant()]

    def ask_to_stop(self) -> None:
        """Let the events end soon; from any thread or a signal handler."""
        self._speaker.stopped = True

    def _stop(self) -> None:
        self.ask_to_stop()
        if self._thread is not None:
            self._thread.join()

    def close(self) -> None:
        """Give the place in the session back."""
        self._stop()
        self._stream.close()

    def __enter__(self) -> Following:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def words_begun(text: str, beginning: bool) -> int:
    """How many words begin in some text of an answer.

    A word is what stands between white space; of scripts that are written without it each wide character is one.

    Args:
        beginning: whether white space or nothing stands before the text.
    """
    count = 0
    for character in text:
        if character.isspace():
            beginning = True
            continue
        count += beginning or unicodedata.east_asian_width(character) in "WF"
        beginning = False
    return count
