"""A StreamChat checkpoint in, a bundle out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import __version__
from ..runtime.bundle import Bundle, BundleWriter
from ..runtime.errors import CheckpointError
from ..runtime.manifest import FORMAT, VERSION, Cross, FrameSpec, Language, Manifest, Origin
from .decoder_export import TOKENIZER, CacheOptions, DecoderReport, check_replay
from .decoder_graph import write_embed, write_rebase
from .decoder_replay import EXACT_LEVEL, RUNTIME_LEVEL, GraphRun, Replay, largest_error
from .graph import GraphBuilder, WeightFile
from .precision import Precision
from .stored_weights import StoredLinear, StoredWeights, mlp_linears, scaled_by
from .streamchat import FAMILY, StreamChat, StreamChatConfig, visible_frames
from .streamchat_checkpoint import StreamChatCheckpoint
from .streamchat_graph import TEXT, write_decode, write_frame, write_rebase_frames

Array = npt.NDArray[Any]
FRAMES = (0, 3, 4, 4, 9, 10)  # of a replay: the first of its tokens that sees each frame
TOKENS = 12


@dataclass(frozen=True)
class StreamChatOptions(CacheOptions):
    """How a checkpoint becomes a bundle; `precision` is that of the frame path too.

    Attributes:
        window: frames that text may see.
        rate: frames a second that the model is to see.
    """

    window: int = 32
    rate: float = 5.0


def export_streamchat(
    checkpoint: StreamChatCheckpoint,
    path: Path,
    options: StreamChatOptions,
    force: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> DecoderReport:
    """Write a bundle, replay text among frames through PyTorch and through the bundle, and keep it only if they agree.

    Args:
        progress: takes a line about each stage.

    Raises:
        CheckpointError: options that do not fit the checkpoint.
        OutputError: the bundle cannot be written.
        FramestepError: the bundle disagrees with PyTorch.
    """
    with BundleWriter(path, force, progress) as writer:
        progress("writing graphs and weights")
        write_bundle(checkpoint, writer, options)
        progress("comparing the bundle with PyTorch")
        found = replay(checkpoint, Bundle.open(writer.folder, verify=False))
        check_replay(path, found, options.precision)
    return DecoderReport(path, found.difference, found.tokens, found.quantization)


def write_bundle(checkpoint: StreamChatCheckpoint, writer: BundleWriter, options: StreamChatOptions) -> None:
    """Write a bundle and compare it with nothing: `export_streamchat` is what users want."""
    model, folder, precision = checkpoint.model, writer.folder, Precision(options.precision)
    positions, capacity = _check_options(model.config, options)
    sizes = (options.window, capacity, positions, precision)
    text, visual = WeightFile(folder / "decoder.bin"), WeightFile(folder / "vision.bin")
    graphs, states = {}, []
    builder = GraphBuilder("embed", text)
    graphs["embed"] = write_embed(model.model.embed_tokens.weight, precision, builder)
    builder.save(folder / builder.file)
    builder = GraphBuilder("decoder", text)
    graphs["decoder"], found = write_decode(model, *sizes, builder)
    builder.save(folder / builder.file)
    states += found
    builder = GraphBuilder("frame", visual, shared=[text])
    graphs["frame"], found = write_frame(model, options.window, positions, precision, builder)
    builder.save(folder / builder.file)
    states += found
    builder = GraphBuilder("rebase", text)
    config = model.config.text
    graphs["rebase"] = write_rebase(config, capacity, positions, precision, builder, TEXT)
    builder.save(folder / builder.file)
    rebase_frames = None
    if model.config.positions == "parallel":  # literal rows and columns cannot move with time
        rebase_frames = "rebase_frames"
        builder = GraphBuilder(rebase_frames, visual, shared=[text])
        graphs[rebase_frames] = write_rebase_frames(model, options.window, positions, precision, builder)
        builder.save(folder / builder.file)
    text.close()
    visual.close()
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save(str(folder / TOKENIZER), pretty=False)
    vision = model.config.vision
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        family=FAMILY,
        precision=options.precision,
        frame=FrameSpec(vision.image_size, vision.image_size, "stretch"),  # as SigLIP's image processor does
        graphs=graphs,
        states=tuple(states),
        origin=Origin(checkpoint.origin, __version__),
        rate=options.rate,
        grid=(vision.side, vision.side),
        language=Language(
            embed="embed",
            decoder="decoder",
            rebase="rebase",
            visual=None,
            positions=positions,
            chunk=min(options.chunk, capacity),
            tokenizer=TOKENIZER if checkpoint.tokenizer is not None else None,
            tokens=checkpoint.tokens,
            stop=checkpoint.stop,
            chat="chatml" if {"turn_start", "turn_end"} <= set(checkpoint.tokens) else "plain",
            cross=Cross("frame", rebase_frames, model.config.positions),
        ),
    )
    writer.finish(manifest)


class StreamChatRun(GraphRun):
    """The graphs of a StreamChat over the states of one stream, on ONNX Runtime's CPU provider.

    Attributes:
        capacity: tokens.
        frames: slots for frames, one more than text may see.
        rows: tokens of a frame, the rows of a slot.
    """

    def __init__(self, bundle: Bundle, level: int = RUNTIME_LEVEL) -> None:
        super().__init__(bundle, bundle.manifest.graphs, level)
        states = {state.name.split(".")[0]: state for state in bundle.manifest.states}
        self.capacity = states["decoder"].capacity
        self.frames, self.rows = states["visual"].capacity, states["visual"].rows_per_slot

    def see(self, frame: Array, slot: int, position_ids: Array) -> None:
        """Write a frame, uint8 [height, width, 3], whose tokens are at position ids [1, 3, N], into a slot."""
        inputs = {"frame": frame[None], "write_index": np.array([slot * self.rows]), "position_ids": position_ids}
        self.run("frame", inputs)

    def step(self, tokens: Array, positions: Array, write_index: int, slot_mask: Array, visible: Array) -> Array:
        """Logits [V] after tokens [1, T] at positions [1, T], written from slot `write_index` on.

        Args:
            slot_mask: bool [capacity], slots of text that are seen.
            visible: bool [frames], slots of frames that are seen.
        """
        inputs = {
            "embeddings": self.run("embed", {"tokens": tokens})["embeddings"],
            "position_ids": positions[:, None],
            "write_index": np.array([write_index]),
            "slot_mask": slot_mask[None],
            "visual_slot_mask": visible[None],
        }
        return self.run("decoder", inputs)["logits"][0]


def replay(checkpoint: StreamChatCheckpoint, bundle: Bundle) -> Replay:
    """Take random tokens, with random frames between them, through PyTorch as a whole and the bundle by steps."""
    as_run = _replay(checkpoint, StreamChatRun(bundle))
    if Precision(bundle.manifest.precision).bits is None:
        return Replay(as_run, TOKENS)
    model = checkpoint.model
    stored = StoredWeights(model, bundle, ["frame"], _frame_linears(model))
    frames = torch.from_numpy(_random_frames(model.config, np.random.default_rng(1)))
    with torch.inference_mode():
        wanted = model.adapter(model.vision_model(frames))
        with stored.in_use():
            exact = _replay(checkpoint, StreamChatRun(bundle, EXACT_LEVEL))
            seeing = largest_error([(model.adapter(model.vision_model(frames)).numpy(), wanted)])
    return Replay(exact, TOKENS, as_run, stored.rounding(), seeing)


def _frame_linears(model: StreamChat) -> dict[str, StoredLinear]:
    """Those of the graph `frame` that are not the decoder's, by name."""
    found = {"adapter.fc1": StoredLinear(model.adapter.fc1), "adapter.fc2": StoredLinear(model.adapter.fc2)}
    for k, block in enumerate(model.cross_blocks[:-1]):
        found.update({f"block{k}.{part}": StoredLinear(linear) for part, linear in mlp_linears(block.mlp).items()})
        found[f"block{k}.down"] = StoredLinear(block.mlp.down_proj, block.mlp_gate.detach().float())
    for index, layer in enumerate(model.vision_model.encoder.layers):
        attention, name = layer.self_attn, f"siglip.layer{index}"
        found |= {
            f"{name}.query": scaled_by(attention.head_dim**-0.5, attention.q_proj),
            f"{name}.key": StoredLinear(attention.k_proj),
            f"{name}.value": StoredLinear(attention.v_proj),
            f"{name}.output": StoredLinear(attention.out_proj, constant=attention.v_proj.bias.detach()),
            f"{name}.fc1": StoredLinear(layer.mlp.fc1),
            f"{name}.fc2": StoredLinear(layer.mlp.fc2),
        }
    return found


def _random_frames(config: StreamChatConfig, generator: np.random.Generator) -> Array:
    size = config.vision.image_size
    return generator.integers(0, 256, (len(FRAMES), size, size, 3), np.uint8)


def _replay(checkpoint: StreamChatCheckpoint, run: StreamChatRun) -> float:
    """The relative error (root mean square, of the logits of a step) where it is largest."""
    model = checkpoint.model
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, model.config.text.vocab_size, (1, TOKENS))
    frames = _random_frames(model.config, generator)
    times = np.array(FRAMES)  # of frames between tokens, the position of the next one
    visible = visible_frames(FRAMES, TOKENS, run.frames - 1)
    with torch.inference_mode():
        arrays = (tokens, np.arange(TOKENS)[None], frames[None], times[None], visible[None])
        expected = model(*map(torch.from_numpy, arrays))[0]
        position_ids = model.config.position_ids(torch.from_numpy(times)).numpy()
    pairs = []
    for at in range(TOKENS):
        for index in np.flatnonzero(times == at):
            run.see(frames[index], int(index) % run.frames, position_ids[index : index + 1])
        seen = np.isin(np.arange(run.frames), np.flatnonzero(visible[at]) % run.frames)
        logits = run.step(tokens[:, at : at + 1], np.array([[at]]), at, np.arange(run.capacity) < at, seen)
        pairs.append((logits, expected[at]))
    return largest_error(pairs)


def _check_options(config: StreamChatConfig, options: StreamChatOptions) -> tuple[int, int]:
    """Positions and capacity."""
    sizes = options.sizes(config.text)
    if not 0 < options.rate < math.inf:
        raise CheckpointError(f"--rate: expected frames a second above 0, found {options.rate}")
    if options.window < options.rate:
        raise CheckpointError(
            f"--window: {options.window} is less than one second of video at {options.rate:g} frames a second;"
            f" expected at least {math.ceil(options.rate)}"
        )
    return sizes
