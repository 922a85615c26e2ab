"""Decoder bundles against `transformers`: prefill, decoding, chunks, pictures, forgotten slots, other positions."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import decoder_models
import golden
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from framestep.export import decoder_replay
from framestep.export.block_quantize import dequantize_blocks, quantize_blocks, steps_off
from framestep.export.decoder import Decoder
from framestep.export.decoder_checkpoint import read_decoder_checkpoint
from framestep.export.decoder_export import ROUNDING, DecoderOptions, export_decoder
from framestep.export.decoder_replay import DecoderRun, replay
from framestep.export.precision import Precision
from framestep.runtime.bundle import Bundle
from framestep.runtime.errors import FramestepError

CAPACITY = 64
TOKENS = 40
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
MODELS = {
    "qwen2, tied": lambda: decoder_models.qwen2(),
    "qwen2, untied": lambda: decoder_models.qwen2(tie_word_embeddings=False),
    "llama": lambda: decoder_models.llama(),
    "llama, wide heads": lambda: decoder_models.llama(head_dim=24),
    "llama, linear": lambda: decoder_models.llama(rope_parameters=LINEAR),
    "llama, llama3": lambda: decoder_models.llama(rope_parameters=LLAMA3),
}


def export(model: object, folder: Path, **options: object) -> Bundle:
    checkpoint = read_decoder_checkpoint(str(decoder_models.save(model, folder / "checkpoint")))
    report = export_decoder(checkpoint, folder / "out.bundle", DecoderOptions(**{"capacity": CAPACITY, **options}))
    return Bundle.open(report.path)


def random_tokens(count: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(0).integers(0, decoder_models.VOCABULARY, (1, count))


def run_tokens(run: DecoderRun, tokens: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Logits after each of some steps that take `tokens` [1, T], from slot and position 0 on."""
    at, logits = 0, []
    for length in lengths:
        embeddings = run.embed(tokens[:, at : at + length])
        position_ids = np.arange(at, at + length)[None, None]
        logits.append(run.step(embeddings, position_ids, at, np.arange(run.capacity) < at))
        at += length
    return np.stack(logits)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model by name and its bundle in a precision, each made once."""
    made = {}

    def get(kind: str, precision: str = "fp32") -> tuple[object, Bundle]:
        if (kind, precision) not in made:
            model = MODELS[kind]()
            made[kind, precision] = model, export(model, tmp_path_factory.mktemp("bundle"), precision=precision)
        return made[kind, precision]

    return get


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("lengths", [[TOKENS], [1] * TOKENS, [16, 16, 8], [7, 1, 1, 30, 1]], ids=str)
def test_logits_are_those_of_transformers(exported, kind, lengths):
    model, bundle = exported(kind)
    with torch.inference_mode():
        expected = model(torch.from_numpy(random_tokens())).logits[0].numpy()
    golden.assert_close(run_tokens(DecoderRun(bundle), random_tokens(), lengths), expected[np.cumsum(lengths) - 1])


def test_forgotten_slots_are_unseen_and_used_again(exported):
    model, bundle = exported("qwen2, tied")
    tokens, run = random_tokens(30), DecoderRun(bundle)
    forgotten, first = slice(4, 11), run_tokens(run, random_tokens(30)[:, :20], [20])
    mask = np.arange(run.capacity) < 20
    mask[forgotten] = False
    seen = np.tril(np.ones((30, 30), bool))
    seen[20:, forgotten] = False
    found = [first[0]]
    for at, length, slot in ((20, 3, 4), (23, 4, 7), (27, 3, 20)):  # the last three go behind the others
        embeddings = run.embed(tokens[:, at : at + length])
        found.append(run.step(embeddings, np.arange(at, at + length)[None, None], slot, mask))
        mask[slot : slot + length] = True
    with torch.inference_mode():
        bias = torch.zeros(1, 1, 30, 30).masked_fill(~torch.from_numpy(seen), -torch.inf)
        expected = model(torch.from_numpy(tokens), attention_mask=bias).logits[0].numpy()
    golden.assert_close(np.stack(found), expected[[19, 22, 26, 29]])


def test_bits_of_the_slots_that_a_step_writes_do_not_matter(exported):
    _, bundle = exported("llama")
    logits = []
    for bits in (False, True):
        run = DecoderRun(bundle)
        run_tokens(run, random_tokens(), [TOKENS])  # what an earlier turn left in the slots
        mask = np.zeros(CAPACITY, bool)
        mask[10:20] = bits
        logits.append(run.step(run.embed(random_tokens(10)), np.arange(10)[None, None], 10, mask))
    assert np.array_equal(*logits)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_rebased_keys_are_those_of_the_new_positions_however_often(exported, precision):
    _, bundle = exported("qwen2, tied", precision)
    run, fresh = DecoderRun(bundle), DecoderRun(bundle)
    tokens, generator = random_tokens(CAPACITY), np.random.default_rng(1)
    positions = np.sort(generator.integers(0, 512, (1, 1, CAPACITY)), axis=2)
    run_tokens(run, tokens, [CAPACITY])
    fresh.step(fresh.embed(tokens), positions, 0, np.zeros(CAPACITY, bool))
    for _ in range(5):
        run.rebase(generator.integers(0, 512, positions.shape))
    run.rebase(positions)
    # the first layer's keys come from the embeddings alone
    assert np.array_equal(run.states["decoder.layer0.key"], fresh.states["decoder.layer0.key"])
    raw = torch.from_numpy(run.states["decoder.layer1.raw_key"]).double()
    config = read_decoder_checkpoint(bundle.manifest.origin.checkpoint).decoder.config
    angles = torch.from_numpy(positions[0, 0, :, None] * config.rope.frequencies(config.head_dim))
    a, b = raw.chunk(2, dim=-1)
    turned = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)
    bound = {"fp32": 1e-6, "fp16": 2e-3}[precision] * float(turned.abs().max())
    assert float((torch.from_numpy(run.states["decoder.layer1.key"]).double() - turned).abs().max()) < bound


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8", "w4", "fp16+w4"])
def test_states_are_updated_in_place(exported, capfd, precision):
    _, bundle = exported("qwen2, tied", precision)
    run = DecoderRun(bundle)
    run_tokens(run, random_tokens(), [16, 1, 16])
    run.rebase(np.zeros((1, 1, CAPACITY), np.int64))
    assert "in-place optimization not activated" not in capfd.readouterr().err
    _, session = run._graphs["rebase"]
    inputs = {item.name: run.states[item.name.removesuffix(".past")] for item in session.get_inputs()[1:]}
    session.run(None, {"slot_positions": np.zeros((1, 1, CAPACITY), np.int64), **inputs})  # not bound: must copy
    assert "in-place optimization not activated" in capfd.readouterr().err


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_integer_weights_give_the_logits_of_what_they_stand_for(exported, monkeypatch, precision):
    _, bundle = exported("qwen2, untied", precision)
    decoder = read_decoder_checkpoint(bundle.manifest.origin.checkpoint).decoder
    bits = int(precision[1:])
    with torch.no_grad():
        for name, weight in decoder.named_parameters():
            if weight.ndim == 2:
                table = "embed_tokens" in name
                scale = decoder.config.head_dim**-0.5 if "q_proj" in name else 1.0
                found = dequantize_blocks(*quantize_blocks(weight * scale, 8 if table else bits))
                weight.copy_(torch.from_numpy(found) / scale)
    expected = torch_logits(decoder)
    integers = run_tokens(DecoderRun(bundle), random_tokens(), [TOKENS])[0]
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    monkeypatch.setattr(decoder_replay, "session_options", lambda *level: plain)
    golden.assert_close(run_tokens(DecoderRun(bundle), random_tokens(), [TOKENS])[0], expected)
    # the fused layers round their inputs to eight bits too
    assert np.corrcoef(integers, expected)[0, 1] > 0.999


@pytest.mark.parametrize(("precision", "bound"), [("w8", 1e-5), ("w4", 1e-5), ("fp16+w4", 5e-3)])
def test_an_export_compares_with_what_its_integers_stand_for(exported, precision, bound):
    _, bundle = exported("llama", precision)
    checkpoint = read_decoder_checkpoint(bundle.manifest.origin.checkpoint)
    found = replay(checkpoint, bundle)
    assert found.difference < bound and 0.45 < found.rounding <= ROUNDING[precision]
    least, most = (0.01, 0.1) if precision == "w8" else (0.1, 0.6)
    assert least < found.quantization < most
    assert replay(checkpoint, exported("llama")[1]).difference < 1e-5  # the decoder is as it was


def test_an_odd_vocabulary_is_multiplied_by_an_even_head(tmp_path):
    bundle = export(decoder_models.qwen2(vocab_size=321), tmp_path, precision="fp16+w4")
    (head,) = [item for item in onnx.load(bundle.file("decoder.onnx")).graph.initializer if item.name == "head.weight"]
    assert list(head.dims) == [64, 322]
    assert run_tokens(DecoderRun(bundle), random_tokens(), [TOKENS]).shape == (1, 321)
    assert replay(read_decoder_checkpoint(bundle.manifest.origin.checkpoint), bundle).difference < 5e-3


@pytest.mark.parametrize(("precision", "calls"), [("fp32", 2), ("fp16+w4", 4)])
def test_pytorch_reads_its_weights_twice_in_a_comparison(exported, monkeypatch, precision, calls):
    _, bundle = exported("llama", precision)
    checkpoint = read_decoder_checkpoint(bundle.manifest.origin.checkpoint)
    forward, lengths = Decoder.forward, []

    def counted(self, embeddings, *others):
        lengths.append(embeddings.shape[1])
        return forward(self, embeddings, *others)

    monkeypatch.setattr(Decoder, "forward", counted)
    replay(checkpoint, bundle)
    assert lengths == [sum(decoder_replay.STEPS), 1] * (calls // 2)


@pytest.mark.parametrize("precision", ["w8", "w4", "fp16+w4"])
def test_a_slightly_wrong_integer_weight_is_found(tmp_path, monkeypatch, precision):
    def wrong(weight, *options):
        integers, scales = quantize_blocks(weight, *options)
        if weight.shape == (96, 64):
            integers[5, 7] += 2 if integers[5, 7] < 0 else -2
        return integers, scales

    monkeypatch.setattr("framestep.export.precision.quantize_blocks", wrong)
    with pytest.raises(FramestepError, match=r"not kept, a weight in \S+ is [12]\.\d\d steps off"):
        export(decoder_models.qwen2(), tmp_path, precision=precision)


def test_integers_that_are_read_with_another_scale_are_found(tmp_path, monkeypatch):
    def write(self, g, name, weight, *stored):
        return original(self, g, name, weight * 1.01 if name == "layer1.down" else weight, *stored)

    original = Precision._weight
    checkpoint = read_decoder_checkpoint(str(decoder_models.save(decoder_models.qwen2(), tmp_path / "checkpoint")))
    monkeypatch.setattr(Precision, "_weight", write)
    with pytest.raises(FramestepError, match=r"not kept, a weight in w8 is .* steps off"):
        export_decoder(checkpoint, tmp_path / "out.bundle", DecoderOptions("w8", CAPACITY))


def torch_logits(decoder: Decoder) -> np.ndarray:
    tokens = torch.from_numpy(random_tokens())
    with torch.inference_mode():
        return decoder(decoder.embed(tokens), torch.arange(TOKENS)[None, None])[0][0, -1].numpy()


@pytest.mark.parametrize("bits, half, bound", [(8, False, 0.5 / 127), (4, False, 1 / 16), (4, True, 1 / 15)])
def test_a_quantized_weight_is_near_within_its_block(bits, half, bound):
    weight = np.random.default_rng(0).normal(0, 1, (5000, 96)).astype(np.float32)
    weight[7] = 0
    integers, scales = quantize_blocks(torch.from_numpy(weight), bits, half)
    error = np.abs(dequantize_blocks(integers, scales) - weight).reshape(5000, 3, 32)
    largest = np.abs(weight).reshape(5000, 3, 32).max(axis=2, keepdims=True)
    assert scales.shape == (5000, 3)
    assert np.array_equal(np.abs(integers).max(axis=1) > 0, np.arange(5000) != 7)
    assert (error.mean(axis=2, keepdims=True) <= bound * largest).all()
    if bits == 8:  # whose largest weight is 127 steps: none is further off than half a step
        assert (error.max(axis=2, keepdims=True) <= 1.0001 * bound * largest).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_weight_in_bfloat16_is_quantized_as_its_numbers_are(bits):
    weight = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (5000, 96)).astype(np.float32)).bfloat16()
    for found, right in zip(quantize_blocks(weight, bits), quantize_blocks(weight.float(), bits), strict=True):
        assert np.array_equal(found, right)


@pytest.mark.parametrize("half", [False, True])
def test_an_int4_scale_is_nearly_the_best_there_is(half):
    weight = np.random.default_rng(0).normal(0, 0.02, (64, 256)).astype(np.float32)
    integers, scales = quantize_blocks(torch.from_numpy(weight), 4, half)
    found = np.square(dequantize_blocks(integers, scales.astype(np.float32)) - weight).sum()
    blocks = weight.reshape(-1, 64 if half else 32)
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    errors = []
    for steps in np.linspace(5, 10, 201):
        for scale in (largest / steps,) if half else (largest / steps, largest / -steps):
            errors.append(np.square(np.clip(np.rint(blocks / scale), -8, 7) * scale - blocks).sum(axis=1))
    assert found < 1.02 * np.min(errors, axis=0).sum()


@pytest.mark.parametrize("half", [False, True])
def test_a_weight_is_at_most_one_step_off_whatever_signs_the_largest_have(half):
    weight = np.random.default_rng(0).normal(0, 0.07, (400, 64)).astype(np.float32)
    sizes = np.linspace(-1, 1, 20)
    weight[:, 5], weight[:, 36] = np.repeat(sizes, 20), np.tile(sizes, 20)
    integers, scales = quantize_blocks(torch.from_numpy(weight), 4, half)
    assert 0.9 < steps_off(integers, scales.astype(np.float32), torch.from_numpy(weight)) <= 1.001


@pytest.mark.parametrize("size", [1, 1e-4, 1e-7, 1e-12])
def test_scales_in_half_precision_are_above_zero_and_cut_a_weight_by_one_step_at_most(size):
    weight = np.random.default_rng(0).normal(0, size, (100, 128)).astype(np.float32)
    integers, scales = quantize_blocks(torch.from_numpy(weight), 4, half=True)
    assert scales.shape == (100, 2) and scales.dtype == np.float16 and (scales > 0).all()
    steps = weight.reshape(100, 2, 64) / scales[:, :, None].astype(np.float32)
    assert steps.min() >= -9 and steps.max() <= 8
    assert np.abs(steps - integers.reshape(steps.shape)).max() <= 1
    if size >= 1e-4:  # below, a scale has few bits left
        error = np.linalg.norm(dequantize_blocks(integers, scales.astype(np.float32)) - weight)
        assert error < 0.12 * np.linalg.norm(weight)


@pytest.mark.parametrize("precision", ["w8", "w4", "fp16+w4"])
@pytest.mark.parametrize("kind", ["qwen2, tied", "llama"])
def test_every_linear_layer_multiplies_integers(exported, tmp_path, kind, precision):
    _, bundle = exported(kind, precision)
    options = decoder_replay.session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(bundle.file("decoder.onnx")), options, ["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    kinds = Counter(node.op_type for node in optimized.graph.node)
    assert kinds["MatMulNBits"] == 2 * 7 + 1
    assert kinds["MatMul"] == kinds["Gemm"] == kinds["DequantizeLinear"] == 0
    levels = {
        attribute.i
        for node in optimized.graph.node
        for attribute in node.attribute
        if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level"
    }
    assert levels == {4}


def test_tied_weights_are_stored_once(exported):
    tied, untied = (exported(f"qwen2, {kind}")[1].manifest.files["decoder.bin"].bytes for kind in ("tied", "untied"))
    table = decoder_models.VOCABULARY * decoder_models.SIZES["hidden_size"] * 4
    assert tied == pytest.approx(untied - table, abs=1000)


def test_far_positions_are_those_of_float64_angles(tmp_path):
    bundle = export(decoder_models.qwen2(max_position_embeddings=32768), tmp_path)
    run, far = DecoderRun(bundle), 32767
    run.step(run.embed(random_tokens(1)), np.array([[[far]]]), 0, np.zeros(CAPACITY, bool))
    raw, key = (run.states[f"decoder.layer0.{name}"][0, 0, 0].astype(np.float64) for name in ("raw_key", "key"))
    angles = far * 10000.0 ** -(np.arange(8) / 8)
    turned = (raw[:8] + 1j * raw[8:]) * np.exp(1j * angles)
    assert np.abs(key - np.concatenate([turned.real, turned.imag])).max() < 1e-6 * np.abs(raw).max()
