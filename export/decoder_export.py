"""A checkpoint with a language decoder in, a bundle out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..runtime.bundle import Bundle, BundleWriter
from ..runtime.counted import counted
from ..runtime.errors import CheckpointError, FramestepError
from ..runtime.manifest import FORMAT, VERSION, FrameSpec, Graph, Language, Manifest, Origin, State
from .decoder import DecoderConfig
from .decoder_checkpoint import DecoderCheckpoint
from .decoder_graph import write_decoder, write_embed, write_rebase
from .decoder_replay import STEPS, Replay, replay
from .graph import GraphBuilder, WeightFile
from .precision import PRECISIONS, Precision
from .projector import write_projector
from .streamformer_graph import write_backbone
from .vision import FrameLayout
from .vision_graph import VISUAL, write_vision

# largest relative error between PyTorch in float32 and the bundle that is accepted; of unrelated numbers it is 1.4
# what integer weights lose depends on the model: theirs catch only what is broken, and the sharp checks are the others
AGREEMENT = {"fp32": 2e-4, "fp16": 3e-2, "w8": 0.3, "w4": 0.9, "fp16+w4": 0.9}
# the same, against PyTorch with the weights that integers stand for
STORED_AGREEMENT = {"w8": 1e-3, "w4": 1e-3, "fp16+w4": AGREEMENT["fp16"]}
# what is seen against PyTorch with the checkpoint's weights, by products in float32
SEEING_AGREEMENT = {"w8": 0.1, "w4": 0.1, "fp16+w4": AGREEMENT["fp16"]}
# how far an integer weight may be from the checkpoint's, in steps: half of one, but that INT4 reaches -8 and only 7
ROUNDING = {"w8": 0.51, "w4": 1.01, "fp16+w4": 1.01}
TOKENIZER = "tokenizer.json"
CAPACITY = 4096
NO_FRAME = FrameSpec(1, 1, "stretch")  # of a decoder without eyes


@dataclass(frozen=True)
class CacheOptions:
    """How a decoder and its cache become part of a bundle.

    Attributes:
        precision: one of `PRECISIONS`, of the decoder. What sees has INT8 weights with "w8" and "w4", and is FP16 with
            "fp16" and "fp16+w4", but for VideoQA's StreamFormer and projector, which are float32 then.
        capacity: tokens that the cache holds; None for 4,096, or all positions where there are fewer.
        chunk: tokens that one step should take at most.
        positions: position ids go from 0 to `positions` - 1; never beyond the trained range.
    """

    precision: str = "fp32"
    capacity: int | None = None
    chunk: int = 128
    positions: int = 32768

    def sizes(self, config: DecoderConfig, least: int = 1) -> tuple[int, int]:
        """Positions and capacity, of at least so many tokens.

        Raises:
            CheckpointError: options that do not fit the decoder.
        """
        if self.precision not in PRECISIONS:
            raise CheckpointError(f"--precision: expected {', '.join(PRECISIONS)}, found '{self.precision}'")
        positions = min(self.positions, config.max_position_embeddings)
        capacity = min(CAPACITY, positions) if self.capacity is None else self.capacity
        if not least <= capacity <= positions:
            raise CheckpointError(
                f"--capacity: expected {least} to {positions} tokens, as many as there are positions, found {capacity}"
            )
        if self.chunk < 1:
            raise CheckpointError(f"--chunk: expected at least 1 token, found {self.chunk}")
        if Precision(self.precision).bits is not None:
            for key in ("hidden_size", "intermediate_size"):
                if getattr(config, key) % 32:
                    raise CheckpointError(
                        f"--precision {self.precision}: {key} {getattr(config, key)} is not a multiple of 32,"
                        " the weights that share a scale"
                    )
        return positions, capacity


@dataclass(frozen=True)
class DecoderOptions(CacheOptions):
    """How a checkpoint with a decoder becomes a bundle.

    Attributes:
        frame_size: height and width of a Qwen2.5-VL's frames; None for the largest 16:9 within 100,352 pixels.
        window: frames that one frame of a VideoQA model attends to; None for the StreamFormer's `num_frames`.
        rate: frames a second that the model is to see; None for every frame.
    """

    frame_size: tuple[int, int] | None = None
    window: int | None = None
    rate: float | None = None


DEFAULTS = DecoderOptions()


@dataclass(frozen=True)
class DecoderReport:
    """What an export gave.

    Attributes:
        difference: largest relative error between PyTorch in float32 and the bundle; of integer weights, both with what
            those stand for.
        tokens: tokens replayed.
        quantization: of integer weights, the error against the checkpoint's own.
    """

    path: Path
    difference: float
    tokens: int
    quantization: float | None = None


def export_decoder(
    checkpoint: DecoderCheckpoint,
    path: str | os.PathLike[str],
    options: DecoderOptions = DEFAULTS,
    force: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> DecoderReport:
    """Write a bundle, replay tokens through PyTorch and through the bundle, and keep it only if they agree.

    Args:
        path: of the bundle to write.
        force: replace a bundle that is there already.
        progress: takes a line about each stage.

    Raises:
        CheckpointError: options that do not fit the checkpoint.
        OutputError: the bundle cannot be written.
        FramestepError: the bundle disagrees with PyTorch.
    """
    _check_options(checkpoint, options)
    with BundleWriter(path, force, progress) as writer:
        progress("writing graphs and weights")
        write_bundle(checkpoint, writer, options)
        progress("comparing the bundle with PyTorch")
        found = replay(checkpoint, Bundle.open(writer.folder, verify=False))
        check_replay(Path(path), found, options.precision)
    return DecoderReport(Path(path), found.difference, found.tokens, found.quantization)


def check_replay(path: Path, found: Replay, precision: str) -> None:
    """Refuse a bundle that disagrees.

    Raises:
        FramestepError: by how much, and against what.
    """
    if found.rounding is not None and not found.rounding <= ROUNDING[precision]:
        raise FramestepError(
            f"{path}: not kept, a weight in {precision} is {found.rounding:.2f} steps off (at most"
            f" {ROUNDING[precision]} are accepted)"
        )
    checks = [(found.difference, "PyTorch", AGREEMENT[precision])]
    if found.quantization is not None:
        checks = [
            (found.difference, "PyTorch with the weights that its integers stand for", STORED_AGREEMENT[precision]),
            (found.quantization, "PyTorch with the checkpoint's weights", AGREEMENT[precision]),
        ]
    if found.seeing is not None:
        checks.insert(0, (found.seeing, "PyTorch in what it sees", SEEING_AGREEMENT[precision]))
    for error, against, limit in checks:
        if not error <= limit:
            raise FramestepError(
                f"{path}: not kept, the bundle has a relative error of {error:.2e} against {against} over"
                f" {found.tokens} tokens (at most {limit:.0e} is accepted in {precision})"
            )


def write_bundle(checkpoint: DecoderCheckpoint, writer: BundleWriter, options: DecoderOptions) -> None:
    """Write a bundle and compare it with nothing: `export_decoder` is what users want."""
    positions, capacity = _check_options(checkpoint, options)
    folder, decoder, precision = writer.folder, checkpoint.decoder, Precision(options.precision)
    frame, grid, graphs, states = _write_eyes(checkpoint, folder, options)
    weights = WeightFile(folder / "decoder.bin")
    tokens = dict(checkpoint.tokens)
    newline = None
    if checkpoint.projector is not None and checkpoint.projector.config.newline == "one_token":
        newline = checkpoint.projector.image_newline
        tokens["newline"] = decoder.config.vocab_size
    builder = GraphBuilder("embed", weights)
    graphs["embed"] = write_embed(decoder.model.embed_tokens.weight, precision, builder, newline)
    builder.save(folder / builder.file)
    builder = GraphBuilder("decoder", weights)
    graphs["decoder"], linear = write_decoder(decoder, capacity, positions, precision, builder)
    builder.save(folder / builder.file)
    builder = GraphBuilder("rebase", weights)
    graphs["rebase"] = write_rebase(decoder.config, capacity, positions, precision, builder)
    builder.save(folder / builder.file)
    weights.close()
    if checkpoint.tokenizer is not None:
        checkpoint.tokenizer.save(str(folder / TOKENIZER), pretty=False)
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        family=checkpoint.family,
        precision=options.precision,
        frame=frame,
        graphs=graphs,
        states=(*states, *linear),
        origin=Origin(checkpoint.origin, __version__, _trained_frames(checkpoint)),
        rate=options.rate,
        grid=grid,
        language=Language(
            embed="embed",
            decoder="decoder",
            rebase="rebase",
            visual=VISUAL if checkpoint.vision is not None or checkpoint.projector is not None else None,
            positions=positions,
            chunk=min(options.chunk, capacity),
            tokenizer=TOKENIZER if checkpoint.tokenizer is not None else None,
            tokens=tokens,
            stop=checkpoint.stop,
            chat=checkpoint.chat,
        ),
    )
    writer.finish(manifest)


def _write_eyes(
    checkpoint: DecoderCheckpoint, folder: Path, options: DecoderOptions
) -> tuple[FrameSpec, tuple[int, int] | None, dict[str, Graph], list[State]]:
    """Write the graphs from frames to embeddings: what a frame is, the grid of its tokens, graphs and their states."""
    graphs: dict[str, Graph] = {}
    weights, eyes = WeightFile(folder / "vision.bin"), Precision(options.precision).of_eyes
    states: list[State] = []
    frame, grid = NO_FRAME, None
    if checkpoint.vision is not None:
        size = options.frame_size or checkpoint.vision.config.default_frame()
        frame, grid = FrameSpec(*size, "letterbox"), FrameLayout.of(checkpoint.vision.config, *size).grid
        builder = GraphBuilder("vision", weights)
        graphs["vision"] = write_vision(checkpoint.vision, size, eyes, builder)
        builder.save(folder / builder.file)
    if checkpoint.projector is not None:
        assert checkpoint.tower is not None
        model = checkpoint.tower.model
        size, grid = model.config.image_size, model.config.grid
        frame = FrameSpec(*size, "stretch")  # as the reference's image processor does
        window = options.window or model.config.num_frames
        eyes = eyes if eyes.dtype == "float32" else Precision("fp32")  # there is no StreamFormer in FP16 beside them
        builder = GraphBuilder("backbone", weights)
        graphs["backbone"], states = write_backbone(model, window, size, eyes, builder)
        builder.save(folder / builder.file)
        builder = GraphBuilder("projector", weights)
        graphs["projector"] = write_projector(checkpoint.projector, grid, eyes, builder)
        builder.save(folder / builder.file)
    weights.close()
    return frame, grid, graphs, states


def _trained_frames(checkpoint: DecoderCheckpoint) -> int | None:
    return None if checkpoint.tower is None else checkpoint.tower.model.config.num_frames


def _check_options(checkpoint: DecoderCheckpoint, options: DecoderOptions) -> tuple[int, int]:
    """Positions and capacity."""
    positions, capacity = options.sizes(checkpoint.decoder.config, sum(STEPS) + 1)  # as many as are replayed
    if options.rate is not None and not 0 < options.rate < float("inf"):
        raise CheckpointError(f"--rate: expected frames a second above 0, found {options.rate}")
    if options.frame_size is not None:
        if checkpoint.vision is None:
            raise CheckpointError(
                f"--frame-size: a {checkpoint.family} has no vision tower whose frames could be chosen"
            )
        unit = checkpoint.vision.config.unit
        if any(side < unit or side % unit for side in options.frame_size):
            height, width = options.frame_size
            raise CheckpointError(f"--frame-size: expected multiples of {unit} pixels, found {height}x{width}")
        height, width = options.frame_size
        if (tokens := height * width // unit**2) > capacity:
            raise CheckpointError(
                f"--frame-size: a frame of {height}x{width} takes {counted(tokens, 'token')}, more than the cache's"
                f" {capacity}; choose a smaller one, or a larger --capacity"
            )
    if options.window is not None:
        if checkpoint.tower is None:
            raise CheckpointError(f"--window: a {checkpoint.family} has no ring of frames; give --capacity in tokens")
        if options.window < 1:
            raise CheckpointError(f"--window: expected at least 1 frame, found {options.window}")
    return positions, capacity
