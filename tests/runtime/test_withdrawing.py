"""Questions that are withdrawn: what no token sees any longer, what stays, and what room they give back."""

from __future__ import annotations

import decoder_models
import dialogue_models
import golden
import numpy as np
import pytest
import torch
from dialogue_models import END, FRAME, SILENCE, START, Oracle, Recorded

import framestep
from framestep.runtime.answering import Answering
from framestep.runtime.chat_format import Words
from framestep.runtime.dialogue import Dialogue
from framestep.runtime.dialogue_options import DialogueOptions
from framestep.runtime.errors import FramestepError
from framestep.runtime.events import Asked, Decision, Withdrawn
from framestep.runtime.questions import Question
from framestep.runtime.speaking import Seen

SYSTEM = "You watch."
CAPACITY = 320


@pytest.fixture(scope="module")
def model():
    return decoder_models.qwen2_5_vl()


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    return dialogue_models.export(model, tmp_path_factory.mktemp("withdrawing"), capacity=CAPACITY)


@pytest.fixture
def stream(bundle):
    with framestep.load(bundle.path) as session:
        yield session.open_stream()


class Silent:
    """A stream whose decoder is silent."""

    def __init__(self, stream):
        self.stream = stream

    def run(self, graph, inputs):
        found = self.stream.run(graph, inputs)
        if graph == "decoder":
            found["logits"][SILENCE] = 1e6
        return found


def turns(stream, count: int) -> list[Seen]:
    generator = np.random.default_rng(0)
    visual = [stream.step(generator.integers(0, 256, (*FRAME, 3), np.uint8))["visual"] for _ in range(count)]
    return [Seen(number, float(number), number + 1.0, (one,), 0.0) for number, one in enumerate(visual)]


def dialogue_of(stream, bundle, **options) -> Dialogue:
    words = Words(bundle.manifest.language, bundle.path)
    return Dialogue(stream, bundle.manifest, words, DialogueOptions(system=SYSTEM, **options))


def play(dialogue, seen) -> list:
    return [event for turn in seen for event in dialogue.take([turn])]


class Letters:
    """Which letters the decoder's last step could see, found by their embeddings."""

    def __init__(self, stream, model):
        self.stream, self.table = stream, model.get_input_embeddings().weight.detach().numpy()
        self.slots: dict[int, int] = {}  # token in a slot; -1 for what a frame shows
        self.seen: list[int] = []

    def run(self, graph, inputs):
        if graph == "decoder":
            at = int(inputs["write_index"])
            new = range(at, at + len(inputs["embeddings"]))
            for slot, row in zip(new, inputs["embeddings"], strict=True):
                far = np.abs(self.table - row).max(axis=1)
                self.slots[slot] = int(far.argmin()) if far.min() < 1e-6 else -1
            visible = {*inputs["slot_mask"].nonzero()[0].tolist(), *new}
            self.seen = [self.slots[slot] for slot in visible]
        return self.stream.run(graph, inputs)

    def count(self, letter: str) -> int:
        (token,) = dialogue_models.byte_tokenizer().encode(letter, add_special_tokens=False).ids
        return self.seen.count(token)


def test_a_withdrawn_question_is_masked_and_all_else_is_what_a_plain_decoder_makes_of_that(stream, bundle, model):
    oracle = Oracle(model)
    letters = Letters(Silent(stream), model)
    recorded = Recorded(letters, oracle)
    dialogue = dialogue_of(recorded, bundle)
    first, second, third = dialogue.ask("ZZZ"), dialogue.ask("QQ"), dialogue.ask(Question("XXXX", 3.0))
    seen = turns(stream, 36)

    def visible(first_turn: int, stop: int) -> tuple[list, list[int]]:
        events = play(dialogue, seen[first_turn:stop])
        return events, [letters.count(letter) for letter in "ZQX"]

    events, found = visible(0, 5)
    assert found == [3, 2, 4]
    assert dialogue.decoder.forgotten == 0
    dialogue.withdraw(first)
    assert dialogue.questions() == {second: "QQ", third: "XXXX"}
    events, found = visible(5, 6)
    assert found == [0, 2, 4]
    assert events[0] == Withdrawn(6.0, "ZZZ")
    dialogue.withdraw(third)  # its turn is remembered, with its frame
    events, found = visible(6, 7)
    assert found == [0, 2, 0]
    assert letters.seen.count(-1) == 7 * 2  # two tokens of each frame
    events, found = visible(7, 20)
    assert dialogue.decoder.forgotten > 8
    assert found == [0, 2, 0]
    assert [turn for turn in dialogue.decoder.turns if turn.remnant] == [dialogue.decoder.turns[1]]  # that of QQ alone
    dialogue.withdraw(second)  # of its turn nothing but the question was left
    events, found = visible(20, 36)
    assert found == [0, 0, 0]
    assert not any(turn.remnant for turn in dialogue.decoder.turns)
    assert [event.probabilities for event in events if isinstance(event, Decision)] == [None] * 16
    assert dialogue.decoder.rebased >= 1
    expected = oracle.logits()[recorded.last].float().numpy()
    found = np.stack(recorded.logits)
    found[:, SILENCE] = expected[:, SILENCE]  # what was forced
    golden.assert_close(found, expected)


def test_after_a_cut_the_prompt_is_that_of_a_dialogue_in_which_it_was_never_asked(stream, bundle, model):
    recorded = Recorded(Silent(stream))
    dialogue = dialogue_of(recorded, bundle, eviction="cut")
    dialogue.ask("ZZZ")
    kept = dialogue.ask("QQ")
    seen = turns(stream, 20)
    play(dialogue, seen[:3])
    dialogue.withdraw(1)
    play(dialogue, seen[3:])
    assert dialogue.questions() == {kept: "QQ"}
    assert dialogue.decoder.forgotten > 5
    tokenizer, table = dialogue_models.byte_tokenizer(), model.get_input_embeddings()
    embeddings, positions, at = [], [], 0

    def text(*parts) -> None:
        nonlocal at
        ids = [
            i
            for part in parts
            for i in ([part] if isinstance(part, int) else tokenizer.encode(part, add_special_tokens=False).ids)
        ]
        embeddings.append(table(torch.tensor(ids)).detach())
        positions.extend([[at + offset] * 3 for offset in range(len(ids))])
        at += len(ids)

    text(START, f"system\n{SYSTEM}", END, "\n", START, "user\nQQ\n", END, "\n")
    remembered = len(dialogue.decoder.turns) - 2  # but for the system prompt and the turn of which the question is left
    for turn in seen[-remembered:]:
        text(START, f"user\n<{turn.number}s-{turn.number + 1}s>\n", decoder_models.VISION_START)
        embeddings.append(torch.from_numpy(turn.visual[0]))
        positions.extend([[at, at, at], [at, at, at + 1]])
        at += 2
        text(decoder_models.VISION_END, END, "\n", START, "assistant\n")
        if turn is not seen[-1]:
            text(SILENCE, END, "\n")
    with torch.inference_mode():
        hidden = model.model.language_model(
            inputs_embeds=torch.cat(embeddings)[None], position_ids=torch.tensor(positions).T[:, None]
        ).last_hidden_state
        expected = model.lm_head(hidden[0, -1]).numpy()
    found = recorded.logits[-1]
    found[SILENCE] = expected[SILENCE]
    golden.assert_close(found, expected)


def test_what_waits_is_never_asked_and_its_room_is_given_back(stream, bundle):
    dialogue = dialogue_of(Silent(stream), bundle)
    number = dialogue.ask(Question("Long " * 30, 2.0))
    with pytest.raises(FramestepError, match="does not fit"):
        dialogue.ask("Wide " * 30)
    assert not dialogue.withdraw(number)
    again = dialogue.ask("Wide " * 30)
    assert (number, again) == (1, 2)
    events = play(dialogue, turns(stream, 4))
    assert [event.text for event in events if isinstance(event, Asked)] == [("Wide " * 30).strip()]
    assert dialogue.withdraw(again)
    dialogue.ask("Long " * 30)
    assert [event.text[:4] for event in play(dialogue, turns(stream, 1)) if not isinstance(event, Decision)] == [
        "Wide",
        "Long",
    ]


def test_a_number_that_was_not_given_is_refused(stream, bundle):
    dialogue = dialogue_of(Silent(stream), bundle)
    with pytest.raises(FramestepError, match="there is no question 1; there is none at all"):
        dialogue.withdraw(1)
    dialogue.ask("What?")
    play(dialogue, turns(stream, 1))
    dialogue.ask(Question("Else?", 9.0))
    with pytest.raises(FramestepError, match="there is no question 3; expected 1, 2"):
        dialogue.withdraw(3)
    dialogue.withdraw(1)
    with pytest.raises(FramestepError, match="there is no question 1; expected 2"):
        dialogue.withdraw(1)


def test_a_dialogue_that_begins_again_asks_only_what_still_stands(stream, bundle):
    dialogue = dialogue_of(Silent(stream), bundle)
    dialogue.ask("What?")
    kept = dialogue.ask("Else?")
    seen = turns(stream, 3)
    play(dialogue, seen[:1])
    dialogue.withdraw(1)
    play(dialogue, [Seen(1, 1.0, 2.0, (np.full_like(seen[1].visual[0], np.nan),), 0.0)])
    assert dialogue.questions() == {kept: "Else?"}
    events = play(dialogue, seen[2:])
    assert [event.text for event in events if isinstance(event, Asked)] == ["Else?"]


def test_a_model_that_is_asked_is_not_asked_what_was_withdrawn(stream, bundle):
    words = Words(bundle.manifest.language, bundle.path)
    answering = Answering(stream, bundle.manifest, words, DialogueOptions(system=SYSTEM, max_tokens=1))
    first, second = answering.ask(Question("What?", 1.0)), answering.ask("Else?")
    assert not answering.withdraw(first)
    assert answering.questions() == {second: "Else?"}
    events = play(answering, turns(stream, 2))
    assert [event.text for event in events if isinstance(event, Asked)] == ["Else?"]
    with pytest.raises(FramestepError, match="there is no question 2"):
        answering.withdraw(second)
