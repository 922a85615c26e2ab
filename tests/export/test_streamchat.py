"""StreamChat's step graphs against a full recompute in plain PyTorch, and against `transformers` where gates are closed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import decoder_models
import golden
import numpy as np
import onnx
import onnxruntime
import pytest
import streamchat_models
import torch
from streamchat_models import PATCHES, random_frames
from streamchat_oracle import Oracle

from framestep.export import decoder_export, decoder_replay
from framestep.export.decoder_export import ROUNDING
from framestep.export.precision import Precision
from framestep.export.streamchat import visible_frames
from framestep.export.streamchat_checkpoint import read_streamchat_checkpoint
from framestep.export.streamchat_export import StreamChatOptions, StreamChatRun, export_streamchat, replay
from framestep.runtime.bundle import Bundle
from framestep.runtime.errors import FramestepError

CAPACITY, WINDOW = 64, 3


def export(checkpoint: Path, precision: str = "fp32", window: int = WINDOW) -> Bundle:
    """A bundle in a precision, made once."""
    path = checkpoint.parent / f"{precision}-{window}.bundle"
    if not path.exists():
        options = StreamChatOptions(precision, CAPACITY, window=window, rate=2.0)
        export_streamchat(read_streamchat_checkpoint(str(checkpoint)), path, options)
    return Bundle.open(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return streamchat_models.save(tmp_path_factory.mktemp("streamchat"))


@pytest.fixture(scope="module")
def bundle(checkpoint) -> Bundle:
    return export(checkpoint)


@dataclass
class Scene:
    """Text and frames as they come, through the graphs; what happened is written down for the oracle."""

    run: StreamChatRun
    literal: bool = False
    clock: int = 0
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)  # of frames
    firsts: list[int] = field(default_factory=list)  # the first token that sees each frame
    logits: dict[int, np.ndarray] = field(default_factory=dict)  # by token
    shift: int = 0  # by which positions were re-based

    def __post_init__(self) -> None:
        self.frames = random_frames(40)
        self.words = np.random.default_rng(3).integers(0, decoder_models.VOCABULARY, 200)

    def frame(self, commit: bool = True) -> None:
        """One frame comes, between tokens."""
        index = len(self.times)
        rows, columns = np.indices((2, 2)).reshape(2, -1)
        time = self.clock - self.shift
        places = [np.full(4, time), rows, columns] if self.literal else [time + 0 * rows, time + rows, time + columns]
        self.run.see(self.frames[index], index % self.run.frames, np.stack(places)[None])
        if commit:
            self.times.append(self.clock)
            self.firsts.append(len(self.tokens))

    def idle_frame(self) -> None:
        """One frame comes while nothing is said."""
        self.clock += 1
        self.frame()

    def text(self, *chunks: int) -> None:
        """Tokens come, in chunks that see the same frames."""
        for count in chunks:
            at, window = len(self.tokens), self.run.frames - 1
            seen = np.arange(len(self.times))[-window:] % self.run.frames
            new = self.words[at : at + count]
            places = np.arange(self.clock, self.clock + count)
            mask, visible = np.arange(self.run.capacity) < at, np.isin(np.arange(self.run.frames), seen)
            logits = self.run.step(new[None], places[None] - self.shift, at, mask, visible)
            self.tokens += new.tolist()
            self.positions += places.tolist()
            self.clock += count
            self.logits[len(self.tokens) - 1] = logits

    def visible(self) -> np.ndarray:
        return visible_frames(self.firsts, len(self.tokens), self.run.frames - 1)

    def check(self, oracle: Oracle) -> None:
        arrays = np.array(self.tokens), np.array(self.positions), self.frames[: len(self.times)], np.array(self.times)
        expected = oracle.logits(*arrays, self.visible())
        rows = list(self.logits)
        golden.assert_close(np.stack([self.logits[row] for row in rows]), expected[rows])


def rebase(run: StreamChatRun, slot_positions: np.ndarray, shift: np.ndarray) -> None:
    run.run("rebase", {"slot_positions": slot_positions})
    run.run("rebase_frames", {"position_shift": shift})


def play(scene: Scene) -> None:
    """A question in chunks, an answer among frames, until the ring has wrapped twice; one more question."""
    for _ in range(2):
        scene.idle_frame()
    scene.text(4, 3, 1)
    for frames in (1, 0, 2, 0, 0, 1, 1, 0, 1):
        for _ in range(frames):
            scene.frame()
        scene.text(1)
    scene.idle_frame()
    scene.idle_frame()
    scene.text(2, 5)
    scene.frame()
    scene.text(1)
    scene.text(1)


@pytest.mark.parametrize("window", [2, 3, 8])
def test_tokens_among_frames_equal_a_full_recompute(checkpoint, window):
    scene = Scene(StreamChatRun(export(checkpoint, window=window)))
    play(scene)
    scene.check(Oracle(checkpoint))


@pytest.mark.parametrize(
    "choice",
    [{"cross": (1, 2, 3)}, {"positions": "literal", "tie_word_embeddings": False}],
    ids=str,
)
def test_other_models_equal_a_full_recompute(tmp_path, choice):
    folder = streamchat_models.save(tmp_path, **choice)
    scene = Scene(StreamChatRun(export(folder)), literal=choice.get("positions") == "literal")
    play(scene)
    scene.check(Oracle(folder))


def test_text_before_the_first_frame_sees_nothing(checkpoint, bundle):
    scene = Scene(StreamChatRun(bundle))
    scene.frame(commit=False)
    scene.text(6)
    scene.text(1)
    scene.frames[0] = scene.frames[1]
    scene.frame()
    scene.text(1)
    assert not scene.visible()[:7].any()
    scene.check(Oracle(checkpoint))
    plain = decoder_models.qwen2(num_hidden_layers=streamchat_models.LAYERS, max_position_embeddings=32768,
                                 rope_theta=1e6)  # fmt: skip
    with torch.inference_mode():
        expected = plain(torch.tensor([scene.tokens[:7]])).logits[0].numpy()
    golden.assert_close(np.stack([scene.logits[5], scene.logits[6]]), expected[[5, 6]])


def test_with_closed_gates_it_is_the_qwen_that_it_was_made_of(tmp_path):
    folder = streamchat_models.save(tmp_path)
    streamchat_models.change_weights(folder, lambda name, value: value * (not name.endswith("attention_gate")))
    scene = Scene(StreamChatRun(export(folder)))
    play(scene)
    with torch.inference_mode():
        tokens, positions = torch.tensor([scene.tokens]), torch.tensor([scene.positions])
        expected = streamchat_models.qwen()(tokens, position_ids=positions).logits[0].numpy()
    rows = list(scene.logits)
    golden.assert_close(np.stack([scene.logits[row] for row in rows]), expected[rows])


def test_a_committed_frame_changes_the_next_token_and_none_before(bundle):
    scenes = [Scene(StreamChatRun(bundle)) for _ in range(2)]
    for index, scene in enumerate(scenes):
        scene.frame()
        scene.text(5)
        scene.text(1)
        if index:
            scene.frame()
        scene.text(1)
    without, with_one = (scene.logits for scene in scenes)
    assert np.array_equal(without[4], with_one[4])
    assert np.array_equal(without[5], with_one[5])
    assert np.abs(without[6] - with_one[6]).max() > 0.01


def test_a_frame_that_is_being_encoded_changes_nothing(bundle):
    scenes = [Scene(StreamChatRun(bundle)) for _ in range(2)]
    for index, scene in enumerate(scenes):
        for _ in range(3):
            scene.frame()
        scene.text(5)
        if index:  # the encoder was stopped halfway: of the hidden slot some blocks and rows are written
            rows = slice(3 * PATCHES, 3 * PATCHES + 2)
            scene.run.states["visual.block0.key"][:, :, rows] = 1e3
            scene.run.states["visual.block0.value"][:, :, rows] = -1e3
        scene.text(1)
    assert np.array_equal(scenes[0].logits[5], scenes[1].logits[5])


@pytest.mark.parametrize("precision, bound", [("fp32", 2e-4), ("fp16", 0.2)])
def test_rebasing_far_out_changes_nothing(checkpoint, precision, bound):
    scene = Scene(StreamChatRun(export(checkpoint, precision=precision)))
    scene.clock, apart = 20_500, 20_481
    play_halves = (scene.idle_frame, scene.idle_frame, lambda: scene.text(4, 3), scene.frame, lambda: scene.text(1))
    for step in play_halves:
        step()
    slots = np.zeros((1, 1, CAPACITY), np.int64)
    slots[0, 0, : len(scene.positions)] = np.array(scene.positions) - apart
    rebase(scene.run, slots, np.array([apart]))
    scene.shift = apart
    for step in (lambda: scene.text(1), scene.frame, lambda: scene.text(1), scene.idle_frame, lambda: scene.text(3, 1)):
        step()
    arrays = np.array(scene.tokens), np.array(scene.positions), scene.frames[: len(scene.times)], np.array(scene.times)
    expected, rows = Oracle(checkpoint).logits(*arrays, scene.visible()), list(scene.logits)
    golden.assert_close(np.stack([scene.logits[row] for row in rows]), expected[rows], bound)


def test_closing_the_gap_after_the_pinned_block_is_what_the_oracle_does_at_the_new_positions(checkpoint, bundle):
    scene = Scene(StreamChatRun(bundle))
    scene.text(5)  # pinned
    scene.clock += 900
    scene.frame()
    scene.text(4)
    scene.frame()
    scene.text(1)
    before, gap, pinned = len(scene.tokens), 890, 5
    old, old_times = np.array(scene.positions), np.array(scene.times)
    moved = np.where(np.arange(before) < pinned, old, old - gap)
    slots = np.zeros((1, 1, CAPACITY), np.int64)
    slots[0, 0, :before] = moved
    rebase(scene.run, slots, np.array([gap]))
    scene.clock -= gap
    scene.text(2)
    scene.frame()
    scene.text(1)
    T, M = len(scene.tokens), len(scene.times)
    positions = np.tile(np.concatenate([moved, scene.positions[before:]]), (T, 1))
    times = np.tile(np.concatenate([old_times - gap, scene.times[len(old_times) :]]), (T, 1))
    positions[:before, :before] = old
    times[:before, : len(old_times)] = old_times
    expected = Oracle(checkpoint).logits(np.array(scene.tokens), positions, scene.frames[:M], times, scene.visible())
    rows = list(scene.logits)
    golden.assert_close(np.stack([scene.logits[row] for row in rows]), expected[rows])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w4", "fp16+w4"])
def test_states_are_updated_in_place(checkpoint, capfd, precision):
    bundle = export(checkpoint, precision=precision)
    scene = Scene(StreamChatRun(bundle))
    play(scene)
    slots = np.zeros((1, 1, CAPACITY), np.int64)
    rebase(scene.run, slots, np.array([1]))
    assert "in-place optimization not activated" not in capfd.readouterr().err


@pytest.mark.parametrize("graph, products", [("decoder", 4 * 7 + 1 + 2 * 2), ("frame", 2 * 6 + 2 + 2 * 2 + 3)])
def test_integer_weights_are_multiplied_as_integers(checkpoint, tmp_path, graph, products):
    bundle = export(checkpoint, precision="w4")
    options = decoder_replay.session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(bundle.file(f"{graph}.onnx")), options, ["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    kinds = Counter(node.op_type for node in optimized.graph.node)
    assert kinds["MatMulNBits"] == products
    assert kinds["DequantizeLinear"] == 0


@pytest.mark.parametrize(("precision", "bound"), [("w8", 1e-4), ("w4", 1e-4), ("fp16+w4", 1e-2)])
def test_an_export_compares_with_what_its_integers_stand_for(checkpoint, precision, bound):
    read = read_streamchat_checkpoint(str(checkpoint))
    found = replay(read, export(checkpoint, precision=precision))
    assert found.difference < bound and 0.45 < found.rounding <= ROUNDING[precision]
    assert found.quantization > 10 * found.difference
    assert (found.seeing > 1e-3) == (precision in ("w8", "w4"))
    assert replay(read, export(checkpoint)).difference < 1e-4  # the checkpoint is as it was


def test_beside_integer_weights_the_tower_has_eight_bits(tmp_path):
    folder = streamchat_models.save(tmp_path)
    without = "self_attn.v_proj.bias"  # it goes through the output's weight before that is rounded
    streamchat_models.change_weights(
        folder, lambda name, value: value * (not (name.startswith("vision_model.") and name.endswith(without)))
    )
    scene, oracle = Scene(StreamChatRun(export(folder, "w8"), decoder_replay.EXACT_LEVEL)), Oracle(folder)
    play(scene)
    with torch.no_grad():
        for name, part in oracle.tower.named_modules():
            if isinstance(part, torch.nn.Linear) and ".head." not in name:
                part.weight.copy_(decoder_models.rounded(part.weight.float()))
        for name, bias in oracle.tower.named_parameters():
            if name.endswith(without):
                bias.zero_()
    matrices = {name: value for name, value in oracle.w.items() if value.ndim == 2 and "vision_model." not in name}
    oracle.w |= {name: decoder_models.rounded(value.float()).double() for name, value in matrices.items()}
    scene.check(oracle)


def test_a_tower_that_sees_something_else_is_not_kept(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(decoder_export.SEEING_AGREEMENT, "w8", 1e-4)  # its integers move it by more
    options = StreamChatOptions("w8", CAPACITY, window=WINDOW, rate=2.0)
    with pytest.raises(FramestepError, match=r"not kept, .* against PyTorch in what it sees .* in w8"):
        export_streamchat(read_streamchat_checkpoint(str(checkpoint)), tmp_path / "out.bundle", options)


@pytest.mark.parametrize(
    "layer", ["layer1.down", "block0.down", "block0.up", "layer0.value", "siglip.layer1.fc2", "adapter.fc1"]
)
def test_integers_that_are_read_with_another_scale_are_found(checkpoint, tmp_path, monkeypatch, layer):
    def write(self, g, name, weight, *stored):
        return original(self, g, name, weight * 1.02 if name == layer else weight, *stored)

    original = Precision._weight
    monkeypatch.setattr(Precision, "_weight", write)
    options = StreamChatOptions("w8", CAPACITY, window=WINDOW, rate=2.0)
    with pytest.raises(FramestepError, match=r"not kept, a weight in w8 is .* steps off"):
        export_streamchat(read_streamchat_checkpoint(str(checkpoint)), tmp_path / "out.bundle", options)


@pytest.mark.parametrize("precision", ["fp32", "w8"])
def test_weights_of_a_cross_block_are_stored_once(checkpoint, precision):
    bundle = export(checkpoint, precision=precision)
    places = {}
    for name in ("decoder", "frame"):
        for item in onnx.load(bundle.file(f"{name}.onnx"), load_external_data=False).graph.initializer:
            if item.data_location == onnx.TensorProto.EXTERNAL:
                data = {entry.key: entry.value for entry in item.external_data}
                places[name, item.name] = data["location"], data["offset"]
    for part in ("query", "output"):
        assert places["decoder", f"layer0.cross_{part}.weight"] == places["decoder", f"layer0.{part}.weight"]
    for part in ("key", "value"):
        assert places["frame", f"layer2.{part}.weight"] == places["decoder", f"layer2.{part}.weight"]


def test_a_frame_graph_writes_one_slot_and_reads_no_text(checkpoint, bundle):
    run = StreamChatRun(bundle)
    run.see(random_frames(1)[0], 2, np.zeros((1, 3, PATCHES), np.int64))
    for name, state in run.states.items():
        written = np.flatnonzero(state.any(axis=(0, 1, 3)))
        assert written.tolist() == (list(range(2 * PATCHES, 3 * PATCHES)) if name.startswith("visual.") else [])
    uses = {use.state for use in bundle.manifest.graphs["frame"].states}
    assert uses == {f"visual.block{k}.{part}" for k in range(2) for part in ("key", "value")}
