"""`framestep chat`: a conversation about what a camera or a video shows, as a transcript.

Questions stand from the beginning (`--ask`) or come as lines of standard input while it goes on; lines that begin with
`/` list them and withdraw them.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..runtime.bundle import Bundle
from ..runtime.conversation import Conversation
from ..runtime.converse import ASKED, open_conversation
from ..runtime.counted import counted
from ..runtime.dialogue_options import DialogueOptions
from ..runtime.errors import FramestepError, OutputError
from ..runtime.events import Answer, AnswerText, Asked, Decision, Event, Notice, Withdrawn
from ..runtime.following import Following
from ..runtime.session import Session
from ..runtime.sources import at_home, open_source
from .latency import Latencies, Percentiles
from .output_places import check_outside_bundles, check_writable, identity
from .record import JsonLines
from .stopping import Stopping, stop_on_signals

Report = Callable[[str], None]
# what would move a terminal's cursor or clear it: control characters, but for the ends of lines and tabs
SHOWN = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
NOTHING_ASKED = "no question stands: nothing is decided until one is asked, by --ask or as a line here"
COMMANDS = (
    "/questions lists what was asked, /forget N withdraws question N;"
    " a question that begins with / needs a space before it"
)


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What `framestep chat` was asked for; see its help."""

    bundle: Path
    source: str
    questions: tuple[str, ...] = ()
    output: Path | None = None
    max_turns: int | None = None
    dialogue: DialogueOptions = field(default_factory=DialogueOptions)
    engine: str = "auto"
    device: str = "auto"
    threads: int | None = None
    precision: str = "auto"


@dataclass(frozen=True)
class ChatSummary:
    """What became of a conversation.

    Attributes:
        states: how often each was decided.
        decision_ms: from the turn's being taken to its decision.
        lag_ms: from the capture of a turn's last frame to its decision; zeros for files.
        first_token_ms: from that capture to an answer's first token.
        taken: tokens that went through the decoder.
        pruned: visual tokens left out.
        dropped: turns of a live source that nobody saw.
        forgotten: turns that had to make room, `rebased` how often positions were brought down.
    """

    bundle: str
    engine: str
    stopped: str
    turns: int
    states: dict[str, int]
    answers: int
    answer_tokens: int
    decision_ms: Percentiles
    lag_ms: Percentiles
    first_token_ms: Percentiles
    taken: int
    pruned: int
    dropped: int
    forgotten: int
    rebased: int
    output: str | None
    errors: list[str]

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        for name in ("decision_ms", "lag_ms", "first_token_ms"):
            values[name] = getattr(self, name).as_dict()
        return values

    def as_text(self) -> str:
        states = ", ".join(f"{count} {state}" for state, count in self.states.items()) or "none decided"
        answers = f"{counted(self.answers, 'answer')} of {counted(self.answer_tokens, 'token')}"
        lines = [f"{answers} ({self.stopped})"]  # of a model that is asked: it decides nothing
        if self.turns:
            lines = [f"{counted(self.turns, 'turn')} ({self.stopped}): {states}; {answers}"]
            lines.append(f"decision   {_spread(self.decision_ms)}")
        if self.answers:
            lines.append(f"first word {_spread(self.first_token_ms)} after the frame")
        if self.lag_ms.max:
            lines.append(f"lag        {_spread(self.lag_ms)}")
        lines += [
            f"memory     {counted(self.taken, 'token')} taken in, {self.pruned} pruned,"
            f" {counted(self.forgotten, 'turn')} forgotten, re-based {counted(self.rebased, 'time')},"
            f" {counted(self.dropped, 'turn')} dropped",
            f"engine     {self.engine}",
        ]
        if self.output:
            lines.append(f"events     {self.output}")
        return "\n".join(lines)


class Transcript:
    """A readable transcript: a line when the state changes, answers as they grow. Any thread may write."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._state = ""
        self._open = False  # a line is not ended yet
        self._lock = threading.RLock()

    def list_questions(self, questions: Mapping[int, str]) -> None:
        """Show what was asked, by number."""
        with self._lock:
            for number, text in questions.items():
                self.reply(f"{number}: {text}")
            if not questions:
                self.reply("there are no questions")

    def reply(self, text: str) -> None:
        """Show what a command gave."""
        with self._lock:
            self.end_line()
            self._write(f"{'':10}  {text.translate(SHOWN)}\n")

    def show(self, event: Event) -> None:
        with self._lock:
            self._show(event)

    def _show(self, event: Event) -> None:
        if isinstance(event, AnswerText):
            if not self._open:
                self._write(f"{event.time:8.1f} s  ")
                self._open = True
            self._write(event.text.translate(SHOWN))
            return
        self.end_line()
        if isinstance(event, Asked):
            self._line(event, f"? {event.text}")
        elif isinstance(event, Withdrawn):
            self._line(event, f"? withdrawn: {event.text}")
        elif isinstance(event, Notice):
            self._line(event, f"! {event.text}")
        elif isinstance(event, Decision):
            if event.state != self._state or event.state == "response":
                lag = "" if event.lag is None else f" (lag {event.lag:.2f} s)"
                self._line(event, f"[{event.state}]{lag}")
            self._state = event.state
        elif isinstance(event, Answer) and event.reason != "stop":
            self._line(event, f"! the answer was cut off: {event.reason}")

    def end_line(self) -> None:
        with self._lock:
            if self._open:
                self._write("\n")
                self._open = False

    def _line(self, event: Event, text: str) -> None:
        self._write(f"{event.time:8.1f} s  {text.translate(SHOWN)}\n")


def chat(options: ChatOptions, write: Callable[[str], None], report: Report, lines: Iterable[str] = ()) -> ChatSummary:
    """Talk about a source until it ends, `max_turns` were taken, or the user stops it.

    Args:
        write: takes pieces of the transcript.
        report: takes a line about what went wrong and was survived.
        lines: questions and commands that come meanwhile; read in a thread of their own.

    Raises:
        FramestepError: an option, a question, a file or the source is unusable.
    """
    if options.output is not None:
        check_outside_bundles(options.output, "--output")
        check_writable(options.output, "--output")
        if identity(options.output) == identity(at_home(options.source)):
            raise OutputError(f"--output {options.output}: is also the file of --source; name another")
    bundle = Bundle.open(options.bundle)
    with ExitStack() as stack:
        session = stack.enter_context(
            Session(bundle, options.engine, options.device, 1, None, options.threads, options.precision)
        )
        rate = options.dialogue.frames_a_second(session.bundle.manifest)
        opening = _Opening(options.source, rate, report)
        stack.callback(opening.close)  # after the conversation, whose thread reads it
        conversation = open_conversation(session, opening, options.dialogue)
        stack.callback(conversation.close)
        if options.max_turns is not None and not conversation.decides:
            raise FramestepError("--max-turns: this model is asked and decides nothing turn by turn; leave it out")
        for question in options.questions:
            conversation.ask(question)
        session.warm_up(1)
        opening.open()
        stopping = stack.enter_context(stop_on_signals(conversation.ask_to_stop))
        events = None if options.output is None else JsonLines(options.output)
        if events is not None:
            stack.callback(events.close)
        talk = _Talk(options, session, conversation, Transcript(write), events, report)
        if not conversation.decides:
            talk.take(Notice(0.0, ASKED))
        elif not options.questions:
            talk.take(Notice(0.0, NOTHING_ASKED))
        threading.Thread(target=talk.listen, args=(iter(lines),), daemon=True).start()
        return talk.to_end(stopping)


class _Opening:
    """The source, which is opened when all else has proved usable: a camera is not started for nothing."""

    def __init__(self, spec: str, rate: float, report: Report) -> None:
        self._spec, self._rate, self._report = spec, rate, report
        self._source: Any = None

    def open(self) -> None:
        self._source = open_source(self._spec, rate=self._rate, on_report=self._report)

    def close(self) -> None:
        if self._source is not None:
            self._source.close()

    @property
    def live(self) -> bool:
        return bool(self._source.live)

    @property
    def fps(self) -> float | None:
        return self._source.fps

    @property
    def ended(self) -> bool:
        return bool(self._source.ended)

    @property
    def name(self) -> str:
        return str(self._source.name)

    @property
    def dropped(self) -> int:
        return int(self._source.dropped)

    def read(self, timeout: float | None = None) -> Any:
        return self._source.read(timeout)


class _Talk:
    def __init__(
        self,
        options: ChatOptions,
        session: Session,
        conversation: Conversation | Following,
        transcript: Transcript,
        events: JsonLines | None,
        report: Report,
    ) -> None:
        self._options = options
        self._session = session
        self._conversation = conversation
        self._transcript = transcript
        self._events = events
        self._output = events
        self._report = report
        self._errors: list[str] = []
        self._states: Counter[str] = Counter()
        self._decisions, self._lags, self._first = Latencies(), Latencies(), Latencies()
        self._turns = self._answers = self._answer_tokens = self._pruned = 0

    def listen(self, lines: Iterator[str]) -> None:
        """Ask every line, or do what it says."""
        for line in lines:
            if not line.strip():
                continue
            try:
                if line.startswith("/"):
                    self._obey(line)
                else:
                    self._conversation.ask(line)
            except FramestepError as error:
                self._report(str(error))
            except OSError:  # nobody reads the transcript any more, which ends the conversation too
                return

    def _obey(self, line: str) -> None:
        command, *rest = line.split()
        if command == "/questions" and not rest:
            self._transcript.list_questions(self._conversation.questions())
        elif command == "/forget" and len(rest) == 1 and rest[0].isdecimal():
            number = int(rest[0])
            text = self._conversation.questions().get(number)
            if not self._conversation.withdraw(number):
                self._transcript.reply(f"withdrawn before it was asked: {text}")
        else:
            raise FramestepError(f"'{line.strip()}' is no command: {COMMANDS}")

    def to_end(self, stopping: Stopping) -> ChatSummary:
        stopped = "the source ended"
        for event in self._conversation:
            self.take(event)
            if isinstance(event, Decision) and self._options.max_turns and self._turns >= self._options.max_turns:
                stopped = "reached --max-turns"
                if event.state != "response":
                    break
            if isinstance(event, Answer) and stopped == "reached --max-turns":
                break
        self._transcript.end_line()
        return self._summary("stopped by user" if stopping.asked else stopped)

    def take(self, event: Event) -> None:
        self._transcript.show(event)
        if isinstance(event, Decision):
            self._turns += 1
            self._pruned += event.pruned
            self._decisions.add(event.seconds * 1e3)
            if event.probabilities is not None:
                self._states[event.state] += 1
            if event.lag is not None:
                self._lags.add(event.lag * 1e3)
        elif isinstance(event, Answer):
            self._answers += 1
            self._answer_tokens += event.tokens
            if event.first_token is not None:
                self._first.add(event.first_token * 1e3)
        if self._events is not None:
            try:
                self._events.write({"event": type(event).__name__, **asdict(event)})
            except OutputError as error:
                self._errors.append(str(error))
                self._report(str(error))
                self._events = None

    def _summary(self, stopped: str) -> ChatSummary:
        decoder = self._conversation.decoder
        return ChatSummary(
            bundle=str(self._options.bundle),
            engine=self._session.engine_choice,
            stopped=stopped,
            turns=self._turns,
            states=dict(self._states),
            answers=self._answers,
            answer_tokens=self._answer_tokens,
            decision_ms=self._decisions.overall(),
            lag_ms=self._lags.overall(),
            first_token_ms=self._first.overall(),
            taken=decoder.taken,
            pruned=self._pruned,
            dropped=self._conversation.dropped,
            forgotten=decoder.forgotten,
            rebased=decoder.rebased,
            output=next((str(path) for path in self._output.files()), None) if self._output else None,
            errors=self._errors,
        )


def _spread(milliseconds: Percentiles) -> str:
    return f"p50 {milliseconds.p50:.1f}  p99 {milliseconds.p99:.1f}  max {milliseconds.max:.1f} ms"


def standard_input() -> Iterator[str]:
    """Lines of standard input, as long as there are any and it can be read.

    Read past Python's own buffer: a thread that waits in there keeps the interpreter from ending.
    """
    try:
        descriptor = sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):  # there is none, or it is not a file
        yield from sys.stdin or ()
        return
    rest = b""
    while data := _read_some(descriptor):
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in lines)
    yield rest.decode("utf-8", "replace")


def _read_some(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:  # as another program may have left it
        select.select([descriptor], [], [])
        return _read_some(descriptor)
    except OSError:  # a terminal that was closed, a folder
        return b""
