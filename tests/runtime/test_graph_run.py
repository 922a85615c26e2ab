"""Running one graph of a bundle by itself: a decoder's, with its caches in place."""

from __future__ import annotations

import platform
import shutil
import threading
from contextlib import nullcontext

import decoder_models
import golden
import numpy as np
import pytest
import torch
from native_parts import cpu_has, own_operators

import framestep
from framestep.benchmarks.gpu.stand_in import stand_in
from framestep.export.decoder_checkpoint import read_decoder_checkpoint
from framestep.export.decoder_export import DecoderOptions, export_decoder
from framestep.runtime.bundle import Bundle
from framestep.runtime.errors import EngineError, FramestepError
from framestep.runtime.session import NonFiniteOutputError

CAPACITY = 48
TOKENS = 30
PRODUCTS = 2 * 7 + 1  # of a decoder of two layers, and its head


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("run"), decoder_models.qwen2()
    checkpoint = read_decoder_checkpoint(str(decoder_models.save(model, folder / "checkpoint")))
    return model, Bundle.open(export_decoder(checkpoint, folder / "out.bundle", DecoderOptions(capacity=CAPACITY)).path)


@pytest.fixture(scope="module")
def compiled(exported, tmp_path_factory):
    """The same with engines of both TensorRTs, for a GPU that a stand-in plays."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from tensorrt_bundles import NoProgress

    from framestep.export.tensorrt import build
    from framestep.export.tensorrt_network import BuildOptions

    path = shutil.copytree(exported[1].path, tmp_path_factory.mktemp("compiled") / "out.bundle")
    for flavour in ("tensorrt", "tensorrt_rtx"):
        with stand_in(path, flavour):
            build(Bundle.open(path), BuildOptions("fp32", 2, flavour, ("8.6",)), NoProgress())
    return path


@pytest.fixture(params=["onnxruntime", "torch", "tensorrt", "tensorrt_rtx"])
def session(request, exported):
    path, place, engine = exported[1].path, nullcontext(), request.param
    if engine.startswith("tensorrt"):
        path, engine = request.getfixturevalue("compiled"), "tensorrt"
        place = stand_in(path, request.param)
    with place, framestep.load(path, engine=engine, streams=2) as opened:
        yield opened


def random_tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, decoder_models.VOCABULARY, TOKENS)


def step(stream, tokens: np.ndarray, at: int) -> np.ndarray:
    embeddings = stream.run("embed", {"tokens": tokens})["embeddings"]
    inputs = {
        "embeddings": embeddings,
        "position_ids": np.arange(at, at + len(tokens))[None],
        "write_index": np.array(at),
        "slot_mask": np.arange(CAPACITY) < at,
    }
    return stream.run("decoder", inputs)["logits"]


def test_steps_of_any_length_give_the_logits_of_transformers(exported, session):
    model, _ = exported
    tokens, at, found = random_tokens(), 0, []
    with session.open_stream() as stream:
        for length in (7, 1, 1, 16, 5):
            found.append(step(stream, tokens[at : at + length], at))
            at += length
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)[None]).logits[0].numpy()
    golden.assert_close(np.stack(found), expected[np.cumsum((7, 1, 1, 16, 5)) - 1])


def test_streams_have_caches_of_their_own(session):
    tokens = random_tokens()
    with session.open_stream() as first, session.open_stream() as second:
        alone = [step(first, tokens[:5], 0), step(first, tokens[5:6], 5)]
        step(first, tokens[:5], 0)
        step(second, tokens[10:20], 0)
        assert np.array_equal(step(first, tokens[5:6], 5), alone[1])


def test_caches_are_run_by_operators_of_ours_unless_the_plain_engine_is_asked_for(exported):
    with framestep.load(exported[1].path, engine="onnxruntime:plain") as opened:
        assert own_operators(opened) == {"embed": 0, "decoder": 0, "rebase": 0}
    products = PRODUCTS if cpu_has("avx512f") else 0
    with framestep.load(exported[1].path, engine="onnxruntime") as opened:
        assert own_operators(opened) == {"embed": 0, "decoder": 2 + products, "rebase": 0}


def test_rebased_keys_are_bit_for_bit_those_of_a_step_at_the_new_positions(exported):
    """The step rotates in an operator of ours, the rebasing in ONNX Runtime's, which off x86-64 rounds in its own way."""
    tokens = random_tokens()
    with framestep.load(exported[1].path, engine="onnxruntime", streams=2) as opened:
        with opened.open_stream() as moved, opened.open_stream() as stepped:
            for stream, first in ((moved, 0), (stepped, 17)):
                inputs = {
                    "embeddings": stream.run("embed", {"tokens": tokens})["embeddings"],
                    "position_ids": np.arange(first, first + TOKENS)[None],
                    "write_index": np.array(0),
                    "slot_mask": np.zeros(CAPACITY, bool),
                }
                stream.run("decoder", inputs)
            moved.run("rebase", {"slot_positions": 17 + np.arange(CAPACITY)[None]})
            found, expected = (
                opened._engine.read_state("decoder.layer0.key", stream.slot) for stream in (moved, stepped)
            )
    apart = 0 if platform.machine() == "x86_64" else 1e-6
    np.testing.assert_allclose(found[:, :TOKENS], expected[:, :TOKENS], rtol=0, atol=apart)
    assert np.abs(found[:, :TOKENS]).min(axis=-1).max() > 0


@pytest.fixture(scope="module", params=["w8", "w4"])
def integers(request, exported, tmp_path_factory):
    checkpoint = read_decoder_checkpoint(str(decoder_models.save(exported[0], tmp_path_factory.mktemp("checkpoint"))))
    folder = tmp_path_factory.mktemp("integers") / "out.bundle"
    return export_decoder(checkpoint, folder, DecoderOptions(request.param, CAPACITY)).path


def test_products_of_integers_are_those_of_what_the_integers_stand_for(integers):
    tokens, found = random_tokens(), {}
    for engine in ("onnxruntime", "onnxruntime:plain", "torch"):
        with framestep.load(integers, engine=engine) as opened, opened.open_stream() as stream:
            lengths = (7, 1, 1, 16, 5)
            at = np.cumsum((0, *lengths))
            found[engine] = np.stack([step(stream, tokens[a : a + n], a) for a, n in zip(at, lengths, strict=False)])
            if engine == "onnxruntime":
                assert own_operators(opened)["decoder"] == 2 + (PRODUCTS if cpu_has("avx2", "fma") else 0)
    exact = found.pop("torch")  # multiplies floats
    errors = {engine: np.square(logits - exact).mean() ** 0.5 for engine, logits in found.items()}
    assert errors["onnxruntime"] < 1.5 * errors["onnxruntime:plain"] < 0.1 * exact.std()


def test_weights_that_are_cut_short_are_told(integers, tmp_path):
    path = shutil.copytree(integers, tmp_path / "out.bundle")
    opened = Bundle.open(path)  # and then the file changes
    with (path / "decoder.bin").open("r+b") as file:
        file.truncate(file.seek(-100, 2))
    ours = r"decoder\.bin: ends at byte \d+ inside a tensor; it is cut short$"
    told = ours if cpu_has("avx2", "fma") else r"decoder\.onnx: ONNX Runtime \S+ cannot load it: "
    with pytest.raises(FramestepError, match=told):
        framestep.Session(opened, engine="onnxruntime")


def test_rebasing_changes_nothing(session):
    tokens = random_tokens()
    with session.open_stream() as stream:
        step(stream, tokens[:9], 0)
        expected = step(stream, tokens[9:10], 9)
        stream.run("rebase", {"slot_positions": 40 + np.arange(CAPACITY)[None]})
        inputs = {
            "embeddings": stream.run("embed", {"tokens": tokens[9:10]})["embeddings"],
            "position_ids": np.array([[49]]),
            "write_index": np.array(9),
            "slot_mask": np.arange(CAPACITY) < 9,
        }
        golden.assert_close(stream.run("decoder", inputs)["logits"], expected)


def test_caches_stay_where_they_are_and_are_updated_in_place(session, capfd):
    engine = session._engine
    with session.open_stream() as stream:
        addresses = [engine.state_address(name) for name in engine.state_names()]
        for at in range(6):
            step(stream, random_tokens()[at : at + 1], at)
        stream.run("rebase", {"slot_positions": np.zeros((1, CAPACITY), np.int64)})
        assert [engine.state_address(name) for name in engine.state_names()] == addresses
        assert engine.read_state("decoder.layer1.key", stream.slot).any()
    assert "in-place optimization not activated" not in capfd.readouterr().err


def test_what_a_run_gave_is_yours(session):
    with session.open_stream() as stream:
        first = step(stream, random_tokens()[:4], 0)
        kept = first.copy()
        step(stream, random_tokens()[4:8], 4)
        assert np.array_equal(first, kept)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"slot_mask": None}, "graph 'decoder': the input 'slot_mask' is missing"),
        ({"mood": np.zeros(1)}, "has no input 'mood'|cannot be float64"),
        ({"mood": np.zeros(1, np.float32)}, "graph 'decoder': has no input 'mood'"),
        (
            {"slot_mask": np.zeros(CAPACITY + 1, bool)},
            r"input 'slot_mask' takes bool \[48\], found bool \[49\]",
        ),
        ({"slot_mask": np.zeros(CAPACITY, np.int64)}, r"takes bool \[48\], found int64 \[48\]"),
        ({"position_ids": np.zeros((1, 3), np.int64)}, r"'position_ids' takes int64 \[1, T\], found int64 \[1, 3\]"),
        (
            {"embeddings": np.zeros((0, 64), np.float32)},
            r"'embeddings' takes float32 \[T, 64\], found float32 \[0, 64\]",
        ),
        (
            {"write_index": np.array(CAPACITY - 1)},
            "graph 'decoder': (ONNX Runtime failed|no room for 2 tokens from slot 47 on)",
        ),
        (
            {"position_ids": np.array([[5, 512]])},
            "graph 'decoder': (ONNX Runtime failed|.* has 512, expected 0 to 511)",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused_and_nothing_is_lost(session, change, message):
    tokens = random_tokens()
    with session.open_stream() as stream:
        step(stream, tokens[:5], 0)
        expected = step(stream, tokens[5:7], 5)
        inputs = {
            "embeddings": stream.run("embed", {"tokens": tokens[5:7]})["embeddings"],
            "position_ids": np.array([[5, 6]]),
            "write_index": np.array(5),
            "slot_mask": np.arange(CAPACITY) < 5,
        }
        changed = {name: value for name, value in {**inputs, **change}.items() if value is not None}
        with pytest.raises(EngineError, match=message):
            stream.run("decoder", changed)
        assert np.array_equal(stream.run("decoder", inputs)["logits"], expected)


def test_tokens_outside_of_the_vocabulary_are_refused(session):
    with (
        session.open_stream() as stream,
        pytest.raises(
            EngineError, match="graph 'embed': (ONNX Runtime failed|input 'tokens' has 9999, expected 0 to 319)"
        ),
    ):
        stream.run("embed", {"tokens": np.array([9999])})


def test_numbers_that_are_not_finite_empty_the_caches_of_that_stream(session):
    tokens, engine = random_tokens(), session._engine
    with session.open_stream() as first, session.open_stream() as second:
        step(second, tokens[:3], 0)
        expected = step(second, tokens[3:4], 3)
        step(first, tokens[:3], 0)
        inputs = {
            "embeddings": np.full((1, 64), np.nan, np.float32),
            "position_ids": np.array([[3]]),
            "write_index": np.array(3),
            "slot_mask": np.arange(CAPACITY) < 3,
        }
        with pytest.raises(NonFiniteOutputError, match="NaN or infinity in logits"):
            first.run("decoder", inputs)
        assert not any(engine.read_state(name, first.slot).any() for name in engine.state_names())
        assert np.array_equal(step(second, tokens[3:4], 3), expected)


def test_graphs_that_were_not_asked_for_are_refused(exported):
    path = exported[1].path
    with framestep.load(path, graphs=("embed",)) as session, session.open_stream() as stream:
        assert session.graphs == ("embed",)
        with pytest.raises(
            EngineError, match=r"graph 'decoder' was not loaded .* load\(\.\.\., graphs=\('decoder',\)\)"
        ):
            stream.run("decoder", {})
    with pytest.raises(EngineError, match="graphs: 'speak' is unknown; this bundle has"):
        framestep.load(path, graphs=("speak",))


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt_rtx"])
def test_tensorrt_launches_a_token_at_once_and_puts_several_on_its_stream(compiled, flavour):
    per_run = ["Context.push", "cuGraphLaunch", "Stream.synchronize", "Context.pop"]
    tokens = random_tokens()
    with stand_in(compiled, flavour) as machine:
        with framestep.load(compiled, engine="tensorrt") as session, session.open_stream() as stream:
            step(stream, tokens[:1], 0)
            machine.calls.clear()
            for at in range(1, 4):
                step(stream, tokens[at : at + 1], at)
            assert machine.names() == per_run * 2 * 3  # embed and decoder
            step(stream, tokens[4:9], 4)
            profiles = [given for name, given in machine.calls if name.endswith(".set_optimization_profile_async")]
            assert [index for index, _ in profiles] == [1, 1]
            machine.calls.clear()
            step(stream, tokens[9:12], 9)  # another number of tokens by the same contexts
            assert machine.names().count("IExecutionContext.execute_async_v3") == 2
            assert not {"cuGraphLaunch", "cuStreamBeginCapture", "mem_alloc"} & set(machine.names())
            assert not any(name.endswith("create_execution_context") for name in machine.names())
            with pytest.raises(
                EngineError, match=r"graph 'embed': 49 tokens are more than the 48 that its engine takes"
            ):
                stream.run("embed", {"tokens": np.zeros(49, np.int64)})
        assert (machine.memory, machine.contexts, machine.graphs) == ({}, 0, 0)


def test_a_closed_session_runs_nothing(session):
    stream = session.open_stream()
    step(stream, random_tokens()[:2], 0)
    session.close()
    with pytest.raises(EngineError, match="closed"):
        step(stream, random_tokens()[:2], 0)


def test_threads_take_turns_in_one_cache_and_mix_nothing_up(session):
    tokens = random_tokens()
    with session.open_stream() as first, session.open_stream() as second:
        expected = {id(s): [step(s, tokens[:8], 0), step(s, tokens[8:9], 8)] for s in (first, second)}
        wrong = []

        def repeat(stream):
            for _ in range(40):
                found = [step(stream, tokens[:8], 0), step(stream, tokens[8:9], 8)]
                wrong.extend(name for name, one in zip("ab", zip(found, expected[id(stream)], strict=True), strict=True)
                             if not np.array_equal(*one))  # fmt: skip

        threads = [threading.Thread(target=repeat, args=(stream,)) for stream in (first, second)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert not wrong
