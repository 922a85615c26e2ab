"""The work of `framestep export` and `framestep label`: from what a person typed to the export functions' options."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.bundle import MANIFEST, Bundle, check_replaceable
from ..runtime.counted import counted
from ..runtime.errors import CheckpointError
from ..runtime.manifest import Manifest
from ..runtime.text import LabelError, read_labels

if TYPE_CHECKING:
    from ..export.decoder_export import DecoderReport

SEED = 0
SELDOM = 10  # turns between two re-basings that nobody minds

Progress = Callable[[str], None]


@dataclass(frozen=True)
class LabelArguments:
    """The options that `export` and `label` share."""

    labels: Path | None = None
    text_model: str | None = None
    text_embeddings: Path | None = None
    templates: tuple[str, ...] = ()
    background: str | None = None
    text_graph: bool = False


@dataclass(frozen=True)
class ExportArguments:
    """What `framestep export` was given; names as on the command line."""

    checkpoint: str | None
    output: Path
    random_init: str | None = None
    config: Path | None = None
    window: int | None = None
    image_size: str | None = None
    rate: float | None = None
    resize: str | None = None
    head: str | None = None
    force: bool = False
    labelling: LabelArguments = LabelArguments()
    precision: str | None = None
    capacity: int | None = None
    chunk: int | None = None
    frame_size: str | None = None
    vision_tower: str | None = None


def agreement(facts: dict[str, Any]) -> str:
    """How well a bundle agrees with PyTorch, in words; see `export` for the facts."""
    count = (
        counted(facts["tokens_replayed"], "token")
        if "tokens_replayed" in facts
        else counted(facts["frames_replayed"], "frame")
    )
    found = [f"agrees with PyTorch within {facts['difference']:.1e} over {count}"] if "difference" in facts else []
    if "quantization_error" in facts:
        what, shown = ("logits", "tokens") if "tokens_replayed" in facts else ("features", "frames")
        found.append(f"its integer weights move {what} by up to {facts['quantization_error']:.1%} (random {shown})")
    return "; ".join(found)


# options that say something to one family only
OF_STREAMFORMER = ("config", "image_size", "resize", "head")
OF_DECODERS = ("capacity", "chunk", "frame_size", "vision_tower")


def export(arguments: ExportArguments, progress: Progress = lambda line: None) -> dict[str, Any]:
    """Export a checkpoint, or random weights.

    Args:
        progress: takes a line about each stage.

    Returns:
        Facts for the report: path, difference, frames or tokens, bytes.
    """
    check_replaceable(arguments.output, arguments.force)  # before anything is fetched or read
    _need_export_packages()
    from ..export.decoder_checkpoint import is_decoder
    from ..export.streamchat_checkpoint import is_streamchat

    if arguments.checkpoint is not None and arguments.random_init is None:
        if (Path(arguments.checkpoint) / MANIFEST).is_file():
            raise CheckpointError(f"{arguments.checkpoint}: is a bundle already; export takes the checkpoint")
        progress(f"reading {arguments.checkpoint}")
        if is_decoder(arguments.checkpoint):
            return _export_decoder(arguments, arguments.checkpoint, progress)
        if is_streamchat(arguments.checkpoint):
            return _export_streamchat(arguments, arguments.checkpoint, progress)
    for name in OF_DECODERS:
        if getattr(arguments, name) is not None:
            raise CheckpointError(f"--{name.replace('_', '-')}: only decoders have it, and this is a StreamFormer")
    return _export_streamformer(arguments, progress)


def _export_decoder(arguments: ExportArguments, source: str, progress: Progress) -> dict[str, Any]:
    from ..export.decoder_checkpoint import read_decoder_checkpoint
    from ..export.decoder_export import DecoderOptions, export_decoder

    _refuse_streamformer_options(arguments)
    size = parse_size(arguments.frame_size, "--frame-size") if arguments.frame_size else None
    given = {name: getattr(arguments, name) for name in ("precision", "capacity", "chunk", "window", "rate")}
    options = DecoderOptions(frame_size=size, **{name: value for name, value in given.items() if value is not None})
    checkpoint = read_decoder_checkpoint(source, arguments.vision_tower)
    report = export_decoder(checkpoint, arguments.output, options, arguments.force, progress)
    manifest = Bundle.open(report.path, verify=False).manifest
    return {**_decoder_facts(report, manifest), "notes": decoder_notes(report.path, manifest)}


def decoder_notes(folder: Path, manifest: Manifest) -> list[str]:
    """What one should know of a decoder before one talks with it."""
    from ..runtime.chat_format import Words
    from ..runtime.decoding import rows_and_capacity, visual_tokens
    from ..runtime.dialogue import turn_tokens
    from ..runtime.dialogue_options import DialogueOptions

    language = manifest.language
    if language is None or language.visual is None:
        return []
    if language.tokenizer is None:
        return ["the checkpoint has no tokenizer.json: the bundle can neither read nor write"]
    words = Words(language, folder)
    if not words.decides:
        return [
            "the checkpoint has no tokens for silence, standby and response: the model answers questions as they are"
            " asked"
        ]
    (rows, room), options = rows_and_capacity(manifest), DialogueOptions()
    system, turn = len(words.opening(None)), turn_tokens(manifest, words, options)
    if system + turn > room:
        shorter = ", or chat with a shorter --system" if turn < room else ""
        return [
            f"the cache of {room} tokens holds no dialogue: the system prompt takes {system}, a turn {turn};"
            f" export with a larger --capacity or a smaller --frame-size{shorter}"
        ]
    # positions of a turn: a frame with rows and columns takes no more than the longer of them
    shared = visual_tokens(manifest) - max(manifest.grid) if rows == 3 and manifest.grid is not None else 0
    span = turn - options.frames_a_turn(manifest) * shared
    left = language.positions - system - (room - system) // turn * span  # when the cache is full
    capacity = system + ((language.positions - system) // span - SELDOM) * turn
    if left >= span or capacity < system + turn:
        return []
    return [
        f"the cache of {room} tokens holds nearly as much as there are positions ({language.positions}): once it is"
        f" full, all keys are turned to lower positions in every turn; with --capacity {capacity} in every tenth"
    ]


def _export_streamchat(arguments: ExportArguments, source: str, progress: Progress) -> dict[str, Any]:
    from ..export.streamchat_checkpoint import read_streamchat_checkpoint
    from ..export.streamchat_export import StreamChatOptions, export_streamchat

    _refuse_streamformer_options(arguments)
    for name in ("frame_size", "vision_tower"):
        if getattr(arguments, name) is not None:
            raise CheckpointError(f"--{name.replace('_', '-')}: a StreamChat's tower is its own, of one frame size")
    given = {name: getattr(arguments, name) for name in ("precision", "window", "capacity", "chunk", "rate")}
    options = StreamChatOptions(**{name: value for name, value in given.items() if value is not None})
    checkpoint = read_streamchat_checkpoint(source)
    report = export_streamchat(checkpoint, arguments.output, options, arguments.force, progress)
    return _decoder_facts(report, Bundle.open(report.path, verify=False).manifest)


def _decoder_facts(report: DecoderReport, manifest: Manifest) -> dict[str, Any]:
    return {
        "bundle": str(report.path),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "difference": report.difference,
        **({} if report.quantization is None else {"quantization_error": report.quantization}),
        "tokens_replayed": report.tokens,
    }


def _refuse_streamformer_options(arguments: ExportArguments) -> None:
    for name in OF_STREAMFORMER:
        if getattr(arguments, name) is not None:
            raise CheckpointError(f"--{name.replace('_', '-')}: only a StreamFormer has it, and this is a decoder")
    if _label_options(arguments.labelling) is not None:
        raise CheckpointError("--labels: only a StreamFormer scores labels; ask a decoder with questions")


def _export_streamformer(arguments: ExportArguments, progress: Progress) -> dict[str, Any]:
    from ..export.checkpoint import Checkpoint, read_checkpoint
    from ..export.export import ExportOptions, export_streamformer
    from ..export.streamformer import BASE, TINY, random_model

    sizes = {"base": BASE, "tiny": TINY}
    if (arguments.checkpoint is None) == (arguments.random_init is None):
        raise CheckpointError("give a CHECKPOINT, or --random-init base|tiny for random weights, and not both")
    if arguments.config is not None and arguments.checkpoint is None:
        raise CheckpointError("--config: says what a CHECKPOINT's weights are; --random-init has sizes of its own")
    size = parse_size(arguments.image_size) if arguments.image_size else None
    resize = arguments.resize or "crop"
    if resize not in ("crop", "stretch", "letterbox"):
        raise CheckpointError(f"--resize: expected crop, stretch or letterbox, found '{resize}'")
    labelling = _label_options(arguments.labelling)
    if arguments.checkpoint is not None:
        checkpoint = read_checkpoint(arguments.checkpoint, arguments.config)
    else:
        assert arguments.random_init is not None
        if arguments.random_init not in sizes:
            raise CheckpointError(f"--random-init: expected base or tiny, found '{arguments.random_init}'")
        origin = f"random-init:{arguments.random_init}:{SEED}"
        checkpoint = Checkpoint(random_model(sizes[arguments.random_init], SEED), origin)
    precision = ExportOptions.precision if arguments.precision is None else arguments.precision
    options = ExportOptions(arguments.window, size, arguments.rate, resize, arguments.head, precision)
    report = export_streamformer(checkpoint, arguments.output, options, labelling, arguments.force, progress)
    manifest = Bundle.open(report.path, verify=False).manifest
    return {
        "bundle": str(report.path),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "difference" if report.precision == "fp32" else "quantization_error": report.difference,
        "frames_replayed": report.frames,
        "scores_calibrated": manifest.scoring.calibrated if manifest.scoring else None,
    }


def label(path: Path, arguments: LabelArguments) -> dict[str, Any]:
    """Replace the labels of a bundle.

    Returns:
        Facts for the report: path, labels, whether the scores are calibrated.
    """
    if arguments.text_model is not None or arguments.text_embeddings is not None:
        _need_export_packages()
    from ..export.labelling import label_bundle

    options = _label_options(arguments)
    if options is None:
        raise LabelError("--labels: give a file with one label a line, or --text-graph with --text-model")
    bundle = label_bundle(Bundle.open(path), options)
    labels, scoring = bundle.manifest.labels, bundle.manifest.scoring
    return {
        "bundle": str(path),
        "labels": list(labels.names) if labels else [],
        "scores_calibrated": scoring.calibrated if scoring else None,
    }


def parse_size(text: str, option: str = "--image-size") -> tuple[int, int]:
    """`H` or `HxW` in pixels."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if found is None:
        raise CheckpointError(f"{option}: expected H or HxW in pixels, found '{text}'")
    height = int(found[1])
    return height, int(found[2] or height)


def _label_options(arguments: LabelArguments) -> Any:
    """LabelOptions, or None where no labels were asked for."""
    from ..export.labelling import LabelOptions

    wanted = arguments.labels is not None or arguments.text_graph
    if not wanted:
        for name in ("text_model", "text_embeddings", "templates", "background"):
            if getattr(arguments, name):
                option = "--" + name.replace("_", "-").removesuffix("s" if name == "templates" else "")
                raise LabelError(f"{option}: says how labels are embedded, but there is no --labels file")
        return None
    return LabelOptions(
        labels=read_labels(arguments.labels) if arguments.labels is not None else (),
        text_model=arguments.text_model,
        text_embeddings=arguments.text_embeddings,
        templates=arguments.templates,
        background=arguments.background,
        text_graph=arguments.text_graph,
    )


def _need_export_packages() -> None:
    # looked for, not imported: that takes seconds, and few checkpoints need all of them
    for module in ("torch", "onnx", "transformers", "safetensors"):
        if importlib.util.find_spec(module) is None:
            raise CheckpointError(f"this needs the package {module}: pip install 'framestep[export]'")
