"""`framestep bench` on a bundle with a decoder: what a turn costs, from the first to the last asked for.

Turns are silent, so that each has the same work; frames are noise. With `cut` beside `slots` the report shows what
the other way of forgetting costs on the same turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...runtime.bundle import Bundle
from ...runtime.chat_format import Words
from ...runtime.counted import counted
from ...runtime.dialogue import Dialogue
from ...runtime.dialogue_options import NEVER, DialogueOptions
from ...runtime.errors import FramestepError
from ...runtime.events import Answer, Decision
from ...runtime.session import Session, Stream
from ...runtime.speaking import Seen
from .figures import Spread, make_folder, p50_p99_max, spread, write_figures
from .machine import Machine, examine_machine, resident

SYSTEM = "You watch."
QUESTION = "What happens?"
FRAMES = 4  # different frames, taken in turns
WARM_UP = 3
MOST_CUT = 2000  # turns; with `cut` each of them takes in a whole cache


@dataclass(frozen=True)
class TurnFigures:
    """The turns up to and with number `turn`, the first being 1.

    Attributes:
        turns: how many of them these figures are of.
        decision_ms: from a turn's being taken to its decision: p50, p95, p99 and max.
        tokens: that went through the decoder for each, at the median; `steps` the runs of its graph.
        used: slots of the cache in use.
        resident_bytes: memory of this process.
    """

    turn: int
    turns: int
    decision_ms: Spread
    tokens: float
    steps: float
    used: int
    resident_bytes: int


@dataclass(frozen=True)
class DialogueReport:
    """What `framestep bench` found.

    Attributes:
        frame_tokens: of a frame, `capacity` those of the cache.
        encode_ms: of a frame: p50, p95, p99 and max.
        slots, cut: figures of turns, by what a full cache does.
        forgotten, rebased: turns forgotten and re-basings, with `slots`.
        tokens_a_second: of answers, with the cache as full as it was at the last turn.
        first_token_ms: from the decision to answer to the first token.
    """

    bundle: str
    engine: str
    machine: Machine
    frame_tokens: int
    capacity: int
    encode_ms: Spread
    slots: tuple[TurnFigures, ...]
    cut: tuple[TurnFigures, ...]
    forgotten: int
    rebased: int
    tokens_a_second: float
    first_token_ms: float

    def as_text(self) -> str:
        lines = [
            f"# {self.bundle}",
            "",
            f"{self.engine}; {self.machine.title()}.",
            "",
            f"A frame has {counted(self.frame_tokens, 'token')}, the cache holds {self.capacity}."
            f" Encoding a frame: {p50_p99_max(self.encode_ms)} ms (p50 / p99 / max)."
            f" Answers: {self.tokens_a_second:.1f} tokens a second, the first {self.first_token_ms:.1f} ms after the"
            f" decision. Turns forgotten: {self.forgotten}; positions brought down: {counted(self.rebased, 'time')}.",
            "",
            "| when full | turn | decision p50 / p99 / max, ms | tokens | steps | slots used | resident MB |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for name, rows in (("slots", self.slots), ("cut", self.cut)):
            for row in rows:
                lines.append(
                    f"| {name} | {row.turn} | {p50_p99_max(row.decision_ms)} | {row.tokens:g} | {row.steps:g} |"
                    f" {row.used} | {row.resident_bytes / 1e6:.1f} |"
                )
        return "\n".join(lines) + "\n"


def bench_dialogue(
    bundle: Bundle,
    output: Path,
    turns: Sequence[int],
    samples: int,
    engine: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> DialogueReport:
    """Measure, and write `report.json` and `report.md` into `output`.

    Args:
        turns: numbers of the turns to measure at, ascending, the first being 1.
        samples: turns that each figure is taken of, as far as there are so many since the one before.

    Raises:
        FramestepError: the bundle cannot be talked with, or the folder not be written.
    """
    manifest = bundle.manifest
    if manifest.language is None or manifest.language.visual is None or manifest.language.cross is not None:
        raise FramestepError(
            f"{bundle.path}: has no decoder that is shown frames as tokens; there are no turns to measure"
        )
    words = Words(manifest.language, bundle.path)
    if not words.decides:
        raise FramestepError(f"{bundle.path}: does not decide when to speak; there are no turns to measure")
    make_folder(output)
    machine = examine_machine()
    with Session(bundle, engine, device, 1, None, threads) as session, session.open_stream() as stream:
        manifest = session.bundle.manifest
        visual, encode_ms = _encode(session, stream, max(samples, FRAMES))
        silent = DialogueOptions(system=SYSTEM, response_from=NEVER, standby_from=NEVER)
        rows: dict[str, tuple[TurnFigures, ...]] = {}
        for eviction in ("cut", "slots"):
            dialogue = Dialogue(stream, manifest, words, replace(silent, eviction=eviction))
            dialogue.ask(QUESTION)
            numbers = [number for number in turns if eviction == "slots" or number <= MOST_CUT]
            rows[eviction] = _turns(dialogue, visual, numbers, samples, progress)
        talkative = Dialogue(stream, manifest, words, DialogueOptions(system=SYSTEM, response_from=0.0, max_tokens=64))
        talkative.ask(QUESTION)
        speed, first = _answers(talkative, visual)
        report = DialogueReport(
            bundle=bundle.path.name,
            engine=session.engine_choice,
            machine=machine,
            frame_tokens=len(visual[0]),
            capacity=dialogue.decoder.capacity,
            encode_ms=encode_ms,
            slots=rows["slots"],
            cut=rows["cut"],
            forgotten=dialogue.decoder.forgotten,
            rebased=dialogue.decoder.rebased,
            tokens_a_second=speed,
            first_token_ms=first,
        )
    write_figures(report, output)
    return report


def _encode(session: Session, stream: Stream, samples: int) -> tuple[list[np.ndarray], Spread]:
    """What the model sees of some frames, and milliseconds of a frame."""
    generator = np.random.default_rng(0)
    height, width = session.frame.height, session.frame.width
    frames = [generator.integers(0, 256, (height, width, 3), np.uint8) for _ in range(FRAMES)]
    session.warm_up(WARM_UP)
    assert session.bundle.manifest.language is not None
    name = session.bundle.manifest.language.visual
    assert name is not None
    visual, milliseconds = [], []
    for number in range(samples):
        begun = time.perf_counter()
        seen = stream.step(frames[number % FRAMES])[name]
        milliseconds.append((time.perf_counter() - begun) * 1e3)
        if number < FRAMES:
            visual.append(seen)
    return visual, spread(milliseconds)


def _turns(
    dialogue: Dialogue, visual: list[np.ndarray], numbers: Sequence[int], samples: int, progress: Callable[[str], None]
) -> tuple[TurnFigures, ...]:
    figures, begun = [], 0
    for number in numbers:
        first = max(begun, number - samples)
        milliseconds, tokens, steps = [], [], []
        for turn in range(begun, number):
            taken, ran = dialogue.decoder.taken, dialogue.decoder.steps
            start = float(turn)
            seen = Seen(turn, start, start + 1.0, (visual[turn % FRAMES],), time.perf_counter())
            (decision,) = (event for event in dialogue.take([seen]) if isinstance(event, Decision))
            if turn >= first:
                milliseconds.append(decision.seconds * 1e3)
                tokens.append(dialogue.decoder.taken - taken)
                steps.append(dialogue.decoder.steps - ran)
        begun = number
        progress(f"turn {number}: {dialogue.decoder.used} slots in use")
        figures.append(
            TurnFigures(
                number,
                len(milliseconds),
                spread(milliseconds),
                float(np.median(tokens)),
                float(np.median(steps)),
                dialogue.decoder.used,
                resident().now,
            )
        )
    return tuple(figures)


def _answers(dialogue: Dialogue, visual: list[np.ndarray]) -> tuple[float, float]:
    """Tokens a second of a few answers, and milliseconds to the first token."""
    answers = []
    for turn in range(FRAMES):
        seen = Seen(turn, float(turn), turn + 1.0, (visual[turn],), time.perf_counter())
        decided = 0.0
        for event in dialogue.take([seen]):
            if isinstance(event, Decision):
                decided = event.seconds
            elif isinstance(event, Answer):
                answers.append((event, decided))
    spoken = [(answer, decided) for answer, decided in answers if answer.tokens > 0]
    if not spoken:
        return 0.0, 0.0
    seconds = sum(answer.seconds for answer, _ in spoken)
    first = [1e3 * ((answer.first_token or 0.0) - decided) for answer, decided in spoken]
    return sum(answer.tokens for answer, _ in spoken) / seconds, float(np.median(first))
