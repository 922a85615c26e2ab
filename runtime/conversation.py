"""A conversation about what a source shows: one thread looks, the other speaks.

While an answer is being generated the next frames are read and encoded. If answering takes longer than a turn, the
turns that passed wait, the newest of them where there is no room for all, and are caught up with at once.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Protocol

from .answering import Answering
from .chat_format import Words
from .counted import counted
from .decoding import Array, Decoder
from .dialogue import Dialogue
from .dialogue_options import DialogueOptions
from .errors import EngineError
from .events import Event, Notice
from .questions import Question
from .session import NonFiniteOutputError, Session, Stream
from .sources.frame import Frame
from .sources.sampling import tolerance
from .speaking import Clock, Seen

WAITING_TURNS = 8  # that a live source may be ahead
GLANCE = 0.1  # seconds between looks at whether it is over


class FrameSource(Protocol):
    """What a conversation needs of a source; see `runtime.sources`."""

    @property
    def name(self) -> str: ...

    @property
    def live(self) -> bool: ...

    @property
    def fps(self) -> float | None: ...

    @property
    def ended(self) -> bool: ...

    @property
    def dropped(self) -> int: ...

    def read(self, timeout: float | None = None) -> Frame | None: ...


class Watcher:
    """Reads and encodes frames in a thread of its own, and hands out turns.

    A file waits for who asks; of a live source the newest turns are kept.

    Args:
        visual: name of the output that holds a frame's embeddings.
        clock: what `Frame.captured` was read from.

    Attributes:
        dropped: turns that a live source lost because nobody took them, or whose frames came too fast to be read.
        encoded: frames so far.
    """

    def __init__(self, stream: Stream, visual: str, source: FrameSource, turn: float, frames: int) -> None:
        self._stream = stream
        self._visual = visual
        self._source = source
        self._turn = turn
        self._frames = frames
        self._room = WAITING_TURNS if source.live else 1
        self._turns: deque[Seen] = deque()
        self._changed = threading.Condition()
        self._notices: deque[Notice] = deque()
        self._over = self._stopped = False
        self._error: BaseException | None = None
        self.dropped = self.encoded = 0
        self._thread = threading.Thread(target=self._watch, name="framestep-watcher", daemon=True)
        self._thread.start()

    def take(self) -> tuple[list[Seen], list[Notice]]:
        """The turns that wait, and what went wrong meanwhile; neither once the source has ended.

        Raises:
            FramestepError: what ended the source.
        """
        with self._changed:
            while not (self._turns or self._notices or self._over or self._stopped):
                self._changed.wait(GLANCE)
            turns = [] if self._stopped else list(self._turns)
            self._turns.clear()
            notices = list(self._notices)
            self._notices.clear()
            self._changed.notify_all()
            if not turns and not notices and self._error is not None:
                raise self._error
        return turns, notices

    def ask_to_stop(self) -> None:
        """Hand out no more turns, soon. For signal handlers: takes no lock."""
        self._stopped = True

    def stop(self) -> None:
        """End, and wait for the thread."""
        self.ask_to_stop()
        with self._changed:
            self._changed.notify_all()
        self._thread.join()

    def _watch(self) -> None:
        try:
            self._read()
        except BaseException as error:  # it belongs to whoever takes turns
            self._error = error
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def _read(self) -> None:
        number = last = -1
        skipped = self._source.dropped
        early = tolerance(self._source.fps)
        seen: list[Array] = []
        frame: Frame | None = None
        while not self._stopped:
            read = self._source.read(GLANCE)
            if read is None:
                if self._source.ended:
                    break
                continue
            at = max(0, int(read.timestamp / self._turn + 1e-6))
            if seen and frame is not None and at > number:  # it had fewer frames than it should
                self._put(number, seen, frame)
                last, seen = number, []
            if at == last and read.timestamp + early >= (at + 1) * self._turn:
                at += 1
            if at <= last:
                continue  # the turn has all the frames that it takes
            if not seen and self._source.dropped > skipped:
                with self._changed:
                    self.dropped += min(at - last - 1, self._source.dropped - skipped)
            skipped = self._source.dropped
            encoded = self._encode(read, at)
            if encoded is None:
                continue
            number, frame = at, read
            seen.append(encoded)
            if len(seen) == self._frames:
                self._put(number, seen, frame)
                last, seen = number, []
        if seen and frame is not None and not self._stopped:
            self._put(number, seen, frame)

    def _encode(self, frame: Frame, turn: int) -> Array | None:
        try:
            encoded = self._stream.step(frame.rgb)[self._visual]
        except NonFiniteOutputError as error:
            with self._changed:
                self._notices.append(Notice((turn + 1) * self._turn, f"frame {frame.index} left out: {error}"))
                self._changed.notify_all()
            return None
        self.encoded += 1
        return encoded

    def _put(self, number: int, visual: Sequence[Array], frame: Frame) -> None:
        start = number * self._turn
        seen = Seen(number, start, start + self._turn, tuple(visual), frame.captured, self._source.live)
        with self._changed:
            while len(self._turns) >= self._room and not self._source.live and not self._stopped:
                self._changed.wait(GLANCE)
            if len(self._turns) >= self._room and self._source.live:
                self._turns.popleft()
                self.dropped += 1
            self._turns.append(seen)
            self._changed.notify_all()


class Conversation:
    """Events of a conversation, one after the other; `ask` may be called meanwhile, from any thread.

    Args:
        session: of a bundle with a decoder that sees; one of its places is taken.
        source: opened at the rate that the model is to be shown; the caller closes it.
        options: see `DialogueOptions`.
        clock: seconds; that of the frames' `captured`.

    Raises:
        EngineError: the session has not loaded what is needed.
        FramestepError: options that do not fit the bundle, or one without a tokenizer.
    """

    def __init__(
        self,
        session: Session,
        source: FrameSource,
        options: DialogueOptions | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        options = options or DialogueOptions()
        manifest = session.bundle.manifest
        language = manifest.language
        if language is None or language.visual is None:
            what = "no language decoder" if language is None else "a decoder without eyes"
            raise EngineError(f"{session.bundle.path}: has {what}, so nobody can talk about a video with it")
        if language.visual not in session.outputs or not {language.embed, language.decoder, language.rebase} <= set(
            session.graphs
        ):
            raise EngineError("this session was loaded without the decoder; load(path) without outputs and graphs does")
        self._source = source
        self._turn, self._frames = options.turn, options.frames_a_turn(manifest)
        self._visual = language.visual
        words = Words(language, session.bundle.path)
        self.decides = words.decides
        self._stream = session.open_stream()
        try:
            kind = Dialogue if self.decides else Answering
            self.dialogue: Dialogue | Answering = kind(self._stream, manifest, words, options, clock)
        except BaseException:
            self._stream.close()
            raise
        self._watcher: Watcher | None = None
        self._stopping = False

    @property
    def decoder(self) -> Decoder:
        """What counts tokens, and what was forgotten."""
        return self.dialogue.decoder

    @property
    def dropped(self) -> int:
        """Turns of a live source that nobody saw."""
        return 0 if self._watcher is None else self._watcher.dropped

    def ask(self, question: str | Question) -> int:
        """Let a question stand; see `Dialogue.ask`."""
        return self.dialogue.ask(question)

    def questions(self) -> dict[int, str]:
        """What stands and what waits for its time, by number."""
        return self.dialogue.questions()

    def withdraw(self, number: int) -> bool:
        """Let a question stand no longer; see `Dialogue.withdraw`."""
        return self.dialogue.withdraw(number)

    def __iter__(self) -> Iterator[Event]:
        self._watcher = watcher = Watcher(self._stream, self._visual, self._source, self._turn, self._frames)
        dropped, end = 0, 0.0
        try:
            while not self._stopping:
                turns, notices = watcher.take()
                yield from notices
                if not turns:
                    if notices:
                        continue
                    for question in () if self._stopping else self.dialogue.unasked():
                        yield Notice(end, f"the source has ended; '{question.text}' was not asked")
                    return
                end = turns[-1].stop
                if (lost := watcher.dropped - dropped) > 0:
                    yield Notice(
                        turns[0].start, f"{counted(lost, 'turn')} dropped: the source is faster than the model"
                    )
                    dropped += lost
                yield from self.dialogue.take(turns)
        finally:
            watcher.stop()

    def ask_to_stop(self) -> None:
        """Let the events end soon, an answer with its next token; from any thread or a signal handler."""
        self._stopping = True
        self.dialogue.ask_to_stop()
        if self._watcher is not None:
            self._watcher.ask_to_stop()

    def close(self) -> None:
        """Give the place in the session back."""
        if self._watcher is not None:
            self._watcher.stop()
        self._stream.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
