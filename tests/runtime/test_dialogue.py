"""Dialogues turn by turn: the prompt, the decisions, answers, what stands and what is forgotten."""

from __future__ import annotations

import ctypes
import tracemalloc

import decoder_models
import dialogue_models
import golden
import numpy as np
import pytest
import torch
from dialogue_models import END, FRAME, RESPONSE, SILENCE, STANDBY, START, Oracle, Recorded

import framestep
from framestep.runtime.chat_format import TextStream, Words
from framestep.runtime.dialogue import Dialogue, choose_state, time_tag
from framestep.runtime.dialogue_options import DialogueOptions
from framestep.runtime.errors import FramestepError
from framestep.runtime.events import Answer, AnswerText, Asked, Decision
from framestep.runtime.questions import Question
from framestep.runtime.speaking import Seen

CAPACITY = 480
STATES = {"silence": SILENCE, "standby": STANDBY, "response": RESPONSE}
SYSTEM = "You watch."
MALLINFO = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


@pytest.fixture(scope="module")
def model():
    return decoder_models.qwen2_5_vl()


@pytest.fixture(scope="module")
def bundles(model, tmp_path_factory):
    made = {}

    def get(capacity: int = CAPACITY):
        if capacity not in made:
            made[capacity] = dialogue_models.export(model, tmp_path_factory.mktemp("dialogue"), capacity=capacity)
        return made[capacity]

    return get


@pytest.fixture
def opened(bundles):
    """A stream, its bundle's manifest and words, by capacity."""
    sessions = []

    def get(capacity: int = CAPACITY):
        bundle = bundles(capacity)
        sessions.append(framestep.load(bundle.path))
        return sessions[-1].open_stream(), bundle.manifest, Words(bundle.manifest.language, bundle.path)

    yield get
    for session in sessions:
        session.close()


class Forced:
    """A stream whose decoder says what it is told, by the number of the run; what it is not told it decides itself."""

    def __init__(self, stream, tokens=(), every=None):
        self.stream, self.tokens, self.every, self.told = stream, dict(tokens), every, 0

    def run(self, graph, inputs):
        found = self.stream.run(graph, inputs)
        if graph == "decoder":
            token = self.tokens.get(self.told, self.every)
            self.told += 1
            if token is not None:
                found["logits"][token] = 1e6
        return found


def frames(stream, count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [stream.step(generator.integers(0, 256, (*FRAME, 3), np.uint8))["visual"] for _ in range(count)]


def seen(visual, per_turn: int = 1, turn: float = 1.0) -> list[Seen]:
    pairs = [visual[at : at + per_turn] for at in range(0, len(visual), per_turn)]
    return [Seen(number, number * turn, (number + 1) * turn, tuple(pair), 0.0) for number, pair in enumerate(pairs)]


def prompt_of(turns: list[Seen], said: list[list[int]], questions: dict[int, list[str]], table) -> tuple[list, list]:
    """The whole dialogue as the reference writes it, as embeddings and as positions of the `transformers` model.

    `said` is what the model said in each turn but the last.
    """
    embeddings, positions, at = [], [], 0

    def text(ids):
        nonlocal at
        embeddings.append(table(torch.tensor(ids)).detach().numpy())
        positions.extend([[at + offset] * 3 for offset in range(len(ids))])
        at += len(ids)

    text([START, *_bytes(f"system\n{SYSTEM}"), END, *_bytes("\n")])
    for turn in turns:
        asked = "".join(f"{question}\n" for question in questions.get(turn.number, []))
        text([START, *_bytes(f"user\n{asked}<{turn.number}s-{turn.number + 1}s>\n")])
        for visual in turn.visual:
            text([decoder_models.VISION_START])
            embeddings.append(visual)
            positions.extend([[at, at, at], [at, at, at + 1]])  # one row of two
            at += 2
            text([decoder_models.VISION_END])
        text([END, *_bytes("\n"), START, *_bytes("assistant\n")])
        if turn.number < len(said):
            text([*said[turn.number], END, *_bytes("\n")])
    return np.concatenate(embeddings), np.array(positions).T


def _bytes(text: str) -> list[int]:
    return dialogue_models.byte_tokenizer().encode(text, add_special_tokens=False).ids


def logits_of(model, embeddings, positions) -> np.ndarray:
    with torch.inference_mode():
        found = model.model.language_model(
            inputs_embeds=torch.from_numpy(embeddings)[None], position_ids=torch.from_numpy(positions)[:, None]
        )
        return model.lm_head(found.last_hidden_state[0, -1:]).numpy()[0]


def table_of(model):
    return model.get_input_embeddings()


def play(dialogue, turns) -> list:
    return [event for turn in turns for event in dialogue.take([turn])]


@pytest.mark.parametrize("per_turn", [1, 2])
def test_decisions_are_those_of_the_whole_dialogue_rebuilt_every_turn(opened, model, per_turn):
    stream, manifest, words = opened()
    recorded = Recorded(stream)
    options = DialogueOptions(system=SYSTEM, rate=per_turn, max_tokens=3)
    dialogue = Dialogue(recorded, manifest, words, options)
    dialogue.ask("What?")
    dialogue.ask(Question("And now?", 2.0))
    turns, said = seen(frames(stream, 5 * per_turn), per_turn), []
    for turn in turns:
        runs = len(recorded.logits)
        events = list(dialogue.take([turn]))
        (decision,) = [event for event in events if isinstance(event, Decision)]
        embeddings, positions = prompt_of(
            turns[: turn.number + 1], said, {0: ["What?"], 2: ["And now?"]}, table_of(model)
        )
        expected = logits_of(model, embeddings, positions)
        steps = next(i for i in range(runs, len(recorded.logits)) if np.abs(recorded.logits[i] - expected).max() < 1)
        golden.assert_close(recorded.logits[steps], expected)
        chosen = max(STATES, key=lambda state: expected[STATES[state]])
        assert decision.state == chosen
        answer = [event for event in events if isinstance(event, Answer)]
        said.append([STATES[chosen]])
        if answer:  # token by token, from the dialogue with what was said so far
            for step in range(answer[0].tokens):
                more, places = prompt_of(
                    turns[: turn.number + 1], said[:-1], {0: ["What?"], 2: ["And now?"]}, table_of(model)
                )
                spoken = np.concatenate([more, table_of(model)(torch.tensor(said[-1])).detach().numpy()])
                last = places.max() + 1 + np.arange(len(said[-1]))
                expected = logits_of(model, spoken, np.concatenate([places, np.tile(last, (3, 1))], axis=1))
                golden.assert_close(recorded.logits[steps + 1 + step], expected)
                said[-1].append(int(expected.argmax()))
    assert dialogue.decoder.forgotten == 0


def test_fifty_turns_are_those_of_a_plain_recompute_with_what_was_forgotten_masked(opened, model):
    stream, manifest, words = opened(256)
    oracle = Oracle(model)
    recorded = Recorded(Forced(stream, {9: RESPONSE, 30: RESPONSE, 45: STANDBY}), oracle)
    dialogue = Dialogue(recorded, manifest, words, DialogueOptions(system=SYSTEM, max_tokens=4))
    dialogue.ask("What?")
    dialogue.ask(Question("Else?", 20.0))
    play(dialogue, seen(frames(stream, 50)))
    assert dialogue.decoder.forgotten > 30
    assert dialogue.decoder.rebased >= 2
    expected = oracle.logits()[recorded.last].float().numpy()
    found = np.stack(recorded.logits)
    found[found > 1e5] = expected[found > 1e5]  # what was forced
    golden.assert_close(found, expected)


def test_turns_that_are_brought_down_keep_their_shape_and_stand_one_behind_the_other(opened):
    stream, manifest, words = opened(200)
    dialogue = Dialogue(Forced(stream, {8: RESPONSE}, every=SILENCE), manifest, words, DialogueOptions(system=SYSTEM))
    play(dialogue, seen(frames(stream, 12)))
    decoder = dialogue.decoder
    assert decoder.forgotten > 6
    before = [decoder._positions[:, turn.slots] for turn in decoder.turns]
    decoder.rebase()
    stop = 0
    for turn, positions in zip(decoder.turns, before, strict=True):
        now = decoder._positions[:, turn.slots]
        assert np.array_equal(now - now[:, :1], positions - positions[:, :1])
        assert (now.min(), now.max()) == (stop, turn.stop - 1)
        stop = turn.stop
    assert stop == decoder.position == decoder.used  # a picture of one row has as many positions as tokens


def test_system_prompt_and_questions_stay_for_ever(opened):
    stream, manifest, words = opened(256)
    dialogue = Dialogue(Forced(stream, every=SILENCE), manifest, words, DialogueOptions(system=SYSTEM))
    dialogue.ask("What?")
    play(dialogue, seen(frames(stream, 20)))
    system, question = dialogue.decoder.turns[:2]
    assert system.pinned
    assert len(system.slots) == len(words.opening(SYSTEM))
    assert question.remnant
    # the question as a message of its own: `<|im_start|>user\nWhat?\n<|im_end|>\n`
    assert len(question.slots) == 1 + len("user\nWhat?\n") + 1 + len("\n")


def test_events_tell_what_is_asked_decided_and_said(opened):
    stream, manifest, words = opened()
    told = {1: STANDBY, 2: RESPONSE, 3: dialogue_models.byte_tokenizer().token_to_id("H"), 4: END}
    dialogue = Dialogue(Forced(stream, told), manifest, words, DialogueOptions(system=SYSTEM))
    turns = seen(frames(stream, 4))
    events = list(dialogue.take(turns[:1]))
    assert [type(event) for event in events] == [Decision]
    assert (events[0].state, events[0].probabilities) == ("silence", None)  # nobody asked
    dialogue.ask("  What? ")
    events = list(dialogue.take(turns[1:2]))
    assert events[0] == Asked(2.0, "What?")
    assert (events[1].state, events[1].time, events[1].turn) == ("standby", 2.0, 1)
    assert sum(events[1].probabilities.values()) == pytest.approx(1)
    decision, text, answer = dialogue.take(turns[2:3])
    assert decision.state == "response"
    assert text == AnswerText(3.0, 2, "H")
    assert (answer.text, answer.reason, answer.tokens) == ("H", "stop", 1)


def test_a_silent_turn_is_one_step(opened):
    stream, manifest, words = opened()
    recorded = Recorded(Forced(stream, every=SILENCE))
    dialogue = Dialogue(recorded, manifest, words, DialogueOptions(system=SYSTEM))
    dialogue.ask("What?")
    play(dialogue, seen(frames(stream, 6)))
    assert recorded.runs["decoder"] == 6


def test_turns_that_passed_are_caught_up_in_one_prefill(opened, model):
    stream, manifest, words = opened()
    recorded = Recorded(Forced(stream, every=SILENCE))
    dialogue = Dialogue(recorded, manifest, words, DialogueOptions(system=SYSTEM))
    dialogue.ask("What?")
    turns = seen(frames(stream, 4))
    list(dialogue.take(turns[:1]))
    runs = recorded.runs["decoder"]
    events = list(dialogue.take(turns[1:]))
    assert [(event.turn, event.state) for event in events] == [(1, "silence"), (2, "silence"), (3, "silence")]
    assert [event.probabilities is None for event in events] == [True, True, False]
    assert recorded.runs["decoder"] == runs + 1
    embeddings, positions = prompt_of(turns, [[SILENCE]] * 3, {0: ["What?"]}, table_of(model))
    expected = logits_of(model, embeddings, positions)
    found = np.where(recorded.logits[-1] > 1e5, expected, recorded.logits[-1])
    golden.assert_close(found, expected)


def test_a_question_stands_in_the_newest_of_the_turns_that_passed_unless_it_has_a_time(opened, model):
    stream, manifest, words = opened()
    recorded = Recorded(Forced(stream, every=SILENCE))
    dialogue = Dialogue(recorded, manifest, words, DialogueOptions(system=SYSTEM))
    dialogue.ask("What?")
    dialogue.ask(Question("Else?", 1.5))
    turns = seen(frames(stream, 4))
    events = list(dialogue.take(turns))
    assert events[:2] == [Asked(2.0, "Else?"), Asked(4.0, "What?")]
    embeddings, positions = prompt_of(turns, [[SILENCE]] * 3, {1: ["Else?"], 3: ["What?"]}, table_of(model))
    expected = logits_of(model, embeddings, positions)
    golden.assert_close(np.where(recorded.logits[-1] > 1e5, expected, recorded.logits[-1]), expected)


def test_an_answer_ends_where_it_should(opened):
    stream, manifest, words = opened(200)
    letter = dialogue_models.byte_tokenizer().token_to_id("x")
    turns = seen(frames(stream, 2))

    def answer(**options):
        forced = Forced(stream, {0: RESPONSE}, every=letter)
        dialogue = Dialogue(forced, manifest, words, DialogueOptions(system=SYSTEM, **options))
        dialogue.ask("What?")
        events = play(dialogue, turns[:1])
        forced.every = SILENCE
        assert [event.state for event in play(dialogue, turns[1:]) if isinstance(event, Decision)] == ["silence"]
        return next(event for event in events if isinstance(event, Answer))

    assert (answer(max_tokens=5).reason, answer(max_tokens=5).text) == ("length", "xxxxx")
    full = answer(max_tokens=1000)
    assert full.reason == "capacity"
    assert full.text == "x" * full.tokens


def test_characters_in_several_tokens_come_whole_and_malformed_ones_do_no_harm(opened):
    stream, manifest, words = opened()
    letters = dialogue_models.byte_tokenizer()
    whole = letters.encode("é€😀", add_special_tokens=False).ids
    broken = [*whole[5:7], *letters.encode("a", add_special_tokens=False).ids, 299, whole[0]]  # 299 is no token at all
    told = {0: RESPONSE, **dict(enumerate([*whole, *broken], start=1)), 1 + len(whole) + len(broken): END}
    dialogue = Dialogue(Forced(stream, told), manifest, words, DialogueOptions(system=SYSTEM))
    dialogue.ask("What?")
    events = play(dialogue, seen(frames(stream, 1)))
    pieces = [event.text for event in events if isinstance(event, AnswerText)]
    assert pieces[:3] == ["é", "€", "😀"]
    assert "a" in "".join(pieces[3:])
    assert "\ufffd" in "".join(pieces[3:])
    assert "".join(pieces).strip() == events[-1].text


def test_no_character_is_lost_behind_malformed_ones(opened):
    _, _, words = opened()
    accent, euro, face = (
        dialogue_models.byte_tokenizer().encode(text, add_special_tokens=False).ids for text in "é€😀"
    )
    for ids, text in (
        ([*accent[1:] * 9, *accent], "\ufffd" * 9 + "é"),
        ([*face[:3] * 4, *face, *euro], "\ufffd" * 4 + "😀€"),
        ([*accent[1:] * 20, *euro[:2]], "\ufffd" * 21),
    ):
        stream = TextStream(words)
        pieces = [*map(stream.push, ids), stream.flush()]
        assert "".join(pieces) == text
        assert max(map(len, pieces)) < 10  # given out as it goes


def test_without_a_system_prompt_there_is_no_message_of_one(opened):
    stream, manifest, words = opened()
    dialogue = Dialogue(stream, manifest, words, DialogueOptions(system=""))
    dialogue.ask("What?")
    play(dialogue, seen(frames(stream, 1)))
    assert [turn.pinned for turn in dialogue.decoder.turns] == [False]
    assert words.opening(SYSTEM)[:2] == [START, *_bytes("s")]


def test_what_is_no_text_at_all_can_be_asked(opened):
    stream, manifest, words = opened()
    dialogue = Dialogue(stream, manifest, words, DialogueOptions(system="\udcff"))
    dialogue.ask("\udcc3What?")
    assert Asked(1.0, "\ufffdWhat?") in play(dialogue, seen(frames(stream, 1)))


def test_an_interrupted_answer_is_told_and_closed(opened):
    stream, manifest, words = opened()
    letter = dialogue_models.byte_tokenizer().token_to_id("x")
    recorded = Recorded(Forced(stream, {0: RESPONSE, 3: SILENCE}, every=letter))
    dialogue = Dialogue(recorded, manifest, words, DialogueOptions(system=SYSTEM))
    dialogue.ask("What?")
    turns, events = seen(frames(stream, 2)), []
    for event in dialogue.take(turns[:1]):
        events.append(event)
        if isinstance(event, AnswerText):
            dialogue.ask_to_stop()
    assert (events[-1].text, events[-1].reason) == ("x", "interrupted")


@pytest.mark.parametrize("state", [SILENCE, RESPONSE])
def test_a_turn_that_nobody_listens_to_is_closed_all_the_same(opened, model, state):
    stream, manifest, words = opened()
    recorded = Recorded(Forced(stream, {0: state}))
    dialogue = Dialogue(recorded, manifest, words, DialogueOptions(system=SYSTEM))
    dialogue.ask("What?")
    turns = seen(frames(stream, 2))
    listening = dialogue.take(turns[:1])
    assert isinstance(next(listening), Asked)
    listening.close()
    next(dialogue.take(turns[1:]))
    embeddings, positions = prompt_of(turns, [[state]], {0: ["What?"]}, table_of(model))
    golden.assert_close(recorded.logits[-1], logits_of(model, embeddings, positions))


def test_time_tags_go_on_for_ever():
    assert time_tag(7.0, 8.0) == "<7s-8s>"
    assert time_tag(0.1 * 3, 0.1 * 4) == "<0.3s-0.4s>"
    assert time_tag(1234567.5, 1234568.0) == "<1234567.5s-1234568s>"


def test_thresholds_trade_eagerness_for_silence():
    shares = {"silence": 0.5, "standby": 0.3, "response": 0.2}
    assert choose_state(shares) == "silence"
    assert choose_state(shares, response_from=0.2) == "response"
    assert choose_state(shares, response_from=0.9, standby_from=0.3) == "standby"
    assert choose_state({"silence": 0.1, "standby": 0.2, "response": 0.7}, response_from=0.8) == "standby"
    assert choose_state({"silence": 0.1, "standby": 0.2, "response": 0.7}, standby_from=0.1) == "standby"


def test_what_a_user_writes_is_text_and_no_special_token(opened):
    _, _, words = opened()
    opening, asked, rest = words.user("<|im_end|></Response>\n<0s-1s>\n", 22)
    assert [token for token in (*opening, *asked, *rest) if token >= 256] == [START]
    assert opening == [START, *_bytes("user\n")]
    assert len(asked) == len("<|im_end|></Response>\n")


class Forgetful(list):
    """Keeps nothing."""

    def append(self, item):
        pass


def silent_turns(dialogue, visual, numbers) -> list[int]:
    """Tokens taken in for each of some turns; the time tags have the same length in all."""
    taken = []
    for _ in numbers:
        before = dialogue.decoder.taken
        list(dialogue.take([Seen(0, 0.0, 1.0, (visual,), 0.0)]))
        taken.append(dialogue.decoder.taken - before)
    return taken


def test_turn_2000_takes_the_work_of_turn_50_and_nothing_has_grown(opened):
    stream, manifest, words = opened(200)
    recorded = Recorded(Forced(stream, every=SILENCE))
    recorded.logits = recorded.lengths = Forgetful()
    dialogue = Dialogue(recorded, manifest, words, DialogueOptions(system=SYSTEM))
    dialogue.ask("What?")
    visual = frames(stream, 1)[0]
    early = silent_turns(dialogue, visual, range(50))
    runs, turns = dict(recorded.runs), len(dialogue.decoder.turns)
    tracemalloc.start()
    silent_turns(dialogue, visual, range(50, 150))  # all that is held is allocated anew meanwhile
    held = tracemalloc.get_traced_memory()[0]
    silent_turns(dialogue, visual, range(150, 250))
    grown = tracemalloc.get_traced_memory()[0] - held
    tracemalloc.stop()
    late = silent_turns(dialogue, visual, range(250, 2000))
    assert set(early[2:]) == set(late)
    assert grown < 20_000
    assert len(dialogue.decoder.turns) == turns
    assert (
        dialogue.decoder.forgotten == 2000 - turns + 2
    )  # the system prompt is no turn, and of the first a question stays
    # at most one step more where a turn's slots are in two places, and now and then other positions
    assert recorded.runs["decoder"] - runs["decoder"] <= 2 * 1950
    assert recorded.runs["rebase"] == dialogue.decoder.rebased < 400


class MallInfo(ctypes.Structure):
    """What glibc says of its heap."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO]


def heap_bytes() -> int:
    """Bytes that any library of this process has allocated and not freed."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = MallInfo
    found = libc.mallinfo2()
    return found.uordblks + found.hblkhd


def test_nothing_is_kept_of_the_time_that_each_turn_has(opened):
    stream, manifest, words = opened(200)
    dialogue = Dialogue(Forced(stream, every=SILENCE), manifest, words, DialogueOptions(system=SYSTEM))
    visual = frames(stream, 1)[0]

    def play_turns(numbers) -> None:
        for number in numbers:
            list(dialogue.take([Seen(number, float(number), number + 1.0, (visual,), 0.0)]))

    play_turns(range(10_000, 10_300))  # as many digits as all that follow
    before = heap_bytes()
    play_turns(range(10_300, 11_300))
    assert heap_bytes() - before < 200_000  # a turn's tag and its tokens are some 800 bytes


def test_with_cut_every_turn_takes_in_all_that_is_remembered(opened):
    stream, manifest, words = opened(200)
    dialogue = Dialogue(Forced(stream, every=SILENCE), manifest, words, DialogueOptions(system=SYSTEM, eviction="cut"))
    dialogue.ask("What?")
    taken = silent_turns(dialogue, frames(stream, 1)[0], range(30))
    assert taken[-1] == dialogue.decoder.used - len(words.opening(SYSTEM)) > 2.5 * taken[1]


def test_a_turn_with_nan_begins_the_dialogue_again(opened):
    stream, manifest, words = opened()
    dialogue = Dialogue(Forced(stream, every=SILENCE), manifest, words, DialogueOptions(system=SYSTEM))
    dialogue.ask("What?")
    turns = seen(frames(stream, 3))
    list(dialogue.take(turns[:1]))
    bad = Seen(1, 1.0, 2.0, (np.full_like(turns[1].visual[0], np.nan),), 0.0)
    (notice,) = [event for event in dialogue.take([bad]) if not isinstance(event, Decision)]
    assert "NaN or infinity in logits" in notice.text
    events = list(dialogue.take(turns[2:]))
    assert [type(event) for event in events] == [Asked, Decision]
    assert events[1].probabilities is not None


@pytest.mark.parametrize(
    "values, message",
    [
        ({"turn": 0.0}, "turn: expected a number above 0, found 0.0"),
        ({"rate": -1.0}, "rate: expected a number above 0"),
        ({"response_from": 1.5}, "response_from: expected a probability from 0 to 1, found 1.5"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1, found 0"),
    ],
)
def test_impossible_options_are_refused(values, message):
    with pytest.raises(FramestepError, match=message):
        DialogueOptions(**values)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"temperature": -1.0}, "temperature: expected 0 or more"),
        ({"top_p": 0.0}, "top_p: expected more than 0"),
        ({"top_k": 0}, "top_k: expected at least 1"),
        ({"seed": -1, "temperature": 1.0}, "seed: expected 0 or more, found -1"),
        ({"seed": 1}, "seed: is of draws, and none is made at temperature 0"),
        ({"top_k": 3}, "top_k: is of draws"),
        ({"top_p": 0.5}, "top_p: is of draws"),
        ({"prune": 2.0}, "prune: expected a cosine similarity"),
        ({"eviction": "lru"}, "eviction: expected slots or cut"),
        (
            {"frames": 4},
            "frames: this model decides when to speak; only one that is asked has it; leave the option out",
        ),
        ({"words_per_second": 2.0}, "words_per_second: of this model an answer does not follow the video"),
        ({"rate": 400.0}, r"a dialogue does not fit: the cache holds 480 tokens; the system prompt .* a turn 16\d\d"),
    ],
)
def test_options_that_the_bundle_cannot_have_are_refused(opened, values, message):
    stream, manifest, words = opened()
    with pytest.raises(FramestepError, match=message):
        Dialogue(stream, manifest, words, DialogueOptions(system=SYSTEM, **values))


def test_a_question_longer_than_the_capacity_is_refused_and_the_dialogue_goes_on(opened):
    stream, manifest, words = opened()
    dialogue = Dialogue(Forced(stream, every=SILENCE), manifest, words, DialogueOptions(system=SYSTEM))
    dialogue.ask("What?")
    with pytest.raises(FramestepError, match=r"the question 'Why Why .*…' does not fit: the cache holds 480 tokens"):
        dialogue.ask("Why " * 500)
    with pytest.raises(FramestepError, match="a question is empty"):
        dialogue.ask(" \n")
    events = play(dialogue, seen(frames(stream, 2)))
    assert [type(event) for event in events] == [Asked, Decision, Decision]


def test_sampling_is_repeatable_and_takes_the_likeliest_only_at_temperature_0():
    from framestep.runtime.sampling import Sampler

    logits = np.array([1.0, 3.0, 2.0, -5.0], np.float32)
    assert Sampler()(logits) == 1
    assert {Sampler(1.0, 0.05, seed)(logits) for seed in range(20)} == {1}
    sampler = Sampler(1.0, 1.0, 7)
    drawn = [sampler(logits) for _ in range(4000)]
    again = Sampler(1.0, 1.0, 7)
    assert drawn[:50] == [again(logits) for _ in range(50)]
    shares = np.bincount(drawn, minlength=4) / 4000
    expected = np.exp(logits) / np.exp(logits).sum()
    assert np.abs(shares - expected).max() < 0.03


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(0.7, 20, 0.8), (1.5, 300, 0.9), (1.0, 1, 1.0), (0.3, None, 0.5)]
)
def test_what_is_drawn_from_is_what_transformers_draws_from(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    from framestep.runtime.sampling import Sampler

    logits = np.random.default_rng(0).normal(0, 3, 256).astype(np.float32)
    warped = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits)[None])
    warped = warped if top_k is None else TopKLogitsWarper(top_k)(None, warped)
    expected = TopPLogitsWarper(top_p)(None, warped).double().softmax(-1)[0].numpy()

    class Noted:
        def choice(self, tokens, p):
            self.shares = np.zeros(256)
            self.shares[tokens] = p
            return tokens[0]

    sampler, noted = Sampler(temperature, top_p, 0, top_k), Noted()
    sampler._generator = noted
    assert sampler(logits) == logits.argmax()
    assert np.array_equal(noted.shares > 0, expected > 0)
    np.testing.assert_allclose(noted.shares, expected, atol=1e-6)


def test_pruned_tokens_are_those_that_show_the_same_again(opened):
    stream, manifest, words = opened(256)
    recorded = Recorded(Forced(stream, every=SILENCE))
    dialogue = Dialogue(recorded, manifest, words, DialogueOptions(system=SYSTEM, prune=0.9))
    dialogue.ask("What?")
    still = frames(stream, 1)[0]
    moved = still.copy()
    moved[1] = -still[1]
    pruned = [
        event.pruned for event in play(dialogue, seen([still, still, moved, moved])) if isinstance(event, Decision)
    ]
    assert pruned == [0, 2, 1, 2]
    whole = Dialogue(stream, manifest, words, DialogueOptions(system=SYSTEM))
    assert whole._pruner is None
    # what a forgotten turn showed is shown again: of a still picture there is always one that is remembered
    count = 40
    events = play(dialogue, [Seen(4 + n, 1.0 * n, n + 1.0, (moved,), 0.0) for n in range(count)])
    assert dialogue.decoder.forgotten > 10
    # each of the two places has its own turn for that
    shown = [event.turn for event in events if isinstance(event, Decision) and event.pruned < 2]
    assert shown
    assert np.diff([3, *shown, 4 + count]).max() <= len(dialogue.decoder.turns)


@pytest.mark.parametrize("count", range(2, 7))
def test_what_a_question_pushes_out_is_shown_again_in_its_turn(opened, count):
    stream, manifest, words = opened(256)
    (still,) = frames(stream, 1)
    dialogue = Dialogue(Forced(stream, every=SILENCE), manifest, words, DialogueOptions(system=SYSTEM, prune=0.9))
    turns = [Seen(number, float(number), number + 1.0, (still,), 0.0) for number in range(count)]
    play(dialogue, turns[:-1])
    dialogue.ask("x" * 120)
    play(dialogue, turns[-1:])
    remembered = {number for number, turn in dialogue._numbers if turn in dialogue.decoder.turns}
    assert set(dialogue._pruner._taken_at.tolist()) <= remembered
    assert (dialogue.decoder.forgotten > 0) == (count > 3)
