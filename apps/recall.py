"""`framestep recall`: whether a model still decides when to speak as it did, with other weights or fewer tokens.

In both dialogues every turn is said to have been silent, so that both see the same history, and what each would have
decided is noted. Silence is most of what a model decides, so agreement says little: each state is judged by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..runtime.bundle import Bundle
from ..runtime.chat_format import STATES, decides
from ..runtime.conversation import Conversation
from ..runtime.counted import counted
from ..runtime.decoding import visual_tokens
from ..runtime.dialogue import choose_state
from ..runtime.dialogue_options import NEVER, DialogueOptions
from ..runtime.errors import FramestepError
from ..runtime.events import Decision
from ..runtime.session import Session
from ..runtime.sources import open_source

PERIOD_S = 10.0  # between two lines about how far it is

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class RecallOptions:
    """What `framestep recall` was asked for; see its help."""

    bundle: Path
    source: str
    questions: tuple[str, ...]
    against: Path | None = None
    max_turns: int | None = None
    dialogue: DialogueOptions = field(default_factory=DialogueOptions)
    engine: str = "auto"
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class StateRecall:
    """One state.

    Attributes:
        reference: turns in which the reference takes it; `found` those in which the bundle does, `both` both.
        recall: both / reference; None where the reference never takes it.
    """

    state: str
    reference: int
    found: int
    both: int

    @property
    def recall(self) -> float | None:
        return self.both / self.reference if self.reference else None


@dataclass(frozen=True)
class RecallReport:
    """What changed.

    Attributes:
        turns: that both decided.
        states: each by itself.
        agreement: share of the turns that are decided alike.
        moved_mean, moved_max: of the probability to answer.
        pruned: visual tokens that the bundle's dialogue left out, of `visual` that as many whole turns have.
    """

    bundle: str
    against: str
    turns: int
    states: tuple[StateRecall, ...]
    agreement: float
    moved_mean: float
    moved_max: float
    pruned: int
    visual: int

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "states": [{**asdict(state), "recall": state.recall} for state in self.states]}

    def as_text(self) -> str:
        lines = ["state     reference  found  both  recall"]
        for state in self.states:
            share = "-" if state.recall is None else f"{state.recall:.3f}"
            lines.append(f"{state.state:<9} {state.reference:9} {state.found:6} {state.both:5} {share:>7}")
        lines.append(
            f"{counted(self.turns, 'turn')}, {self.agreement:.1%} decided alike; probability to answer moved by"
            f" {self.moved_mean:.4f}, at most {self.moved_max:.4f}"
        )
        if self.pruned:
            lines.append(f"{self.pruned} of {self.visual} visual tokens left out ({self.pruned / self.visual:.0%})")
        return "\n".join(lines)


def recall(options: RecallOptions, progress: Progress = lambda line: None) -> RecallReport:
    """Show a video to two models, or to one with all and with fewer tokens.

    Args:
        progress: takes a line now and then about how far it is.

    Raises:
        FramestepError: an option, a bundle or the source is unusable.
    """
    if options.against is None and options.dialogue.prune is None:
        raise FramestepError("recall: nothing to compare; give --against REFERENCE.bundle, --prune, or both")
    if not options.questions:
        raise FramestepError("recall: nothing is decided as long as no question stands; give --ask")
    whole = replace(options.dialogue, prune=None)
    found, visual = _decisions(options, options.bundle, options.dialogue, progress)
    reference, _ = _decisions(options, options.against or options.bundle, whole, progress)
    return compare(str(options.bundle), str(options.against or options.bundle), reference, found, visual)


def compare(
    bundle: str, against: str, reference: Sequence[Decision], found: Sequence[Decision], visual: int = 0
) -> RecallReport:
    """What became of the reference's decisions, turn by turn.

    Args:
        visual: visual tokens of as many turns as `found`, pruned ones with them.

    Raises:
        FramestepError: they have no turn in common.
    """
    first, second = ({decision.turn: decision for decision in given} for given in (reference, found))
    turns = sorted(first.keys() & second.keys())
    if not turns:
        raise FramestepError("recall: no turn was decided; is the source empty?")
    pairs = [(_free(first[turn]), _free(second[turn])) for turn in turns]
    moved = np.abs([_response(first[turn]) - _response(second[turn]) for turn in turns])
    states = tuple(
        StateRecall(
            state,
            sum(a == state for a, _ in pairs),
            sum(b == state for _, b in pairs),
            sum(a == b == state for a, b in pairs),
        )
        for state in STATES
    )
    agreement = sum(a == b for a, b in pairs) / len(pairs)
    pruned = sum(decision.pruned for decision in found)
    return RecallReport(
        bundle, against, len(turns), states, agreement, float(moved.mean()), float(moved.max()), pruned, visual
    )


def _decisions(
    options: RecallOptions, path: Path, dialogue: DialogueOptions, progress: Progress
) -> tuple[list[Decision], int]:
    """What is decided in each turn, all said to be silent, and the visual tokens that there were."""
    silent = replace(dialogue, response_from=NEVER, standby_from=NEVER, max_tokens=1)
    bundle = Bundle.open(path)
    language = bundle.manifest.language
    if language is not None and not decides(language):
        raise FramestepError(f"{path}: does not decide when to speak; there is nothing to compare")
    progress(f"showing {options.source} to {path}" + (f", pruned at {dialogue.prune:g}" if dialogue.prune else ""))
    with (
        Session(bundle, options.engine, options.device, 1, None, options.threads) as session,
        open_source(options.source, rate=dialogue.frames_a_second(bundle.manifest)) as source,
    ):
        if source.live:
            raise FramestepError(f"source {source.name}: is live; only a file can be shown to two models alike")
        with Conversation(session, source, silent) as conversation:
            for question in options.questions:
                conversation.ask(question)
            found = []
            due = time.monotonic() + PERIOD_S
            for event in conversation:
                if isinstance(event, Decision) and event.probabilities is not None:
                    found.append(event)
                    if time.monotonic() >= due:
                        progress(f"{path}: {counted(len(found), 'turn')} decided")
                        due = time.monotonic() + PERIOD_S
                    if len(found) == options.max_turns:
                        break
            manifest = session.bundle.manifest
            return found, len(found) * dialogue.frames_a_turn(manifest) * visual_tokens(manifest)


def _free(decision: Decision) -> str:
    """The likeliest state."""
    assert decision.probabilities is not None
    return choose_state(decision.probabilities)


def _response(decision: Decision) -> float:
    assert decision.probabilities is not None
    return decision.probabilities["response"]
