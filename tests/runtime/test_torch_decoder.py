"""Decoder bundles on the torch engine: what it has beside `test_graph_run.py`, which runs on every engine."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import cuda_graphs
import decoder_models
import golden
import numpy as np
import pytest
import torch

import framestep
from framestep.export.decoder_checkpoint import read_decoder_checkpoint
from framestep.export.decoder_export import DecoderOptions, write_bundle
from framestep.export.stored_weights import StoredWeights
from framestep.export.streamformer import StreamFormerConfig
from framestep.kernels import operators
from framestep.runtime.bundle import Bundle, BundleWriter
from framestep.runtime.engines.torch import WARM_UPS
from framestep.runtime.errors import EngineError

CAPACITY, TOKENS = 48, 20


def write(folder, precision: str = "fp32", **options):
    checkpoint = read_decoder_checkpoint(str(folder / "checkpoint"))
    with BundleWriter(folder / "out.bundle") as writer:
        write_bundle(checkpoint, writer, DecoderOptions(precision, CAPACITY, **options))
    return checkpoint, Bundle.open(folder / "out.bundle")


def random_tokens(count: int = TOKENS) -> np.ndarray:
    return np.random.default_rng(0).integers(0, decoder_models.VOCABULARY, count)


def say(
    stream, tokens: np.ndarray, at: int, rows: int = 1, seen: np.ndarray | None = None, capacity: int = CAPACITY
) -> np.ndarray:
    """Logits after tokens, or what was seen [T, D] in the place of the first of them."""
    embeddings = stream.run("embed", {"tokens": tokens})["embeddings"]
    if seen is not None:
        embeddings[: len(seen)] = seen
    positions = at + np.arange(len(tokens)) + np.arange(rows)[:, None]
    inputs = {"embeddings": embeddings, "position_ids": positions, "write_index": np.array(at)}
    return stream.run("decoder", {**inputs, "slot_mask": np.arange(capacity) < at})["logits"]


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_integer_weights_give_the_logits_of_what_they_stand_for(tmp_path, precision) -> None:
    decoder_models.save(decoder_models.llama(), tmp_path / "checkpoint")
    checkpoint, bundle = write(tmp_path, precision)
    with framestep.load(bundle.path, engine="torch") as session, session.open_stream() as stream:
        found = [say(stream, random_tokens()[:12], 0), say(stream, random_tokens()[12:13], 12)]
    with StoredWeights(checkpoint.decoder, bundle).in_use(), torch.inference_mode():
        embeddings = checkpoint.decoder.embed(torch.from_numpy(random_tokens()[None, :13]))
        expected = checkpoint.decoder(embeddings, torch.arange(13)[None, None])[0][0, [11, 12]]
    golden.assert_close(np.stack(found), expected.numpy())


def test_half_precision_is_near_float32(tmp_path) -> None:
    model = decoder_models.qwen2()
    decoder_models.save(model, tmp_path / "checkpoint")
    _, bundle = write(tmp_path, "fp16")
    with framestep.load(bundle.path, engine="torch", precision="fp16") as session, session.open_stream() as stream:
        found = np.stack([say(stream, random_tokens()[:19], 0), say(stream, random_tokens()[19:], 19)])
        assert session._engine.read_state("decoder.layer0.key", 0).dtype == np.float16
    with torch.inference_mode():
        expected = model(torch.from_numpy(random_tokens())[None]).logits[0, [18, 19]].numpy()
    assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "w8", "fp16+w4"])
@pytest.mark.parametrize(("engine", "limit"), [("torch:tf32", 1e-5), ("torch:fp16", 5e-3), ("torch:bf16", 4e-2)])
def test_every_bundle_runs_in_every_precision(tmp_path, precision, engine, limit) -> None:
    decoder_models.save(decoder_models.qwen2(), tmp_path / "checkpoint")
    _, bundle = write(tmp_path, precision)
    found = []
    for name in ("torch:fp32", engine):
        with framestep.load(bundle.path, engine=name) as session, session.open_stream() as stream:
            found.append(np.stack([say(stream, random_tokens()[:19], 0), say(stream, random_tokens()[19:], 19)]))
    assert np.linalg.norm(found[1] - found[0]) < limit * np.linalg.norm(found[0])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_sum_beyond_half_precision_stays_finite(tmp_path, precision) -> None:
    """Trained decoders have a few channels with sums of tens of thousands, which their norms make small again."""
    model, channel = decoder_models.qwen2(tie_word_embeddings=False), 3
    layers = model.model.layers
    norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, channel] = 40_000
        for norm in (*norms, model.model.norm):
            norm.weight *= 1_000
            norm.weight[channel] = 1e-3
        attention = layers[0].self_attn
        attention.v_proj.bias.fill_(1)
        attention.o_proj.weight[channel] = 40_000 / attention.o_proj.in_features
        states = model(torch.from_numpy(random_tokens())[None], output_hidden_states=True)
    assert max(float(x.max()) for x in states.hidden_states) > 65_504
    decoder_models.save(model, tmp_path / "checkpoint")
    _, bundle = write(tmp_path, precision)
    expected = states.logits[0, -1].numpy()
    for name in ("torch", "torch:fp16"):
        with framestep.load(bundle.path, engine=name) as session, session.open_stream() as stream:
            found = say(stream, random_tokens(), 0)
        assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)


def test_a_layer_is_ten_calls_and_views(tmp_path) -> None:
    decoder_models.save(decoder_models.qwen2(), tmp_path / "checkpoint")
    _, bundle = write(tmp_path, "fp16")
    with framestep.load(bundle.path, engine="torch") as session:
        calls = Counter(call.node.op for call in session._engine._own_programs["decoder"]._calls)
    layers = decoder_models.SIZES["num_hidden_layers"]
    each = {"LinearGroup": 2, "Linear": 2, "RotaryEmbedding": 2, "CachedAttention": 1, "Silu": 1, "Mul": 1}
    each["TensorScatter"] = 1  # keys before they are turned
    assert {name: calls[name] for name in each} == {name: count * layers for name, count in each.items()}
    # the first norm has no sum before it, and the last one is of one token alone
    assert (calls["ResidualNorm"], calls["RMSNormalization"], calls["Add"]) == (2 * layers - 1, 2, 1)
    assert "Sigmoid" not in calls and calls["Cast"] <= 5


def test_steps_of_few_tokens_take_our_attention_and_those_of_many_pytorchs(tmp_path, monkeypatch) -> None:
    model = decoder_models.qwen2()
    decoder_models.save(model, tmp_path / "checkpoint")
    checkpoint = read_decoder_checkpoint(str(tmp_path / "checkpoint"))
    with BundleWriter(tmp_path / "out.bundle") as writer:
        write_bundle(checkpoint, writer, DecoderOptions("fp32", 128))
    taken, ours = [], operators.decode_attention

    def decode_attention(query, *others):
        taken.append(query.shape[2])
        return ours(query, *others)

    monkeypatch.setattr(operators, "decode_attention", decode_attention)
    tokens, layers = random_tokens(100), decoder_models.SIZES["num_hidden_layers"]
    at, found = 0, []
    with framestep.load(tmp_path / "out.bundle", engine="torch") as session, session.open_stream() as stream:
        for count in (70, 1, 3, 26):
            found.append(say(stream, tokens[at : at + count], at, capacity=128))
            at += count
    assert taken == [1] * layers + [3] * layers + [26] * layers
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)[None]).logits[0, [69, 70, 73, 99]].numpy()
    golden.assert_close(np.stack(found), expected)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "videoqa, max, frame", "videoqa, average, grid"])
def test_what_is_seen_and_said_is_as_on_onnx_runtime(tmp_path, kind) -> None:
    options, rows = {}, 1
    if kind == "qwen2_5_vl":
        decoder_models.save(decoder_models.qwen2_5_vl(), tmp_path / "checkpoint")
        options, rows = {"frame_size": (56, 84)}, 3
    else:
        _, pooling, newline = kind.split(", ")
        tower = StreamFormerConfig((64, 64), 16, 8, 32, 2, 2, 64)
        keys = {"mm_spatial_pool_mode": pooling, "mm_newline_position": newline}
        decoder_models.save_streamformer_videoqa(tmp_path, decoder_models.qwen2(), tower, **keys)
    _, bundle = write(tmp_path, **options)
    found = {}
    for engine in ("onnxruntime", "torch"):
        with framestep.load(bundle.path, engine=engine) as session, session.open_stream() as stream:
            height, width = session.frame.height, session.frame.width
            frames = np.random.default_rng(1).integers(0, 256, (3, height, width, 3), np.uint8)
            results = [stream.step(frame)["visual"] for frame in frames]
            logits = [say(stream, random_tokens(), 0, rows, results[-1][:TOKENS])]
            stream.run("rebase", {"slot_positions": np.full((rows, CAPACITY), 7) + np.arange(CAPACITY)})
            logits.append(say(stream, random_tokens()[:1], TOKENS, rows))
            found[engine] = np.stack(results), np.stack(logits)
    for ours, expected in zip(found["torch"], found["onnxruntime"], strict=True):
        golden.assert_close(ours, expected)


@pytest.fixture
def sessions(tmp_path, monkeypatch):
    """An engine that goes the CUDA way, one that does not, and what the driver of the first was asked for."""
    decoder_models.save(decoder_models.qwen2(), tmp_path / "checkpoint")
    _, bundle = write(tmp_path)
    load = functools.partial(framestep.load, bundle.path, engine="torch", device="cpu", streams=2)
    with load() as session, load() as eager:
        yield session, eager, cuda_graphs.Driver(session._engine, monkeypatch).calls


def test_on_cuda_a_token_is_one_launch_and_one_synchronisation_of_each_graph(sessions) -> None:
    session, eager, calls = sessions
    streams = session.open_stream(), eager.open_stream()
    tokens = random_tokens()

    def both(first: int, stop: int) -> None:
        found, expected = (say(stream, tokens[first:stop], first) for stream in streams)
        golden.assert_close(found, expected)

    both(0, 5)
    for at in range(5, 4 + WARM_UPS):
        both(at, at + 1)
    assert "capture" not in calls
    first, graphs = 4 + WARM_UPS, ("embed", "decoder")
    calls.clear()
    both(first, first + 1)
    assert calls == ["wait", "synchronize", "capture"] * len(graphs)
    calls.clear()
    for at in range(first + 1, first + 4):
        both(at, at + 1)
    assert calls == ["replay", "synchronize"] * len(graphs) * 3
    calls.clear()
    both(first + 4, first + 7)
    assert "replay" not in calls


def test_on_cuda_a_number_of_tokens_that_recurs_is_one_launch(sessions) -> None:
    session, eager, calls = sessions
    streams = session.open_stream(), eager.open_stream()
    tokens, at = random_tokens(33), 0

    def both(count: int) -> None:
        nonlocal at
        found, expected = (say(stream, tokens[at : at + count], at) for stream in streams)
        golden.assert_close(found, expected)
        at += count

    for _ in range(WARM_UPS):
        both(2)
        both(4)
    assert calls.count("capture") == 2 * len(("embed", "decoder"))
    calls.clear()
    for count in (4, 2, 2, 4):
        both(count)
    assert calls == ["replay", "synchronize"] * 2 * 4
    calls.clear()
    both(3)
    assert "replay" not in calls


def test_on_cuda_the_captures_that_are_kept_are_the_latest_used(sessions, monkeypatch) -> None:
    monkeypatch.setattr("framestep.runtime.engines.torch.MOST_GRAPHS", 2)  # of one number of tokens: two graphs
    session, eager, calls = sessions
    streams = session.open_stream(), eager.open_stream()
    tokens, at = random_tokens(), 0
    for count in [1] * (WARM_UPS + 1) + [2] * (WARM_UPS + 1) + [1, 1]:
        found, expected = (say(stream, tokens[at : at + count], at) for stream in streams)
        golden.assert_close(found, expected)
        at += count
        assert len(session._engine._own_captured) <= 2
    assert calls.count("capture") == 3 * 2
    assert calls[-2:] == ["replay", "synchronize"]


def test_on_cuda_slots_keep_apart_and_positions_change_between_launches(sessions) -> None:
    session, eager, calls = sessions
    tokens, results = random_tokens(), []
    for opened in (session, eager):
        streams = [opened.open_stream() for _ in range(2)]
        found = [say(stream, tokens[at : at + 5], 0) for at, stream in enumerate(streams)]
        for at in range(5, 5 + 2 * WARM_UPS):
            for shift, stream in enumerate(streams):
                moved = np.where(np.arange(CAPACITY) < at, np.arange(CAPACITY) + 1 + shift, 0)[None]
                stream.run("rebase", {"slot_positions": moved})
                found.append(say(stream, tokens[at - shift : at - shift + 1], at))
        results.append(np.stack(found))
    assert calls.count("capture") == 3 * 2
    golden.assert_close(*results)


def test_on_cuda_a_thread_that_ran_nothing_yet_captures_nothing(sessions) -> None:
    """A library that begins in a capture, in a thread of its own, makes the capture fail."""
    session, eager, calls = sessions
    tokens = random_tokens()
    streams = [session.open_stream() for _ in range(2)]
    for at in range(2 * WARM_UPS):
        say(streams[0], tokens[at : at + 1], at)
    with ThreadPoolExecutor(1) as other:
        found = [other.submit(say, streams[1], tokens[at : at + 1], at).result() for at in range(3)]
    assert calls.count("capture") == 2 * 2
    with eager.open_stream() as stream:
        golden.assert_close(np.stack(found), np.stack([say(stream, tokens[at : at + 1], at) for at in range(3)]))


def test_on_cuda_a_capture_that_fails_leaves_everything_usable(sessions, monkeypatch) -> None:
    session, eager, calls = sessions
    tokens, stream = random_tokens(), session.open_stream()
    for at in range(WARM_UPS - 1):
        say(stream, tokens[at : at + 1], at)
    engine, before = session._engine, torch.cuda.current_stream()
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_host_like", lambda array: torch.zeros(0))
        with pytest.raises(EngineError, match="a capture that cannot end"):
            say(stream, tokens[WARM_UPS - 1 : WARM_UPS], WARM_UPS - 1)
    assert torch.cuda.current_stream() is before
    found = [say(stream, tokens[at : at + 1], at) for at in range(WARM_UPS - 1, 3 * WARM_UPS)]
    assert calls[-2:] == ["replay", "synchronize"]
    with eager.open_stream() as stream:
        expected = [say(stream, tokens[at : at + 1], at) for at in range(3 * WARM_UPS)]
    golden.assert_close(np.stack(found), np.stack(expected[WARM_UPS - 1 :]))


def test_close_waits_for_the_run_at_work(tmp_path, monkeypatch) -> None:
    decoder_models.save(decoder_models.qwen2(), tmp_path / "checkpoint")
    _, bundle = write(tmp_path)
    at_work, go_on = threading.Event(), threading.Event()
    session = framestep.load(bundle.path, engine="torch")
    stream, ours = session.open_stream(), operators.decode_attention

    def slow(*given):
        at_work.set()
        go_on.wait(10)
        return ours(*given)

    monkeypatch.setattr(operators, "decode_attention", slow)
    with ThreadPoolExecutor(2) as threads:
        said = threads.submit(say, stream, random_tokens()[:1], 0)
        at_work.wait(10)
        closed = threads.submit(session.close)
        early, _ = wait([closed], timeout=0.3)
        go_on.set()
        assert not early
        assert np.isfinite(said.result()).all()
    with pytest.raises(EngineError, match="this session is closed"):
        session._engine.run(0, "embed", {"tokens": random_tokens()})  # as one that had waited behind `close`


@pytest.mark.parametrize("tokens", ["1", "5"])
def test_no_number_of_a_device_is_needed_on_the_host(tmp_path, golden_bundle, tokens) -> None:
    decoder_models.save(decoder_models.qwen2_5_vl(), tmp_path / "checkpoint")
    _, bundle = write(tmp_path, frame_size=(56, 84))
    script = Path(__file__).parents[1] / "pretend_device.py"
    command = [sys.executable, script, "float16", tokens, golden_bundle, bundle.path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*Bundle.open(golden_bundle).manifest.graphs, *bundle.manifest.graphs]
