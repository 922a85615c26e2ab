"""Replaying an exported decoder beside PyTorch, before a bundle is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..runtime.bundle import Bundle
from ..runtime.manifest import STREAMS, TOKENS, Graph, graphs_for
from .decoder_checkpoint import DecoderCheckpoint
from .precision import Precision
from .stored_weights import StoredWeights
from .vision_graph import VISUAL

Array = npt.NDArray[Any]
STEPS = (7, 1, 4, 1)  # new tokens of each step; after them some are forgotten, the keys re-based, and one more taken
FORGOTTEN = slice(3, 6)
SHIFT = 5  # positions
FRAMES = 3  # that a StreamFormer is shown; it remembers
RUNTIME_LEVEL, EXACT_LEVEL = 4, 1  # integers by integers, as a runtime multiplies them, and in float32


def session_options(level: int = RUNTIME_LEVEL) -> Any:
    """As a runtime sets them, with two threads.

    Args:
        level: of integer weights: how accurate their products are.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 2  # warnings: of a state that had to be copied
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(level))
    return options


class GraphRun:
    """Some graphs of a bundle over the states of one stream, on ONNX Runtime's CPU provider.

    Attributes:
        states: by name, the first axis 1; the graphs write into them.
    """

    def __init__(self, bundle: Bundle, names: Iterable[str], level: int = RUNTIME_LEVEL) -> None:
        import onnxruntime

        manifest, options = bundle.manifest, session_options(level)
        self.states = {s.name: np.zeros((1, *map(int, s.shape[1:])), s.dtype) for s in manifest.states}
        self._graphs: dict[str, tuple[Graph, Any]] = {}
        for name in names:
            graph = manifest.graphs[name]
            path = str(bundle.file(graph.file))
            session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
            self._graphs[name] = (graph, session)

    def run(self, name: str, inputs: dict[str, Array]) -> dict[str, Array]:
        """The outputs of one graph, of inputs whose first axis is 1."""
        graph, session = self._graphs[name]
        binding = session.io_binding()
        sizes = {STREAMS: 1, TOKENS: next((a.shape[1] for a in inputs.values() if a.ndim > 1), 1)}
        outputs = {
            port.name: np.zeros([sizes[n] if isinstance(n, str) else n for n in port.shape], port.dtype)
            for port in graph.outputs
        }
        inputs = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        bound = {**inputs, **{use.input: self.states[use.state] for use in graph.states}}
        results = {**outputs, **{use.output: self.states[use.state] for use in graph.states if use.output}}
        for bind, arrays in ((binding.bind_input, bound), (binding.bind_output, results)):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        session.run_with_iobinding(binding)
        return outputs


class DecoderRun(GraphRun):
    """A bundle with a decoder.

    Attributes:
        capacity: tokens.
    """

    def __init__(self, bundle: Bundle, level: int = RUNTIME_LEVEL) -> None:
        manifest = bundle.manifest
        language = manifest.language
        assert language is not None
        self.capacity = next(state.capacity for state in manifest.states if state.kind == "linear")
        self._roles = {role: getattr(language, role) for role in ("embed", "decoder", "rebase")}
        self._eyes = graphs_for(manifest, [language.visual] if language.visual else [])
        super().__init__(bundle, (*self._eyes, *self._roles.values()), level)

    def see(self, frame: Array, position: int = 0) -> Array:
        """Embeddings [1, tokens, D] of the frame of a stream at that position, uint8 [height, width, 3]."""
        values: dict[str, Array] = {"frame": frame[None], "position": np.array([position])}
        for name in self._eyes:
            values |= self.run(name, {port.name: values[port.name] for port in self._graphs[name][0].inputs})
        return values[VISUAL]

    def embed(self, tokens: Array) -> Array:
        """Embeddings [1, T, D] of tokens [1, T]."""
        return self.run(self._roles["embed"], {"tokens": tokens})["embeddings"]

    def step(self, embeddings: Array, position_ids: Array, write_index: int, slot_mask: Array) -> Array:
        """Logits [V] after embeddings [1, T, D] at position ids [1, R, T], written from slot `write_index` on."""
        inputs = {
            "embeddings": embeddings,
            "position_ids": position_ids,
            "write_index": np.array([write_index]),
            "slot_mask": slot_mask[None],
        }
        return self.run(self._roles["decoder"], inputs)["logits"][0]

    def rebase(self, slot_positions: Array) -> None:
        """Turn the keys of all slots to positions [1, R, C]."""
        self.run(self._roles["rebase"], {"slot_positions": slot_positions})


@dataclass(frozen=True)
class Replay:
    """What a replay found. Errors are relative, root mean square, where they are largest.

    Attributes:
        difference: between the bundle and PyTorch in float32 with the same weights: the checkpoint's, or those that the
            bundle's integers stand for, whose products are then in float32 too.
        tokens: how many were taken.
        seeing: of integer weights, between what the bundle sees by products in float32 and PyTorch with the
            checkpoint's; else part of `difference`.
        quantization: of integer weights, between the bundle as a runtime runs it and PyTorch with the checkpoint's.
        rounding: of integer weights, how far one is from the checkpoint's at most, in steps of its block.
    """

    difference: float
    tokens: int
    quantization: float | None = None
    rounding: float | None = None
    seeing: float | None = None


def replay(checkpoint: DecoderCheckpoint, bundle: Bundle) -> Replay:
    """Take random tokens, and what the model sees in random frames, through PyTorch and through the bundle.

    Before the last token some are forgotten and all keys of the bundle turned to other positions. PyTorch stays at the
    old ones: only distances count.
    """
    tokens = sum(STEPS) + 1
    as_run = max(_replay(checkpoint, DecoderRun(bundle), bundle))
    if Precision(bundle.manifest.precision).bits is None:
        return Replay(as_run, tokens)
    stored = StoredWeights(checkpoint.decoder, bundle)
    with stored.in_use():
        exact, seeing = _replay(checkpoint, DecoderRun(bundle, EXACT_LEVEL), bundle)
    return Replay(exact, tokens, as_run, stored.rounding(), seeing)


def _replay(checkpoint: DecoderCheckpoint, run: DecoderRun, bundle: Bundle) -> tuple[float, float]:
    """The largest relative error of the logits of a step or of some tokens' embeddings, and that of what is seen.

    The bundle takes steps. PyTorch takes all tokens at once, and the last one by itself: it widens its weights, or
    dequantizes those of the bundle, each time.
    """
    generator = np.random.default_rng(0)
    decoder = checkpoint.decoder
    rows, vocabulary = decoder.config.rope.rows, decoder.config.vocab_size
    tokens = generator.integers(0, vocabulary, (1, sum(STEPS) + 1))
    positions = np.arange(tokens.shape[1]) + generator.integers(0, 4, (1, rows, 1))
    mask, at, shift = np.zeros(run.capacity, bool), 0, 0
    pairs: list[tuple[Array, Tensor]] = []
    taken: list[Array] = []
    logits: list[Array] = []
    with torch.inference_mode():
        seen = _see(checkpoint, bundle, run, generator)
        visual = None if seen is None else seen[0]
        for length in (*STEPS, 1):
            stop = at + length
            embeddings = run.embed(tokens[:, at:stop])
            pairs.append((embeddings, decoder.embed(torch.from_numpy(tokens[:, at:stop]))))
            if at == 0 and visual is not None:  # what was seen goes where tokens go
                embeddings = embeddings.copy()
                embeddings[:, : visual.shape[1]] = visual[:, :length]
            if stop == tokens.shape[1]:
                mask[FORGOTTEN], shift = False, SHIFT
                slot_positions = np.zeros((1, rows, run.capacity), np.int64)
                slot_positions[:, :, :at] = positions[:, :, :at] + shift
                run.rebase(slot_positions)
            taken.append(embeddings)
            logits.append(run.step(embeddings, positions[:, :, at:stop] + shift, at, mask))
            mask[at:stop] = True
            at = stop
        inputs, places, last = torch.from_numpy(np.concatenate(taken, axis=1)), torch.from_numpy(positions), at - 1
        first, cache = decoder(inputs[:, :last], places[:, :, :last])
        second, _ = decoder(inputs[:, last:], places[:, :, last:], cache, torch.from_numpy(mask[None, :last]))
        expected = torch.cat([first, second], dim=1)[0]
        pairs += zip(logits, expected[np.cumsum((*STEPS, 1)) - 1], strict=True)
    return largest_error(pairs), largest_error([] if seen is None else [seen])


def largest_error(pairs: Iterable[tuple[Array, Tensor]]) -> float:
    """The largest relative error, root mean square, of some arrays against what is expected of each."""
    difference = 0.0
    for found, wanted in pairs:
        error = np.linalg.norm(found - wanted.numpy()) / max(float(wanted.norm()), 1e-6)
        difference = max(difference, float(error)) if np.isfinite(error) else math.inf
    return difference


def _see(
    checkpoint: DecoderCheckpoint,
    bundle: Bundle,
    run: DecoderRun,
    generator: np.random.Generator,
) -> tuple[Array, Tensor] | None:
    """What the bundle makes of a random frame, [1, tokens, D], and what PyTorch does."""
    if checkpoint.vision is None and checkpoint.projector is None:
        return None
    size = (bundle.manifest.frame.height, bundle.manifest.frame.width, 3)
    count = 1 if checkpoint.vision is not None else FRAMES
    frames = generator.integers(0, 256, (count, *size), np.uint8)
    visual = [run.see(frame, position) for position, frame in enumerate(frames)][-1]
    pixels = torch.from_numpy(frames)
    if checkpoint.vision is not None:
        return visual, checkpoint.vision(pixels)
    assert checkpoint.projector is not None
    assert checkpoint.tower is not None
    model = checkpoint.tower.model
    window = next(state.capacity for state in bundle.manifest.states if state.kind == "ring")
    features, _, _ = model(pixels[None], None, window, 0)
    return visual, checkpoint.projector(features[0, -1:], model.config.grid)
