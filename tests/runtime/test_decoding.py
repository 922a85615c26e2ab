"""A decoder's cache: where tokens go, what is forgotten, and that what is seen is what a plain recompute gives."""

from __future__ import annotations

import decoder_models
import dialogue_models
import golden
import numpy as np
import pytest
import torch
from dialogue_models import Oracle, Recorded

import framestep
from framestep.runtime.decoding import CapacityError, Decoder, Turn
from framestep.runtime.errors import FramestepError

CAPACITY = 32
POSITIONS = 96
CHUNK = 8


@pytest.fixture(scope="module")
def model():
    return decoder_models.qwen2()


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory):
    options = {"capacity": CAPACITY, "positions": POSITIONS, "chunk": CHUNK}
    return dialogue_models.export(model, tmp_path_factory.mktemp("decoding"), **options)


@pytest.fixture(scope="module")
def session(bundle):
    with framestep.load(bundle.path) as opened:
        yield opened


@pytest.fixture
def stream(session):
    with session.open_stream() as opened:
        yield opened


def tokens(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def assert_recomputed(recorded: Recorded) -> None:
    expected = recorded.oracle.logits()[recorded.last].float().numpy()
    golden.assert_close(np.stack(recorded.logits), expected)


def take_turns(decoder: Decoder, count: int, length: int, first: int = 0) -> list[Turn]:
    """Turns of several pieces each."""
    turns = [Turn() for _ in range(count)]
    for number, turn in enumerate(turns, start=first):
        ids = tokens(length, seed=number)
        decoder.take([decoder.text(turn, part) for part in (ids[:2], ids[2:-3], ids[-3:])])
    return turns


def test_what_is_taken_in_pieces_gives_the_logits_of_transformers(stream, bundle, model):
    decoder, ids, turn = Decoder(stream, bundle.manifest), tokens(30), Turn()
    found = []
    for piece in (ids[:11], ids[11:12], ids[12:30]):  # steps of 8, 3; 1; 8, 8, 2
        found.append(decoder.take([decoder.text(turn, piece)]))
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    golden.assert_close(np.stack(found), expected[[10, 11, 29]])
    assert decoder.steps == 2 + 1 + 3
    assert decoder.taken == decoder.used == decoder.position == 30


def test_the_oldest_turn_is_forgotten_and_no_other_moves(stream, bundle, model):
    recorded = Recorded(stream, Oracle(model))
    decoder, system = Decoder(recorded, bundle.manifest), Turn(pinned=True)
    decoder.take([decoder.text(system, tokens(5))])
    turns = take_turns(decoder, 3, 9)
    assert decoder.used == CAPACITY
    survivors = {turn: (list(turn.slots), turn.first) for turn in turns[1:]}
    (new,) = take_turns(decoder, 1, 7, first=3)
    assert decoder.turns == [system, *turns[1:], new]
    assert {turn: (turn.slots, turn.first) for turn in turns[1:]} == survivors
    assert set(new.slots) <= set(turns[0].slots) or not turns[0].slots
    assert new.slots == list(range(5, 12))
    assert recorded.runs == {"embed": 1 + 3 * 4, "decoder": 1 + 3 * 2 + 1}
    assert_recomputed(recorded)


def test_a_turn_goes_into_whatever_slots_are_free(stream, bundle, model):
    recorded = Recorded(stream, Oracle(model))
    decoder = Decoder(recorded, bundle.manifest)
    system, question = Turn(pinned=True), Turn()
    decoder.take([decoder.text(system, tokens(3))])
    pieces = [decoder.text(question, tokens(4, 1), kept=True), decoder.text(question, tokens(5, 2))]
    decoder.take(pieces)
    take_turns(decoder, 12, 6)  # wraps around the pinned ones, several times
    assert question.remnant
    assert question.slots == [3, 4, 5, 6]
    assert decoder.turns[:2] == [system, question]
    assert all(length <= CHUNK for length in recorded.lengths)
    assert_recomputed(recorded)


def test_what_is_kept_of_a_turn_stays_and_the_rest_goes(stream, bundle):
    decoder, question = Decoder(stream, bundle.manifest), Turn()
    decoder.take([decoder.text(question, tokens(4), kept=True), decoder.text(question, tokens(20, 1))])
    take_turns(decoder, 2, 12)
    assert decoder.used == 4 + 24
    assert decoder.forgotten == 1
    decoder.forget(question)
    assert decoder.used == 24


def test_tokens_left_over_from_a_turn_that_is_forgotten_are_left_out(stream, bundle, model):
    recorded = Recorded(stream, Oracle(model))
    decoder, before, after = Decoder(recorded, bundle.manifest), Turn(), Turn()
    decoder.take([decoder.text(before, tokens(10))])
    decoder.take([decoder.text(before, tokens(3, 1)), decoder.text(after, tokens(30, 2))])
    assert decoder.turns == [after]
    assert decoder.used == 30
    assert_recomputed(recorded)


@pytest.mark.parametrize("length, message", [(33, "no room for 33 tokens beside the 0"), (200, "the cache holds 32")])
def test_what_never_fits_is_refused_and_nothing_is_lost(stream, bundle, length, message):
    decoder = Decoder(stream, bundle.manifest)
    (turn,) = take_turns(decoder, 1, 9)
    with pytest.raises(CapacityError, match=message):
        decoder.take([decoder.text(Turn(), tokens(length))])
    assert decoder.turns == [turn]
    assert decoder.used == 9
    system = Turn(pinned=True)
    decoder.take([decoder.text(system, tokens(20))])
    with pytest.raises(CapacityError, match="no room for 13 tokens beside the 20"):
        decoder.take([decoder.text(Turn(), tokens(13))])


def test_positions_never_run_out(stream, bundle, model):
    recorded = Recorded(stream, Oracle(model))
    decoder, system = Decoder(recorded, bundle.manifest), Turn(pinned=True)
    decoder.take([decoder.text(system, tokens(5))])
    question = Turn()
    decoder.take([decoder.text(question, tokens(3, 7), kept=True), decoder.text(question, tokens(5, 8))])
    take_turns(decoder, 30, 7)
    assert decoder.rebased >= 2
    assert recorded.runs["rebase"] == decoder.rebased
    assert decoder.position <= POSITIONS
    assert all(int(at.max()) < POSITIONS for _, _, at in recorded.oracle.steps)
    assert_recomputed(recorded)


def test_rebasing_a_dialogue_of_which_only_the_beginning_was_forgotten_changes_nothing(stream, bundle):
    found = []
    for rebased in (False, True):
        decoder = Decoder(stream, bundle.manifest)
        take_turns(decoder, 6, 9)
        if rebased:
            before, shift = decoder._positions.copy(), decoder.position - decoder.used
            decoder.rebase()
            assert decoder.position == decoder.used
            assert shift > 0
            slots = [slot for turn in decoder.turns for slot in turn.slots]
            assert np.array_equal(decoder._positions[:, slots], before[:, slots] - shift)
        found.append(decoder.take([decoder.text(decoder.turns[-1], tokens(2))]))
        decoder.reset()
    golden.assert_close(found[1], found[0])


def test_cutting_takes_everything_that_is_left_in_again(stream, bundle, model):
    recorded = Recorded(stream)
    decoder, system = Decoder(recorded, bundle.manifest, "cut"), Turn(pinned=True)
    decoder.take([decoder.text(system, tokens(5))])
    turns = take_turns(decoder, 3, 9)
    before = decoder.taken
    logits = decoder.take([decoder.text(Turn(), tokens(7, 3))])
    assert decoder.turns[:3] == [system, *turns[1:]]
    assert decoder.taken - before == 9 + 9 + 7  # the system prompt stays where it is
    assert decoder.used == decoder.position == 5 + 9 + 9 + 7
    left = [*tokens(5), *tokens(9, 1), *tokens(9, 2), *tokens(7, 3)]
    with torch.inference_mode():
        golden.assert_close(logits, model(torch.tensor([left])).logits[0, -1].numpy())


def test_an_unknown_eviction_is_refused(stream, bundle):
    with pytest.raises(FramestepError, match="eviction: expected slots or cut, found 'lru'"):
        Decoder(stream, bundle.manifest, "lru")


def test_a_bundle_without_a_decoder_is_refused(stream, golden_bundle):
    from framestep.runtime.bundle import Bundle

    with pytest.raises(FramestepError, match="no language decoder"):
        Decoder(stream, Bundle.open(golden_bundle).manifest)


def test_caches_are_updated_in_place(stream, bundle, capfd):
    decoder = Decoder(stream, bundle.manifest)
    take_turns(decoder, 20, 7)
    assert decoder.rebased
    assert "in-place optimization not activated" not in capfd.readouterr().err
