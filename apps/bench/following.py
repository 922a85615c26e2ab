"""`framestep bench` on a bundle whose text attends to frames: what a token and a frame cost, and how old the newest is.

Beside it the other way to show frames to the same decoder: as tokens of its prompt, which is taken in again whenever
the frames are to be newer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...runtime.bundle import Bundle
from ...runtime.counted import counted
from ...runtime.decoding import Turn
from ...runtime.dialogue_options import DialogueOptions
from ...runtime.errors import FramestepError
from ...runtime.events import Answer, AnswerText, Asked, FrameShown, Spoken
from ...runtime.following import Following
from ...runtime.frame_ring import FrameRing
from ...runtime.session import Session
from ...runtime.sources.frame import Frame
from ...runtime.text_cache import TextCache
from .figures import Spread, make_folder, p50_p99_max, spread, write_figures
from .machine import Machine, examine_machine, resident

QUESTION = "What is happening?"
RATES = (1.0, 5.0, 10.0, 30.0)  # frames a second that arrive while answers are given
PICTURES = 4  # different frames, taken in turns
WARM_UP = 3
SHORTEST_S = 3.0  # that frames come before a question is asked, and while it is answered
MOST_ANSWERS = 20


@dataclass(frozen=True)
class PassedFigures:
    """When so many frames have passed.

    Attributes:
        token_ms, frame_ms: of a token of text and of a frame: p50, p95, p99 and max.
        resident_bytes: memory of this process.
    """

    frames: int
    token_ms: Spread
    frame_ms: Spread
    resident_bytes: int


@dataclass(frozen=True)
class RateFigures:
    """While frames arrive at a rate.

    Attributes:
        seen, dropped: frames encoded, and those that newer ones replaced.
        tokens: of all answers.
        first_token_ms: from a question to the first text, at the median.
        age_ms: from the capture of the newest frame that a token could see to the token: p50, p95, p99 and max.
    """

    rate: float
    seen: int
    dropped: int
    tokens: int
    tokens_a_second: float
    first_token_ms: float
    age_ms: Spread


@dataclass(frozen=True)
class PromptFigures:
    """Frames as tokens of the prompt of the same decoder.

    Attributes:
        frames: as many as the cache holds, at most the window.
        tokens: of these frames.
        refresh_ms: to take them in again.
        token_ms: of a token of text behind them: p50, p95, p99 and max.
    """

    frames: int
    tokens: int
    refresh_ms: float
    token_ms: Spread


@dataclass(frozen=True)
class FollowingReport:
    """What `framestep bench` found.

    Attributes:
        window: frames that text sees, `frame_tokens` those of each.
        prompt: None where the cache does not hold one frame.
        notes: what was not measured, and why.
    """

    bundle: str
    engine: str
    machine: Machine
    window: int
    frame_tokens: int
    capacity: int
    passed: tuple[PassedFigures, ...]
    rates: tuple[RateFigures, ...]
    prompt: PromptFigures | None
    notes: tuple[str, ...]

    def as_text(self) -> str:
        lines = [
            f"# {self.bundle}",
            "",
            f"{self.engine}; {self.machine.title()}.",
            "",
            f"Text sees {counted(self.window, 'frame')} of {counted(self.frame_tokens, 'token')};"
            f" its cache holds {self.capacity} more.",
            "",
            "| frames passed | token p50 / p99 / max, ms | frame p50 / p99 / max, ms | resident MB |",
            "| ---: | ---: | ---: | ---: |",
        ]
        for row in self.passed:
            memory = f"{row.resident_bytes / 1e6:.1f}"
            lines.append(f"| {row.frames} | {p50_p99_max(row.token_ms)} | {p50_p99_max(row.frame_ms)} | {memory} |")
        lines += [
            "",
            "| frames a second | encoded | dropped | tokens a second | first token, ms | age p50 / p99 / max, ms |",
            "| ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for at in self.rates:
            lines.append(
                f"| {at.rate:g} | {at.seen} | {at.dropped} | {at.tokens_a_second:.1f} | {at.first_token_ms:.1f} |"
                f" {p50_p99_max(at.age_ms)} |"
            )
        lines += ["", "Age: from the capture of the newest frame that a token could see to the token."]
        if self.prompt is not None:
            lines += [
                "",
                f"The other way, {counted(self.prompt.frames, 'frame')} as {counted(self.prompt.tokens, 'token')}"
                f" of the prompt: to show newer ones takes {self.prompt.refresh_ms:.1f} ms, each token then"
                f" {p50_p99_max(self.prompt.token_ms)} ms (p50 / p99 / max);"
                " in the same graph, so these pay for a cross-attention that sees nothing.",
            ]
        lines += ["", *self.notes] if self.notes else []
        return "\n".join(lines) + "\n"


class Ticker:
    """A live source: pictures of noise, `rate` a second by the clock."""

    name = "ticker"
    live = True
    fps: float | None = None

    def __init__(self, pictures: Sequence[np.ndarray], rate: float) -> None:
        self._pictures, self._rate = pictures, rate
        self._begun = time.perf_counter()
        self._next = 0
        self.dropped = 0
        self.ended = False

    def read(self, timeout: float | None = None) -> Frame | None:
        due = self._begun + self._next / self._rate
        now = time.perf_counter()
        if due > now:
            time.sleep(min(due - now, timeout or 0.0))
            now = time.perf_counter()
            if due > now:
                return None
        newest = int((now - self._begun) * self._rate)
        self.dropped += newest - self._next
        self._next = newest + 1
        captured = self._begun + newest / self._rate
        return Frame(self._pictures[newest % len(self._pictures)], newest, newest / self._rate, captured)


def bench_following(
    bundle: Bundle,
    output: Path,
    frames: Sequence[int],
    samples: int,
    engine: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> FollowingReport:
    """Measure, and write `report.json` and `report.md` into `output`.

    Args:
        frames: numbers of frames that have passed when a token is measured, ascending.
        samples: tokens that each figure is taken of, and frames as far as there are so many since the one before.

    Raises:
        FramestepError: the text of the bundle does not attend to frames, or the folder cannot be written.
    """
    language = bundle.manifest.language
    if language is None or language.cross is None:
        raise FramestepError(f"{bundle.path}: its text does not attend to frames")
    make_folder(output)
    machine, notes = examine_machine(), []
    generator = np.random.default_rng(0)
    with Session(bundle, engine, device, 1, None, threads) as session:
        shape = (session.frame.height, session.frame.width, 3)
        pictures = [generator.integers(0, 256, shape, np.uint8) for _ in range(PICTURES)]
        passed = _passed(session, pictures, frames, samples, progress)
        prompt = _prompt(session, samples)
        if prompt is None:
            notes.append("The cache does not hold one frame as tokens, so the other way was not measured.")
        found = []
        for rate in RATES:
            try:
                found.append(_at_rate(session, pictures, rate, samples))
                progress(f"{counted(rate, 'frame')} a second: {found[-1].tokens_a_second:.1f} tokens a second")
            except FramestepError as error:
                notes.append(f"{counted(rate, 'frame')} a second was not measured: {error}")
        with session.open_stream() as stream:
            ring = FrameRing(stream, session.bundle.manifest, session.preprocess)
            capacity = TextCache(stream, session.bundle.manifest, ring).capacity
        report = FollowingReport(
            bundle=bundle.path.name,
            engine=session.engine_choice,
            machine=machine,
            window=ring.window,
            frame_tokens=_frame_tokens(session),
            capacity=capacity,
            passed=passed,
            rates=tuple(found),
            prompt=prompt,
            notes=tuple(notes),
        )
    write_figures(report, output)
    return report


def _passed(
    session: Session,
    pictures: Sequence[np.ndarray],
    numbers: Sequence[int],
    samples: int,
    progress: Callable[[str], None],
) -> tuple[PassedFigures, ...]:
    """A token and a frame when more and more frames have passed while nothing was said."""
    figures, count = [], 0
    with session.open_stream() as stream:
        ring = FrameRing(stream, session.bundle.manifest, session.preprocess)
        cache = TextCache(stream, session.bundle.manifest, ring)
        _tokens(cache, WARM_UP)
        for number in numbers:
            frame_ms = []
            while count < number:
                picture = pictures[count % PICTURES]
                begun = time.perf_counter()
                cache.see(Frame(picture, count, float(count), begun), at_once=True)
                frame_ms.append((time.perf_counter() - begun) * 1e3)
                cache.shown.clear()
                cache.moves.clear()
                count += 1
            token_ms = _tokens(cache, samples)
            progress(f"{counted(number, 'frame')}: {np.median(token_ms):.2f} ms a token")
            figures.append(PassedFigures(number, spread(token_ms), spread(frame_ms[-samples:]), resident().now))
    return tuple(figures)


def _prompt(session: Session, samples: int) -> PromptFigures | None:
    """The decoder shown frames as tokens, with nothing in the ring."""
    N = _frame_tokens(session)
    with session.open_stream() as stream:
        ring = FrameRing(stream, session.bundle.manifest, session.preprocess)
        cache = TextCache(stream, session.bundle.manifest, ring)
        frames = min(ring.window, (cache.capacity - samples) // N)
        if frames < 1:
            return None
        hidden = cache.text(Turn(), [0]).embeddings.shape[1]
        visual = np.random.default_rng(0).normal(0, 0.02, (N, hidden)).astype(np.float32)
        refresh = []
        for _ in range(WARM_UP):
            cache.reset()
            turn = Turn(pinned=True)
            begun = time.perf_counter()
            cache.take([cache.picture(turn, visual) for _ in range(frames)])
            refresh.append((time.perf_counter() - begun) * 1e3)
        return PromptFigures(frames, frames * N, round(float(np.median(refresh)), 4), spread(_tokens(cache, samples)))


def _tokens(cache: TextCache, count: int) -> list[float]:
    """Milliseconds of each of some tokens, which are forgotten again."""
    turn, milliseconds = Turn(), []
    for _ in range(count):
        begun = time.perf_counter()
        cache.take([cache.text(turn, [0])])
        milliseconds.append((time.perf_counter() - begun) * 1e3)
    cache.forget(turn)
    return milliseconds


def _at_rate(session: Session, pictures: Sequence[np.ndarray], rate: float, samples: int) -> RateFigures:
    """Answers while frames arrive, until there are `samples` tokens."""
    ticker = Ticker(pictures, rate)
    options = DialogueOptions(rate=rate, max_tokens=samples, temperature=1.0)  # of random weights the likeliest is dull
    ages: list[float] = []
    first: list[float] = []
    asked = text = 0.0
    tokens, seconds, seen = 0, 0.0, 0
    with Following(session, ticker, options) as following:
        following.ask(QUESTION)
        begun = time.perf_counter()
        for event in following:
            now = time.perf_counter()
            if isinstance(event, Asked):
                asked, text = now, 0.0
            elif isinstance(event, AnswerText):
                if not text:
                    text = now
                    first.append((now - asked) * 1e3)
                if isinstance(event, Spoken):
                    ages.append(event.age * 1e3)
            elif isinstance(event, FrameShown):
                seen += 1
            elif isinstance(event, Answer):
                tokens, seconds = tokens + event.tokens, seconds + event.seconds
                enough = tokens >= samples and now - begun > SHORTEST_S
                if enough or len(first) >= MOST_ANSWERS:
                    break
                following.ask(QUESTION)
        return RateFigures(
            rate,
            seen,
            ticker.dropped,
            tokens,
            round(tokens / seconds, 4) if seconds else 0.0,
            round(float(np.median(first)), 4) if first else 0.0,
            spread(ages),
        )


def _frame_tokens(session: Session) -> int:
    grid = session.bundle.manifest.grid
    assert grid is not None
    return grid[0] * grid[1]
