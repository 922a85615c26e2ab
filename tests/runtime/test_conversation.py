"""Conversations: one thread looks while the other speaks; files and cameras; models that decide and models that are asked."""

from __future__ import annotations

import queue

import decoder_models
import dialogue_models
import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dialogue_models import FRAME, RESPONSE, SILENCE

import framestep
from framestep.export.decoder_checkpoint import read_decoder_checkpoint
from framestep.export.decoder_export import DecoderOptions, export_decoder
from framestep.export.streamformer import StreamFormerConfig
from framestep.runtime.bundle import Bundle
from framestep.runtime.conversation import WAITING_TURNS, Conversation
from framestep.runtime.dialogue_options import DialogueOptions
from framestep.runtime.errors import EngineError, FramestepError, SourceError
from framestep.runtime.events import Answer, AnswerText, Asked, Decision, Notice
from framestep.runtime.questions import Question
from framestep.runtime.sources.frame import Frame
from framestep.runtime.sources.sampling import Sampler, tolerance

SYSTEM = "You watch."
PATIENCE = 20.0  # seconds until a test that waits has failed


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Camera:
    """A live source that gives a frame for each that was let go."""

    name, live, dropped, fps = "camera", True, 0, None
    size = FRAME

    def __init__(self, clock: Clock) -> None:
        self.clock, self.ended, self.captured, self._frames = clock, False, [], queue.Queue()

    def let_go(self, count: int = 1) -> None:
        for _ in range(count):
            self._frames.put(None)

    def read(self, timeout=None):
        try:
            self._frames.get(timeout=timeout)
        except queue.Empty:
            return None
        index = len(self.captured)
        self.captured.append(self.clock())
        rgb = np.random.default_rng(index).integers(0, 256, (*self.size, 3), np.uint8)
        return Frame(rgb, index, float(index), self.captured[-1])


class Film(Camera):
    """A file: every frame in order, then the end."""

    live = False

    def __init__(self, times, clock=None) -> None:
        super().__init__(clock or Clock())
        self.times = list(times)
        self.let_go(len(self.times))

    def read(self, timeout=None):
        if len(self.captured) == len(self.times):
            self.ended = True
            return None
        frame = super().read(timeout)
        return Frame(frame.rgb, frame.index, self.times[frame.index], frame.captured)


class Told:
    """A stream whose decoder says what it is told by the number of the run, and calls `meanwhile` before each token."""

    def __init__(self, stream, tokens, otherwise=None, meanwhile=lambda: None):
        self.stream, self.tokens, self.otherwise, self.meanwhile = stream, dict(enumerate(tokens)), otherwise, meanwhile
        self.lengths = []

    def run(self, graph, inputs):
        if graph == "decoder":
            if len(inputs["embeddings"]) == 1:
                self.meanwhile()
            token = self.tokens.get(len(self.lengths), self.otherwise)
            self.lengths.append(len(inputs["embeddings"]))
        found = self.stream.run(graph, inputs)
        if graph == "decoder" and token is not None:
            found["logits"][token] = 1e6
        return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    model = decoder_models.qwen2_5_vl()
    return dialogue_models.export(model, tmp_path_factory.mktemp("conversation"), capacity=448, chunk=448)


@pytest.fixture
def session(bundle):
    with framestep.load(bundle.path) as opened:
        yield opened


def letters(text: str) -> list[int]:
    return dialogue_models.byte_tokenizer().encode(text, add_special_tokens=False).ids


def wait_for(condition) -> None:
    import time

    limit = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def slow_conversation(session, frames_per_token: int, tokens: list[int]):
    """A camera that gives frames only while the decoder generates, each a second after the one before."""
    clock = Clock()
    camera = Camera(clock)
    conversation = Conversation(session, camera, DialogueOptions(system=SYSTEM), clock)

    def meanwhile() -> None:
        for _ in range(frames_per_token):
            clock.now += 1.0
            before = conversation._watcher.encoded
            camera.let_go()
            wait_for(lambda before=before: conversation._watcher.encoded > before)

    told = Told(conversation.dialogue.decoder._stream, tokens, SILENCE, meanwhile)
    conversation.dialogue.decoder._stream = told
    return conversation, camera, told, clock


def test_frames_are_encoded_during_an_answer_and_caught_up_in_one_prefill(session):
    conversation, camera, told, clock = slow_conversation(session, 1, [RESPONSE, *letters("abc"), dialogue_models.END])
    with conversation:
        conversation.ask("What?")
        camera.let_go()
        events = []
        for event in conversation:
            events.append(event)
            if isinstance(event, Answer):
                wait_for(lambda: len(conversation._watcher._turns) == 4)
            if isinstance(event, Decision) and event.turn == 4:
                break
        assert conversation._watcher.encoded == 5
    answer = next(event for event in events if isinstance(event, Answer))
    assert (answer.text, answer.reason) == ("abc", "stop")
    # `</Response>` and three letters, a second and a frame each; the first letter came after the first of them
    assert answer.first_token == pytest.approx(1.0)
    assert answer.seconds == pytest.approx(4.0)
    decisions = [event for event in events if isinstance(event, Decision)]
    assert [event.turn for event in decisions] == [0, 1, 2, 3, 4]
    assert [event.probabilities is None for event in decisions] == [False, True, True, True, False]
    assert len(told.lengths) == 1 + 4 + 1
    assert [event.lag for event in decisions] == [0.0, *(clock.now - camera.captured[turn] for turn in (1, 2, 3, 4))]
    assert [event.lag for event in decisions[1:]] == [3.0, 2.0, 1.0, 0.0]
    assert not [event for event in events if isinstance(event, Notice)]


def test_a_camera_that_is_faster_loses_its_oldest_turns_and_says_so(session):
    conversation, camera, *_ = slow_conversation(session, 3, [RESPONSE, *letters("abc"), dialogue_models.END])
    with conversation:
        conversation.ask("What?")
        camera.let_go()
        events = []
        for event in conversation:
            events.append(event)
            if isinstance(event, Answer):
                wait_for(lambda: conversation._watcher.dropped == 12 - WAITING_TURNS)
            if isinstance(event, Decision) and event.turn == 12:
                break
        assert conversation.dropped == 12 - WAITING_TURNS
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert notice.text == "4 turns dropped: the source is faster than the model"
    assert [event.turn for event in events if isinstance(event, Decision)] == [0, *range(5, 13)]


@pytest.mark.parametrize("rate", [1.0, 2.0])
def test_every_turn_of_a_file_is_decided(session, rate):
    film = Film(np.arange(round(6 * rate)) / rate)
    options = DialogueOptions(system=SYSTEM, rate=rate, max_tokens=2)
    with Conversation(session, film, options) as conversation:
        sizes = []
        take = conversation.dialogue.take
        conversation.dialogue.take = lambda turns: sizes.extend(len(seen.visual) for seen in turns) or take(turns)
        conversation.ask("What?")
        events = list(conversation)
    decisions = [event for event in events if isinstance(event, Decision)]
    assert [event.turn for event in decisions] == list(range(6))
    assert all(event.probabilities is not None and event.lag is None for event in decisions)
    assert sizes == [round(rate)] * 6


def test_of_a_file_the_first_token_counts_from_when_the_turn_was_taken(session):
    clock = Clock()
    conversation = Conversation(session, Film(range(2), clock), DialogueOptions(system=SYSTEM), clock)

    def meanwhile() -> None:
        clock.now += 1.0
        wait_for(lambda: conversation._watcher.encoded == 2)  # the second frame waits

    tokens = [RESPONSE, *letters("abc"), dialogue_models.END]
    told = Told(conversation.dialogue.decoder._stream, tokens * 2, SILENCE, meanwhile)
    conversation.dialogue.decoder._stream = told
    with conversation:
        conversation.ask("What?")
        answers = [event for event in conversation if isinstance(event, Answer)]
    assert [answer.first_token for answer in answers] == [1.0, 1.0]


def test_turns_have_the_frames_of_their_time(session):
    # the first has one frame too few, the second one too many, the third none, the last is not over
    film = Film([0.0, 1.0, 1.5, 1.9, 3.0, 3.5, 4.2])
    with Conversation(session, film, DialogueOptions(system=SYSTEM, rate=2.0)) as conversation:
        taken = []
        conversation.dialogue.take = lambda turns: taken.extend(turns) or iter(())
        list(conversation)
    assert [(seen.number, len(seen.visual)) for seen in taken] == [(0, 1), (1, 2), (3, 2), (4, 1)]
    assert [(seen.start, seen.stop) for seen in taken] == [(0.0, 1.0), (1.0, 2.0), (3.0, 4.0), (4.0, 5.0)]


@pytest.mark.parametrize("rate, fps", [(1.0, 30.0), (2.0, 29.97), (1.0, 15.0)])
def test_no_turn_is_lost_where_frames_come_a_little_early(session, rate, fps):
    sampler, jitter = Sampler(rate, tolerance(fps)), np.random.default_rng(0).normal(0, 0.002, round(20 * fps))
    times = [time for time in np.arange(len(jitter)) / fps + jitter - jitter[0] if sampler.due(time)]
    film = Film(times)
    film.fps = fps
    with Conversation(session, film, DialogueOptions(system=SYSTEM, rate=rate)) as conversation:
        taken = []
        conversation.dialogue.take = lambda turns: taken.extend(turns) or iter(())
        list(conversation)
    assert min(times[round(rate) :: round(rate)] - np.arange(1, 20)) < -1e-3  # some do
    assert [seen.number for seen in taken] == list(range(20))


def test_turns_whose_frames_came_too_fast_to_be_read_count_as_dropped(session):
    class Fast(Film):
        """Two frames in three are replaced before they are read."""

        live = True

        def read(self, timeout=None):
            frame = super().read(timeout)
            self.dropped = 2 * len(self.captured) - 2
            return frame

    with Conversation(session, Fast(range(0, 30, 3)), DialogueOptions(system=SYSTEM)) as conversation:
        events = list(conversation)
        decided = [event for event in events if isinstance(event, Decision)]
        assert conversation.dropped == 28 - len(decided)
    told = [int(event.text.split()[0]) for event in events if isinstance(event, Notice)]
    assert sum(told) == conversation.dropped


def test_questions_that_came_too_late_are_told(session):
    options = DialogueOptions(system=SYSTEM)
    *_, notice = framestep.converse(session, Film(range(2)), [Question("What?", 2.0)], options)
    assert notice == Notice(2.0, "the source has ended; 'What?' was not asked")


def test_converse_asks_at_the_time_of_each_question(session):
    questions = ["What?", Question("And now?", 2.5)]
    options = DialogueOptions(system=SYSTEM, max_tokens=2)
    events = list(framestep.converse(session, Film(range(4)), questions, options))
    assert [event for event in events if isinstance(event, Asked)] == [Asked(1.0, "What?"), Asked(3.0, "And now?")]
    assert len([event for event in events if isinstance(event, Decision)]) == 4
    assert session.open_stream().slot == 0  # the place was given back


def test_one_text_is_no_list_of_questions(session):
    with pytest.raises(FramestepError, match=r"expected a list of texts, found the text 'What\?'; write \['What\?'\]"):
        next(framestep.converse(session, Film(range(2)), "What?"))


def test_a_source_that_breaks_ends_the_conversation_with_its_error(session):
    class Broken(Film):
        def read(self, timeout=None):
            if len(self.captured) == 2:
                raise SourceError("camera 0: lost")
            return super().read(timeout)

    events = []
    with pytest.raises(SourceError, match="camera 0: lost"):
        events.extend(framestep.converse(session, Broken(range(5)), [], DialogueOptions(system=SYSTEM)))
    with Conversation(session, Broken(range(5)), DialogueOptions(system=SYSTEM)) as conversation:
        with pytest.raises(SourceError):
            events.extend(conversation)
    assert [event.turn for event in events] == [0, 1, 0, 1]


def test_a_frame_without_finite_output_is_left_out(session, monkeypatch):
    from framestep.runtime.session import NonFiniteOutputError, Stream

    step, count = Stream.step, []

    def broken(stream, rgb):
        count.append(None)
        if len(count) == 2:
            raise NonFiniteOutputError((stream,), ("visual",), {})
        return step(stream, rgb)

    monkeypatch.setattr(Stream, "step", broken)
    events = list(framestep.converse(session, Film(range(3)), [], DialogueOptions(system=SYSTEM)))
    assert [event.turn for event in events if isinstance(event, Decision)] == [0, 2]
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert notice.text.startswith("frame 1 left out: stream 0: the model gave NaN")


def test_a_camera_without_any_finite_output_is_told_of_at_once(session, monkeypatch):
    from framestep.runtime.session import NonFiniteOutputError, Stream

    def broken(stream, rgb):
        raise NonFiniteOutputError((stream,), ("visual",), {})

    monkeypatch.setattr(Stream, "step", broken)
    camera = Camera(Clock())
    camera.let_go(2)
    with Conversation(session, camera, DialogueOptions(system=SYSTEM)) as conversation:
        events = iter(conversation)
        assert [next(events).text[:17] for _ in range(2)] == ["frame 0 left out:", "frame 1 left out:"]


def test_it_can_be_stopped_from_another_thread(session):
    camera = Camera(Clock())
    with Conversation(session, camera, DialogueOptions(system=SYSTEM)) as conversation:
        camera.let_go()
        events = []
        for event in conversation:
            events.append(event)
            conversation.ask_to_stop()
            camera.let_go(5)
        assert len(events) == 1


def test_sessions_and_bundles_that_cannot_converse_say_so(bundle, tmp_path, golden_bundle):
    with framestep.load(golden_bundle) as session, pytest.raises(EngineError, match="has no language decoder"):
        Conversation(session, Film([]))
    with framestep.load(bundle.path, graphs=()) as session, pytest.raises(EngineError, match="without the decoder"):
        Conversation(session, Film([]))
    blind = dialogue_models.export(decoder_models.qwen2(), tmp_path, capacity=64)
    with framestep.load(blind.path) as session, pytest.raises(EngineError, match="a decoder without eyes"):
        Conversation(session, Film([]))


def test_a_bundle_without_tokenizer_says_so(tmp_path):
    checkpoint = read_decoder_checkpoint(str(decoder_models.save(decoder_models.qwen2_5_vl(), tmp_path / "checkpoint")))
    path = export_decoder(checkpoint, tmp_path / "out.bundle", DecoderOptions(capacity=64, frame_size=FRAME)).path
    with framestep.load(path) as session, pytest.raises(FramestepError, match="has no tokenizer"):
        Conversation(session, Film([]))


def test_a_capacity_smaller_than_one_turn_is_refused(tmp_path):
    small = dialogue_models.export(decoder_models.qwen2_5_vl(), tmp_path, capacity=48)
    with framestep.load(small.path) as session:
        with pytest.raises(
            FramestepError, match=r"a dialogue does not fit: the cache holds 48 tokens; .* a turn \d+; export"
        ):
            Conversation(session, Film([]), DialogueOptions(system=SYSTEM))
        assert session.open_stream().slot == 0


def test_a_model_without_the_states_answers_when_it_is_asked(tmp_path):
    model = decoder_models.qwen2_5_vl()
    plain = dialogue_models.export(model, tmp_path, states=False, capacity=256)
    options = DialogueOptions(max_tokens=3, frames=2)
    with framestep.load(plain.path) as session:
        events = list(framestep.converse(session, Film(range(4)), [Question("What?", 2.0)], options))
        notice, asked, *said = events
        assert "does not decide when to speak" in notice.text
        assert asked == Asked(3.0, "What?")
        assert isinstance(said[-1], Answer)
        assert all(isinstance(event, AnswerText) for event in said[:-1])
        with pytest.raises(
            FramestepError, match="200 frames of 2 tokens and a question do not fit: the cache holds 256"
        ):
            Conversation(session, Film([]), DialogueOptions(frames=200))
        with Conversation(session, Film([]), options) as conversation:
            message = r"the question of 12\d\d tokens does not fit: the cache holds 256; export .* larger --capacity"
            with pytest.raises(FramestepError, match=message):
                conversation.ask("why " * 300)
            assert conversation.questions() == {}
        unheard = {"prune": 0.9, "eviction": "cut", "response_from": 0.5, "standby_from": 0.5, "words_per_second": 2.0}
        for name, value in unheard.items():
            with pytest.raises(FramestepError, match=rf"^{name}: .* model .*; leave the option out$"):
                Conversation(session, Film([]), DialogueOptions(**{name: value}))
        assert session.open_stream().slot == 0  # each gave its place back


def test_a_model_that_is_asked_survives_nan_and_leaves_out_what_is_withdrawn(tmp_path):
    from framestep.runtime.session import NonFiniteOutputError

    plain = dialogue_models.export(decoder_models.qwen2_5_vl(), tmp_path, states=False, capacity=256)
    with framestep.load(plain.path) as session:
        with Conversation(session, Film(range(6)), DialogueOptions(max_tokens=2, frames=1)) as conversation:
            numbers = [conversation.ask(Question(text, 1.0 + at)) for at, text in enumerate(("One?", "Two?", "Three?"))]
            assert conversation.questions() == dict(zip(numbers, ("One?", "Two?", "Three?"), strict=True))
            assert not conversation.withdraw(numbers[1])
            take = conversation.decoder.take

            def fail_once(pieces):
                conversation.decoder.take = take
                raise NonFiniteOutputError((conversation._stream,), ("logits",), {})

            conversation.decoder.take = fail_once
            events = list(conversation)
    assert [event.text for event in events if isinstance(event, Asked)] == ["One?", "Three?"]
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert notice.time == 2.0 and "NaN or infinity in logits" in notice.text
    assert sum(isinstance(event, Answer) for event in events) == 1


def test_a_question_that_leaves_no_room_for_all_frames_says_so(tmp_path):
    plain = dialogue_models.export(decoder_models.qwen2_5_vl(), tmp_path, states=False, capacity=160)
    options = DialogueOptions(system="", max_tokens=5)
    with framestep.load(plain.path) as session:
        questions = [Question("What?", 7.0), Question("What? " * 20, 9.0)]
        with Conversation(session, Film(range(10)), options) as conversation:
            for question in questions:
                conversation.ask(question)
            events = list(conversation)
        assert next(event.reason for event in events if isinstance(event, Answer)) != "capacity"
        (notice,) = [event for event in events if isinstance(event, Notice)]
        assert notice.text == "asked about 5 frames, not 8: the cache holds no more"
        # where nobody says how many, a quarter of the cache is left to an answer
        with Conversation(session, Film([]), DialogueOptions(system="x" * 80)) as conversation:
            assert conversation.dialogue.frames == 4
        with Conversation(session, Film([]), DialogueOptions(system="x" * 80, frames=8)) as conversation:
            assert conversation.dialogue.frames == 8


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed,"
    " and polite answers to the user's questions. "
)


@pytest.mark.parametrize("kind, chat", [("qwen2", "chatml"), ("llama", "vicuna")])
def test_video_question_answering_gives_the_logits_of_a_plain_composition(tmp_path, kind, chat):
    decoder = getattr(decoder_models, kind)()
    tower = StreamFormerConfig((64, 64), 16, 8, 32, 2, 2, 64)
    model, weights = decoder_models.save_streamformer_videoqa(
        tmp_path, decoder, tower, mm_spatial_pool_mode="average", mm_newline_position="one_token"
    )
    tokenizer = dialogue_models.byte_tokenizer(states=False, chat=chat == "chatml")
    tokenizer.save(str(tmp_path / "checkpoint" / "tokenizer.json"))
    checkpoint = read_decoder_checkpoint(str(tmp_path / "checkpoint"))
    bundle = Bundle.open(
        export_decoder(checkpoint, tmp_path / "out.bundle", DecoderOptions(capacity=400, window=4)).path
    )
    assert bundle.manifest.language.chat == chat
    film = Film(range(7))
    film.size = (64, 64)
    questions = [Question("What?", 2.0), Question("And now?", 5.0)]
    with framestep.load(bundle.path) as session:
        with Conversation(session, film, DialogueOptions(frames=3, max_tokens=2)) as conversation:
            recorded = dialogue_models.Recorded(conversation.dialogue.decoder._stream)
            conversation.dialogue.decoder._stream = recorded
            for question in questions:
                conversation.ask(question)
            answers = [event for event in conversation if isinstance(event, Answer)]
    assert len(answers) == 2
    chunks = [step for step, length in enumerate(recorded.lengths) if length > 1]
    prompts = [step for step in chunks if step + 1 not in chunks]  # the last step of each prompt
    frames = [np.random.default_rng(index).integers(0, 256, (64, 64, 3), np.uint8) for index in range(7)]
    features, cache = [], None
    with torch.inference_mode():
        for index, frame in enumerate(frames):
            new, _, cache = model(torch.from_numpy(frame)[None, None], cache, 4, index)
            features.append(new[0, 0])
        w = {key.removeprefix("model.mm_projector."): value for key, value in weights.items()}
        table = decoder.get_input_embeddings()
        for step, question, last in zip(prompts, ("What?", "And now?"), (2, 5), strict=True):
            x = torch.stack(features[last - 2 : last + 1])
            x = F.linear(F.gelu(F.linear(x, w["0.weight"], w["0.bias"])), w["2.weight"], w["2.bias"])
            x = F.avg_pool2d(x.transpose(1, 2).unflatten(2, (4, 4)), 2).flatten(2).transpose(1, 2).flatten(0, 1)
            visual = torch.cat([x, w["model.image_newline"][None]])
            if chat == "chatml":
                before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
                after = f"\n{question}<|im_end|>\n<|im_start|>assistant\n"
            else:
                before, after = f"{VICUNA}USER: ", f"\n{question} ASSISTANT:"
            ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in (before, after)]
            if chat == "vicuna":
                ids[0] = [1, *ids[0]]  # the beginning of a Llama's text
            pieces = [table(torch.tensor(ids[0])), visual, table(torch.tensor(ids[1]))]
            expected = decoder(inputs_embeds=torch.cat(pieces)[None]).logits[0, -1].numpy()
            golden.assert_close(recorded.logits[step], expected)
