"""The work of `framestep export` and `framestep label`: from what a person typed to the export functions' options."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.bundle import Bundle
from ..runtime.errors import CheckpointError
from ..runtime.text import LabelError, read_labels

SEED = 0


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
    resize: str = "crop"
    head: str | None = None
    force: bool = False
    labelling: LabelArguments = LabelArguments()


def export(arguments: ExportArguments) -> dict[str, Any]:
    """Export a checkpoint, or random weights.

    Returns:
        Facts for the report: path, difference, frames, bytes.
    """
    _need_export_packages()
    from ..export.checkpoint import Checkpoint, read_checkpoint
    from ..export.export import ExportOptions, export_streamformer
    from ..export.streamformer import BASE, TINY, random_model

    sizes = {"base": BASE, "tiny": TINY}
    if (arguments.checkpoint is None) == (arguments.random_init is None):
        raise CheckpointError("give a CHECKPOINT, or --random-init base|tiny for random weights, and not both")
    size = parse_size(arguments.image_size) if arguments.image_size else None
    if arguments.resize not in ("crop", "stretch", "letterbox"):
        raise CheckpointError(f"--resize: expected crop, stretch or letterbox, found '{arguments.resize}'")
    labelling = _label_options(arguments.labelling)
    if arguments.checkpoint is not None:
        checkpoint = read_checkpoint(arguments.checkpoint, arguments.config)
    else:
        assert arguments.random_init is not None
        if arguments.random_init not in sizes:
            raise CheckpointError(f"--random-init: expected base or tiny, found '{arguments.random_init}'")
        origin = f"random-init:{arguments.random_init}:{SEED}"
        checkpoint = Checkpoint(random_model(sizes[arguments.random_init], SEED), origin)
    options = ExportOptions(arguments.window, size, arguments.rate, arguments.resize, arguments.head)
    report = export_streamformer(checkpoint, arguments.output, options, labelling, arguments.force)
    manifest = Bundle.open(report.path, verify=False).manifest
    return {
        "bundle": str(report.path),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
        "difference": report.difference,
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


def parse_size(text: str) -> tuple[int, int]:
    """`H` or `HxW` in pixels."""
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if found is None:
        raise CheckpointError(f"--image-size: expected H or HxW in pixels, found '{text}'")
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
    for module in ("torch", "onnx", "transformers", "safetensors"):
        try:
            __import__(module)
        except ImportError:
            raise CheckpointError(f"this needs the package {module}: pip install 'framestep[export]'") from None
