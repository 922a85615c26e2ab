"""A whole decoder through the engine: right, and how long it takes from tokens' numbers to logits on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from ...export import block_quantize
from ...export.decoder import Decoder, DecoderConfig
from ...export.decoder_checkpoint import DecoderCheckpoint
from ...export.decoder_export import DecoderOptions, write_bundle
from ...export.stored_weights import StoredWeights
from ...runtime.bundle import Bundle, BundleWriter
from ...runtime.engines.torch import WARM_UPS
from ...runtime.session import Session
from .bandwidth import measure_copy
from .hardware import Hardware, spread
from .section import Section
from .sizes import Sizes
from .step import WARM_RUNS

CHUNK, TOKENS = 40, 12  # of a prompt, and said one by one
LIMIT = 2e-2
PRECISIONS = ("fp16", "fp16+w4")  # of the bundle; both are computed in float16


def run(section: Section, hardware: Hardware, sizes: Sizes, work: Path) -> None:
    """Logits against the model in float32, and the latency of a token, and of a prompt's, by tokens in the cache."""
    torch.manual_seed(0)
    config = DecoderConfig.from_dict(sizes.decoder, "sizes")
    model = Decoder(config).eval()
    checkpoint = DecoderCheckpoint("qwen2", "random", model, None, None, None, None, {}, ())
    copy = measure_copy(hardware)
    for precision in PRECISIONS:
        if section.left() < 20:
            section.skip(f"a decoder in {precision}: no time left")
            continue
        path = work / f"decoder.{precision}.bundle"
        with BundleWriter(path) as writer, _one_scale():
            write_bundle(checkpoint, writer, DecoderOptions(precision, sizes.capacity))
        bundle = Bundle.open(path, verify=False)
        section.attempt(
            f"decoder {precision}", lambda b=bundle, p=precision: _speak(section, hardware, sizes, model, b, p, copy)
        )
        hardware.free()


@contextmanager
def _one_scale() -> Iterator[None]:
    """INT4 with the first of the scales that are tried for each block: sooner made, and read no faster."""
    steps = block_quantize.STEPS
    block_quantize.STEPS = steps[:1]
    try:
        yield
    finally:
        block_quantize.STEPS = steps


def _speak(
    section: Section, hardware: Hardware, sizes: Sizes, model: Decoder, bundle: Bundle, precision: str, copy: float
) -> None:
    config = model.config
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, CHUNK + TOKENS)
    with StoredWeights(model, bundle).in_use() if precision != "fp16" else nullcontext():
        expected = _reference(model, tokens)
    hardware.free()
    before = hardware.held_bytes()
    with Session(bundle, "torch:fp16", hardware.device.type) as session:
        section.facts[f"decoder {precision}: megabytes on the device"] = (hardware.held_bytes() - before) / 1e6
        speaker = _Speaker(session, sizes.capacity)
        found = [speaker.say(tokens[:CHUNK])]
        found += [speaker.say(tokens[at : at + 1]) for at in range(CHUNK, CHUNK + TOKENS)]
        error = np.linalg.norm(np.stack(found) - expected) / np.linalg.norm(expected)
        section.check(f"decoder {precision}: logits", float(error), LIMIT)
        for _ in range(WARM_UPS + 1):  # the last one is a launch of what was captured
            speaker.at = 0
            again = speaker.say(tokens[:CHUNK])
        error = np.linalg.norm(again - expected[0]) / np.linalg.norm(expected[0])
        section.check(f"decoder {precision}: logits of a prompt that is said again", float(error), LIMIT)
        weights = _bytes_read(bundle)
        for count, at in ((1, CHUNK), (1, sizes.capacity - 1), (CHUNK, sizes.capacity - CHUNK)):

            def call(count: int = count, at: int = at) -> None:
                speaker.at = at
                speaker.say(tokens[:count])

            hardware.wall(call, WARM_RUNS)
            measured = spread(hardware.wall(call, sizes.runs))
            cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * sizes.capacity
            section.add(
                "decoder",
                weights=precision,
                tokens=at,
                new=count,
                **measured,
                tokens_per_second=1e3 * count / measured["p50_ms"],
                megabytes=(weights + cache) / 1e6,
                share_of_copy=(weights + cache) / copy / (measured["p50_ms"] / 1e3),
            )


def _bytes_read(bundle: Bundle) -> int:
    """Of the constants of the decoder's graph, which a step reads once."""
    model = onnx.load(bundle.file(bundle.manifest.graphs["decoder"].file), load_external_data=False)
    entries = [entry for item in model.graph.initializer for entry in item.external_data]
    return sum(int(entry.value) for entry in entries if entry.key == "length")


class _Speaker:
    """A stream whose next token goes to slot `at`, at the position of the same number."""

    def __init__(self, session: Session, capacity: int) -> None:
        self._stream = session.open_stream()
        self._slots = np.arange(capacity)
        self.at = 0

    def say(self, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Logits after the last of the tokens."""
        embeddings = self._stream.run("embed", {"tokens": tokens})["embeddings"]
        inputs = {
            "embeddings": embeddings,
            "position_ids": self.at + np.arange(len(tokens))[None],
            "write_index": np.array(self.at),
            "slot_mask": self._slots < self.at,
        }
        self.at += len(tokens)
        return self._stream.run("decoder", inputs)["logits"]


@torch.inference_mode()
def _reference(model: Decoder, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Logits from the end of the prompt on, of the model in float32 over all tokens at once, on the CPU."""
    logits, _ = model(model.embed(torch.from_numpy(tokens)[None]), torch.arange(len(tokens))[None, None])
    found: np.ndarray[Any, Any] = logits[0, CHUNK - 1 :].numpy()
    return found
