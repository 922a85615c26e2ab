"""Answers that follow the video while they are spoken: what each token sees, clocks, positions, threads, bad input."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import dialogue_models
import numpy as np
import pytest
import streamchat_models
import torch
from streamchat_oracle import Oracle
from streamchat_recorder import Recorder

import framestep
from framestep.export.streamchat_checkpoint import read_streamchat_checkpoint
from framestep.export.streamchat_export import StreamChatOptions, export_streamchat, write_bundle
from framestep.runtime.bundle import BundleWriter
from framestep.runtime.dialogue_options import DialogueOptions
from framestep.runtime.errors import FramestepError, SourceError
from framestep.runtime.events import Answer, AnswerText, Asked, FrameShown, Notice, Rebased, Spoken
from framestep.runtime.following import Following, words_begun
from framestep.runtime.questions import Question
from framestep.runtime.session import NonFiniteOutputError
from framestep.runtime.sources.frame import Frame

WINDOW, CAPACITY, RATE = 3, 112, 2.0


class Pictures:
    """A source of pictures, `rate` a second; a live one gives a picture when it is told to."""

    name = "pictures"

    def __init__(self, count: int, live: bool = False, rate: float = RATE) -> None:
        self.live, self.ended, self.dropped = live, count == 0, 0
        self._pictures, self._rate = streamchat_models.random_frames(max(count, 1)), rate
        self._count, self._next, self._due = count, 0, 0 if live else count
        self._changed = threading.Condition()

    def come(self, count: int = 1) -> None:
        with self._changed:
            self._due += count
            self._changed.notify_all()

    def read(self, timeout: float | None = None) -> Frame | None:
        with self._changed:
            if self.live and self._due <= self._next:
                self._changed.wait(timeout)
            if self._next >= min(self._due, self._count):
                self.ended = self._next >= self._count
                return None
            if self.live:  # the newest
                self.dropped += min(self._due, self._count) - 1 - self._next
                self._next = min(self._due, self._count) - 1
            index = self._next
            self._next += 1
        return Frame(self._pictures[index], index, index / self._rate, 0.0)


class Script:
    """Says what it is told, whatever the model thinks; then it is done."""

    def __init__(self, tokens: list[int], before: Callable[[], None] | None) -> None:
        self.tokens, self.before = iter(tokens), before

    def __call__(self, logits: np.ndarray) -> int:
        if self.before is not None:
            self.before()
        return next(self.tokens)


def make(folder: Path, positions: str = "parallel", chat: bool = True, **changes: object) -> Path:
    checkpoint = streamchat_models.save(folder, positions=positions, **changes)
    dialogue_models.byte_tokenizer(states=False, chat=chat).save(str(checkpoint / "tokenizer.json"))
    options = StreamChatOptions(window=WINDOW, capacity=CAPACITY, chunk=16, rate=RATE)
    export_streamchat(read_streamchat_checkpoint(str(checkpoint)), folder / "out.bundle", options)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("following"))


def follow(folder: Path, source: Pictures, engine: str = "auto", **options: object) -> tuple[Following, Recorder]:
    """A conversation whose runs are recorded."""
    session = framestep.load(folder / "out.bundle", engine=engine, threads=1)
    chosen = {"system": "s", "max_tokens": 40, **options}
    following = Following(session, source, DialogueOptions(**chosen))
    recorder = Recorder(following.cache._stream._stream)
    following.cache._stream._stream = following.cache.ring._stream = recorder
    return following, recorder


def say(following: Following, text: str, before: Callable[[], None] | None = None) -> None:
    words = following._words
    following._speaker._sampler = Script([*words.tokens([text]), min(words.stop)], before)


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_the_words_of_a_file_go_on_with_its_time(made, engine):
    following, recorder = follow(made, Pictures(20), engine)
    say(following, "a big dog ran")
    with following:
        following.ask(Question("what?", 1.0))
        events = list(following)
    assert [type(event) for event in events if isinstance(event, Asked | Answer)] == [Asked, Answer]
    text = [(event.text, event.frame) for event in events if isinstance(event, Spoken)]
    assert "".join(part for part, _ in text) == "a big dog ran"
    # the question is asked at second 1 (frame 2). A word's first token is generated from what was seen before it; then a
    # second passes, which is two frames, and the rest of the word sees them
    assert [frame for _, frame in text] == [2, 4, 4, 6, 6, 6, 6, 8, 8, 8, 8, 10, 10]
    assert all(
        event.age == pytest.approx(event.time - event.frame / RATE) for event in events if isinstance(event, Spoken)
    )
    assert [event.index for event in events if isinstance(event, FrameShown)] == list(range(20))
    recorder.check(Oracle(made / "streamchat"))


def test_every_token_sees_what_the_events_say(made):
    """The record of (position, first token) per frame is enough for an oracle."""
    following, recorder = follow(made, Pictures(12))
    say(following, "one two three")
    with following:
        following.ask("what?")
        events = list(following)
    shown = [event for event in events if isinstance(event, FrameShown)]
    firsts = np.array([event.token for event in shown])
    newest = [max(row[1], default=-1) for row in recorder._rows]
    assert newest == [int((firsts <= token).sum()) - 1 for token in range(len(recorder.tokens))]
    assert [event.position for event in shown] == recorder._times
    # frames that came while it spoke have the position of the next token
    for event in shown:
        if (
            0 < event.token < len(recorder.tokens)
            and event.index > 0
            and event.position == shown[event.index - 1].position
        ):
            assert recorder._places[event.token] == event.position


def test_idle_frames_move_the_clock_and_frames_of_an_answer_do_not(made):
    following, recorder = follow(made, Pictures(9))
    say(following, "ab cd")
    with following:
        following.ask(Question("what?", 1.0))
        list(following)
    opening = len(following._opening)
    times = recorder._times
    assert times[:3] == [opening + 1, opening + 2, opening + 3]
    asked = opening + 3
    prompt = len(following._prompt("what?"))
    assert times[3:5] == [asked + prompt] * 2  # two frames before the first letter of "ab" is taken in
    assert times[5:7] == [asked + prompt + 3] * 2  # and two before that of "cd"
    assert times[7] == recorder._places[-1] + 2  # idle again


def test_a_question_in_chunks_sees_the_same_frames(made):
    following, recorder = follow(made, Pictures(6))
    say(following, "a")
    with following:
        following.ask(Question("a long question that takes some chunks", 1.5))
        list(following)
    prompt = len(following._prompt("a long question that takes some chunks"))
    first = len(following._opening)
    assert recorder.runs["decoder"] > 4
    assert len({tuple(row[1]) for row in recorder._rows[first : first + prompt]}) == 1
    recorder.check(Oracle(made / "streamchat"))


def test_a_source_that_ends_during_an_answer_is_told_and_the_answer_finished(made):
    following, recorder = follow(made, Pictures(4))
    say(following, "a b c d e")
    with following:
        following.ask("what?")
        events = list(following)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert notices == ["the source has ended; the answer goes on about its last frames"]
    assert [event.text for event in events if isinstance(event, Answer)] == ["a b c d e"]
    assert len(recorder.frames) == 4
    recorder.check(Oracle(made / "streamchat"))


def test_questions_that_never_came_due_are_told(made):
    following, _ = follow(made, Pictures(4))
    with following:
        following.ask(Question("what?", 60.0))
        events = list(following)
    assert [event.text for event in events if isinstance(event, Notice)] == [
        "the source has ended before 60 s, when 'what?' was due"
    ]


@pytest.mark.parametrize("live", [False, True])
def test_a_source_without_a_frame_is_told_in_one_line(made, live):
    following, _ = follow(made, Pictures(0, live))
    with following, pytest.raises(SourceError, match="^source pictures: gave no frame, so there is nothing to see$"):
        following.ask("what?")
        list(following)


def test_a_frame_costs_one_run_of_the_frame_graph_however_many_passed(made):
    following, recorder = follow(made, Pictures(300))
    say(following, "a b")
    with following:
        following.ask(Question("what?", 140.0))
        list(following)
    prompt = -(-len(following._prompt("what?")) // 16)
    # of the answer: three letters, and what closes it
    assert recorder.runs == Counter(frame=300, embed=1 + 1 + 3 + 1, decoder=1 + prompt + 3 + 1)


def test_questions_and_answers_beyond_the_cache_forget_the_oldest(made):
    following, recorder = follow(made, Pictures(40), max_tokens=6, temperature=1.0)
    with following:
        for second in range(0, 12, 3):
            following.ask(Question(f"what is at {second}?", float(second)))
        events = list(following)
    assert sum(isinstance(event, Answer) for event in events) == 4
    assert following.cache.forgotten > 0
    assert following.cache.turns[0].pinned
    recorder.check(Oracle(made / "streamchat"))


def test_positions_go_back_by_one_constant_and_nothing_changes(tmp_path, tmp_path_factory):
    runs = []
    for positions in (128, 4096):
        folder = make(tmp_path_factory.mktemp("positions"), chat=False, max_position_embeddings=positions)
        following, recorder = follow(folder, Pictures(150), system="")
        say(following, "ab cd ef")
        with following:
            following.ask(Question("what?", 70.0))
            moves = [event for event in following if isinstance(event, Rebased)]
        runs.append((recorder, moves))
    (near, moves), (far, none) = runs
    assert moves
    assert not none
    assert all(move.shift > 0 and move.gap == 0 for move in moves)
    assert near.tokens == far.tokens
    assert max(near._times) < 128 < max(far._times)
    assert np.abs(np.stack(near.logits) - np.stack(far.logits)).max() < 2e-4


def test_the_gap_behind_the_system_prompt_is_closed_told_and_what_the_oracle_expects(tmp_path):
    folder = make(tmp_path, max_position_embeddings=128)
    following, recorder = follow(folder, Pictures(150))
    say(following, "ab cd ef")
    with following:
        following.ask(Question("what?", 70.0))
        events = list(following)
    moves = [event for event in events if isinstance(event, Rebased)]
    assert moves
    assert all(move.shift == 0 and move.gap > 0 for move in moves)
    told = [event.text for event in events if isinstance(event, Notice)]
    assert f"positions ran out: what is pinned came {moves[0].gap} positions nearer to the rest" in told
    recorder.check(Oracle(folder / "streamchat"))


def test_an_old_answer_is_forgotten_where_it_keeps_positions_from_going_back(tmp_path):
    folder = make(tmp_path, max_position_embeddings=128)
    following, recorder = follow(folder, Pictures(200))
    say(following, "ab")
    with following:
        following.ask("what?")
        list(following)
    assert following.cache.forgotten == 1
    assert max(recorder._times) < 128


def test_literal_positions_end_with_a_message(tmp_path):
    folder = make(tmp_path, "literal", max_position_embeddings=128)
    following, _ = follow(folder, Pictures(150))
    with following, pytest.raises(FramestepError, match="last position, and literal rows and columns cannot move"):
        list(following)


def test_frames_come_while_a_live_answer_is_spoken(made):
    source = Pictures(200, live=True)
    following, recorder = follow(made, source)
    rounds = 0

    def before() -> None:
        nonlocal rounds
        rounds += 1
        if rounds > 2:
            seen = following.cache.ring.encoded
            source.come(2)  # two at once: the newer one is taken, the other dropped
            with following.cache.lock:
                assert following.cache.lock.wait_for(lambda: following.cache.ring.encoded > seen, 10)

    say(following, "abcdefghijkl", before)
    events = []
    with following:
        following.ask("what?")
        source.come()
        for event in following:
            events.append(event)
            if isinstance(event, Answer):
                source.come(10**6)
    spoken = [event.frame for event in events if isinstance(event, Spoken)]
    assert spoken[0] == 0
    assert spoken == sorted(spoken)
    assert len(set(spoken)) == 10  # from the third letter on a newer frame at each
    assert following.dropped >= 10
    shown = [event.index for event in events if isinstance(event, FrameShown)]
    assert shown == sorted(shown)
    assert len(shown) == len(recorder.frames)
    recorder.check(Oracle(made / "streamchat"))


def test_a_frame_that_is_being_encoded_changes_nothing(made):
    logits = []
    for second in (False, True):
        source = Pictures(2, live=True)
        following, recorder = follow(made, source)
        entered, leave = threading.Event(), threading.Event()

        def during(number: int, entered=entered, leave=leave, recorder=recorder, following=following) -> None:
            if number != 1:
                return
            engine = following._stream._session._engine  # half of what it will write is there
            for name in ("visual.block0.key", "visual.block0.value"):
                state = engine.read_state(name, 0)
                state[:, 4:6] = 1e3
                engine.write_state(name, 0, state)
            entered.set()
            assert leave.wait(10)

        recorder.during = during

        def before(second=second, source=source, entered=entered) -> None:
            if second and not entered.is_set():
                source.come()
                assert entered.wait(10)

        say(following, "abcd", before)
        with following:
            following.ask("what?")
            source.come()
            for event in following:
                if isinstance(event, Answer):
                    leave.set()
                    source.come(5)
        logits.append(recorder.logits)
    assert len(logits[0]) == len(logits[1])
    assert all(np.array_equal(*pair) for pair in zip(*logits, strict=True))


def test_a_frame_that_is_not_finite_is_told_and_the_stream_goes_on(made):
    following, recorder = follow(made, Pictures(14))

    def during(number: int) -> None:
        if number == 3:
            raise NonFiniteOutputError((following._stream,), ("magnitudes",), {})

    recorder.during = during
    say(following, "ab")
    with following:
        following.ask(Question("what?", 3.0))
        events = list(following)
    told = [event.text for event in events if isinstance(event, Notice)]
    assert len(told) == 1
    assert told[0].startswith("frame 3: ")
    assert [event.text for event in events if isinstance(event, Answer)] == ["ab"]
    assert sorted({frame for row in recorder._rows for frame in row[1]}) == [4, 5, 6, 7, 8]


def test_text_that_is_not_finite_is_told_and_the_next_question_is_answered(made):
    def fail() -> None:
        raise NonFiniteOutputError((following._stream,), ("logits",), {})

    following, _ = follow(made, Pictures(20))
    say(following, "ab", fail)
    events = []
    with following:
        following.ask(Question("what?", 1.0))
        following.ask(Question("and now?", 5.0))
        for event in following:
            events.append(event)
            if isinstance(event, Notice):
                say(following, "cd")
    (told,) = [event.text for event in events if isinstance(event, Notice)]
    assert told.startswith("stream 0: the model gave NaN or infinity in logits;")
    assert told.endswith("; the conversation begins again")
    assert [event.text for event in events if isinstance(event, Asked)] == ["what?", "and now?"]
    assert [event.text for event in events if isinstance(event, Answer)] == ["cd"]
    assert next(event.frame for event in events if isinstance(event, Spoken)) == 10  # of second 5


def test_a_live_source_that_breaks_ends_the_events_with_its_error(made):
    class Broken(Pictures):
        def read(self, timeout: float | None = None) -> Frame | None:
            if self._next == 2:
                raise SourceError("pictures: gone")
            return super().read(timeout)

    source, shown = Broken(9, live=True), []
    following, _ = follow(made, source)
    source.come()
    with following, pytest.raises(SourceError, match="^pictures: gone$"):
        for event in following:
            shown.append(event)
            source.come()
    assert [event.index for event in shown] == [0, 1]


def test_an_answer_is_ended_when_it_is_asked_to_stop(made):
    count = 0

    def before() -> None:
        nonlocal count
        count += 1
        if count == 3:
            following.ask_to_stop()

    following, _ = follow(made, Pictures(40))
    say(following, "abcdef", before)
    with following:
        following.ask(Question("what?", 1.0))
        following.ask(Question("and now?", 12.0))
        events = list(following)
    (answer,) = [event for event in events if isinstance(event, Answer)]
    assert (answer.text, answer.reason, answer.tokens) == ("ab", "interrupted", 2)
    assert [event.text for event in events if isinstance(event, Asked)] == ["what?"]
    assert max(event.index for event in events if isinstance(event, FrameShown)) < 10


def test_a_question_that_is_withdrawn_before_its_time_is_not_asked(made):
    following, _ = follow(made, Pictures(12))
    say(following, "a")
    with following:
        first, second = (following.ask(Question(text, 2.0)) for text in ("what?", "and now?"))
        assert following.questions() == {first: "what?", second: "and now?"}
        assert not following.withdraw(first)
        assert following.questions() == {second: "and now?"}
        with pytest.raises(FramestepError, match=f"there is no question {first}; expected {second}"):
            following.withdraw(first)
        events = list(following)
    assert [event.text for event in events if isinstance(event, Asked)] == ["and now?"]


def test_a_frame_path_that_gives_infinity_is_noticed_before_text_reads_it(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "copy")
    streamchat_models.change_weights(
        folder / "streamchat",
        lambda name, value: torch.full_like(value, 3e38) if name == "cross_blocks.0.mlp_gate" else value,
    )
    checkpoint = read_streamchat_checkpoint(str(folder / "streamchat"))
    with BundleWriter(tmp_path / "broken.bundle") as writer:
        write_bundle(checkpoint, writer, StreamChatOptions(window=WINDOW, capacity=CAPACITY, rate=RATE))
    with framestep.load(tmp_path / "broken.bundle") as session:
        following = Following(session, Pictures(3), DialogueOptions(system="s"))
        with following:
            told = [event.text for event in following if isinstance(event, Notice)]
        assert len(told) == 3
        assert all("NaN or infinity in magnitudes" in text for text in told)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rate": 5.0}, "rate: the bundle keeps 3 frames, less than one second at 5 a second; choose a lower rate"),
        ({"prune": 0.9}, "prune: frames are no tokens of this model's dialogue"),
        ({"eviction": "cut"}, "eviction: frames are no tokens of this model's dialogue"),
        ({"turn": 2.0}, "turn: this model answers when it is asked"),
        ({"frames": 2}, "frames: this model answers when it is asked"),
        ({"response_from": 0.5}, "response_from: this model answers when it is asked"),
        ({"standby_from": 0.5}, "standby_from: this model answers when it is asked"),
    ],
)
def test_options_that_do_not_fit_are_told_in_one_line(made, options, message):
    with framestep.load(made / "out.bundle") as session:
        with pytest.raises(FramestepError) as raised:
            Following(session, Pictures(3), DialogueOptions(**options))
        assert str(raised.value).startswith(message)
        with session.open_stream():  # its place was given back
            pass


def test_a_question_that_does_not_fit_is_told(made):
    following, _ = follow(made, Pictures(3))
    with following, pytest.raises(FramestepError, match=r"the question of \d+ tokens does not fit"):
        following.ask("why " * CAPACITY)


@pytest.mark.parametrize(
    "text, beginning, words",
    [
        ("one two", True, 2),
        ("ne", False, 0),
        (" two  three ", False, 2),
        ("日本語", True, 3),
        ("本 x", False, 2),
        ("", True, 0),
    ],
)
def test_words_are_counted_where_they_begin(text, beginning, words):
    assert words_begun(text, beginning) == words


def test_text_of_an_answer_is_an_event_of_every_conversation():
    assert issubclass(Spoken, AnswerText)
