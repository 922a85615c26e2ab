"""Checkpoint in, bundle out."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import __version__
from ..runtime.bundle import Bundle, BundleWriter
from ..runtime.errors import CheckpointError, FramestepError
from ..runtime.labels import read_label_embeddings
from ..runtime.manifest import FORMAT, MAX_STATE_BYTES, VERSION, FrameSpec, Manifest, Origin, Scoring
from .checkpoint import Checkpoint, TaskHead
from .graph import ACTIVATIONS, GraphBuilder, WeightFile
from .labelling import LabelOptions, write_labels
from .precision import Precision
from .streamformer import PatchProjections, StreamFormer
from .streamformer_graph import (
    interpolate_positions,
    write_backbone,
    write_label_graph,
    write_patch_label_graph,
)

PRECISIONS = ("fp32", "w8")
# what is accepted between PyTorch and the bundle: the largest difference in fp32, the relative error in w8
AGREEMENT = {"fp32": 2e-4, "w8": 0.1}


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint becomes a bundle.

    Attributes:
        window: frames that one frame attends to, itself included; None for the checkpoint's `num_frames`.
        image_size: height and width in pixels; None for the checkpoint's.
        rate: frames a second that the model is to see; None for every frame.
        resize: how frames of another size are brought to it: "crop", "stretch" or "letterbox".
        head: task head whose scale, bias and projections the scores take.
        precision: one of `PRECISIONS`.
    """

    window: int | None = None
    image_size: tuple[int, int] | None = None
    rate: float | None = None
    resize: str = "crop"
    head: str | None = None
    precision: str = "fp32"


DEFAULTS = ExportOptions()


@dataclass(frozen=True)
class ExportReport:
    """What an export gave.

    Attributes:
        difference: between PyTorch and the bundle over the replayed frames: in fp32 the largest of any number, as a
            share of the output's largest number where that is above 1; in w8, whose integers change more, the largest
            relative error of an output (of scores the absolute one), root mean square.
        frames: frames replayed.
        precision: of the bundle.
    """

    path: Path
    difference: float
    frames: int
    precision: str


def export_streamformer(
    checkpoint: Checkpoint,
    path: str | os.PathLike[str],
    options: ExportOptions = DEFAULTS,
    labels: LabelOptions | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda line: None,
) -> ExportReport:
    """Write a bundle, replay frames through PyTorch and through the bundle, and keep it only if they agree.

    Args:
        path: of the bundle to write.
        labels: what to look for; None for no labels.
        force: replace a bundle that is there already.
        progress: takes a line about each stage.

    Raises:
        CheckpointError: options that do not fit the checkpoint.
        OutputError: the bundle cannot be written.
        FramestepError: the bundle disagrees with PyTorch.
    """
    _check_options(checkpoint, options)
    if labels is not None:
        labels.check(has_text_graph=False)
    head = checkpoint.heads[options.head] if options.head else None
    with BundleWriter(path, force, progress) as writer:
        progress("writing graphs and weights")
        write_streamformer(checkpoint, writer, options, labels)
        progress("comparing the bundle with PyTorch")
        difference, frames = replay(checkpoint, Bundle.open(writer.folder, verify=False), head)
        limit, precision = AGREEMENT[options.precision], options.precision
        if not difference <= limit:
            raise FramestepError(
                f"{path}: not kept, the bundle differs from PyTorch by {difference:.2e} over {frames} frames"
                f" (at most {limit:.0e} is accepted in {precision})"
            )
    return ExportReport(Path(path), difference, frames, precision)


def write_streamformer(
    checkpoint: Checkpoint, writer: BundleWriter, options: ExportOptions, labels: LabelOptions | None = None
) -> None:
    """Write a bundle and compare it with nothing: `export_streamformer` is what users want."""
    _check_options(checkpoint, options)
    model, folder, precision = checkpoint.model, writer.folder, Precision(options.precision)
    config = model.config
    window = config.num_frames if options.window is None else options.window
    image_size = options.image_size or config.image_size
    grid = (image_size[0] // config.patch_size, image_size[1] // config.patch_size)
    if (state := grid[0] * grid[1] * config.hidden_size * window * 4) > MAX_STATE_BYTES:  # float32
        raise CheckpointError(
            f"--window: {window} frames make a state of {state} bytes a stream; at most {MAX_STATE_BYTES} can be"
        )
    head = checkpoint.heads[options.head] if options.head else None
    backbone_weights, label_weights = WeightFile(folder / "backbone.bin"), WeightFile(folder / "label.bin")
    builder = GraphBuilder("backbone", backbone_weights)
    backbone, states = write_backbone(model, window, image_size, precision, builder)
    builder.save(folder / builder.file)
    builder = GraphBuilder("label", label_weights)
    label = write_label_graph(config, builder)
    builder.save(folder / builder.file)
    builder = GraphBuilder("patch_label", label_weights, shared=[backbone_weights])
    patch_label = write_patch_label_graph(model, head, grid, precision, builder)
    builder.save(folder / builder.file)
    backbone_weights.close()
    label_weights.close()
    manifest = Manifest(
        format=FORMAT,
        version=VERSION,
        family="streamformer",
        precision=options.precision,
        frame=FrameSpec(*image_size, options.resize),
        graphs={"backbone": backbone, "label": label, "patch_label": patch_label},
        states=tuple(states),
        origin=Origin(checkpoint.origin, __version__, config.num_frames),
        rate=options.rate,
        grid=grid,
        scoring=_head_scoring(options.head, head),
    )
    if labels is not None:
        manifest = write_labels(folder, manifest, labels)
    writer.finish(manifest)


def replay(checkpoint: Checkpoint, bundle: Bundle, head: TaskHead | None = None) -> tuple[float, int]:
    """Step random frames through PyTorch, with a growing cache, and through the bundle.

    The ring fills up and wraps where the window is at most 22 frames. Where the bundle has labels, scores are compared
    too.

    Returns:
        The largest difference of any output, as an `ExportReport` has it, and the number of frames.
    """
    from ..runtime.session import Session

    manifest = bundle.manifest
    window = manifest.states[0].capacity
    frames = min(window + 2, 24)
    generator = np.random.default_rng(0)
    largest = 0.0
    model = at_size(checkpoint, (manifest.frame.height, manifest.frame.width))
    labelled = ("scores", "patch_scores") if manifest.labels else ()
    cache = None
    with Session(bundle, outputs=("features", "pooled", *labelled)) as session, torch.inference_mode():
        stream = session.open_stream()
        for index in range(frames):
            rgb = generator.integers(0, 256, (manifest.frame.height, manifest.frame.width, 3), np.uint8)
            result = stream.step(rgb)
            features, pooled, cache = model(torch.from_numpy(rgb)[None, None], cache, window, index)
            expected = {"features": features[0, 0], "pooled": pooled[0, 0]}
            if labelled:
                expected |= _scores(checkpoint, head, bundle, features[0, 0], pooled[0, 0])
            for name, value in expected.items():
                wanted = value.numpy()
                off = result[name] - wanted
                if manifest.precision == "fp32":
                    # rounding goes by the size of what is summed: trained models have features far above 1
                    found = float(np.abs(off).max() / max(1.0, np.abs(wanted).max()))
                else:  # scores are from 0 to 1, and nearly all of them may be as good as 0
                    size = np.sqrt(off.size) if name in labelled else np.linalg.norm(wanted)
                    found = float(np.linalg.norm(off) / size)
                largest = max(largest, found) if np.isfinite(found) else np.inf
    return largest, frames


def _scores(
    checkpoint: Checkpoint, head: TaskHead | None, bundle: Bundle, features: Tensor, pooled: Tensor
) -> dict[str, Tensor]:
    """The scores of a frame, by the modules of PyTorch."""
    manifest, model = bundle.manifest, checkpoint.model
    assert manifest.labels is not None
    assert manifest.scoring is not None
    assert manifest.grid is not None
    rows = read_label_embeddings(bundle.file(manifest.labels.file), len(manifest.labels.names))
    text, patch_text = (torch.tensor(array) for array in rows)
    projections = head.projections if head is not None else None
    patches = (projections or PatchProjections.of_pooling(model.head, model.config))(features)
    scale, bias = torch.tensor(manifest.scoring.logit_scale).exp(), manifest.scoring.logit_bias
    patch_scores = torch.sigmoid(scale * (F.normalize(patches, dim=-1) @ patch_text.T) + bias)
    return {
        "scores": torch.sigmoid(scale * (text @ F.normalize(pooled, dim=0)) + bias),
        "patch_scores": patch_scores.T.unflatten(1, manifest.grid),
    }


def at_size(checkpoint: Checkpoint, image_size: tuple[int, int]) -> torch.nn.Module:
    """The PyTorch model for another image size."""
    model = checkpoint.model
    if image_size == model.config.image_size:
        return model
    weights = model.state_dict()
    rank = max((v.shape[0] for k, v in weights.items() if k.endswith("_lora_a.weight")), default=0)
    with torch.device("meta"):
        resized = StreamFormer(replace(model.config, image_size=image_size), rank)
    positions = weights["embeddings.position_embeddings"][0]
    weights["embeddings.position_embeddings"] = interpolate_positions(positions, resized.config.grid)[None]
    resized.load_state_dict(weights, assign=True)
    return resized.eval()


def _check_options(checkpoint: Checkpoint, options: ExportOptions) -> None:
    patch = checkpoint.model.config.patch_size
    kind = checkpoint.model.config.hidden_act
    image_size = options.image_size or checkpoint.model.config.image_size
    if options.precision not in PRECISIONS:
        raise CheckpointError(
            f"--precision: expected {' or '.join(PRECISIONS)} of a StreamFormer, found '{options.precision}'; fp16 is"
            " derived by 'framestep build', int8 by 'framestep calibrate'"
        )
    if kind not in ACTIVATIONS:
        raise CheckpointError(
            f"{checkpoint.origin}: hidden_act '{kind}' has no ONNX form here; supported are {', '.join(ACTIVATIONS)}"
        )
    if options.window is not None and options.window < 1:
        raise CheckpointError(f"--window: expected at least 1 frame, found {options.window}")
    if any(size < patch or size % patch for size in image_size):
        raise CheckpointError(
            f"--image-size: expected multiples of the patch size {patch}, found {image_size[0]}x{image_size[1]}"
        )
    if options.rate is not None and not 0 < options.rate < float("inf"):
        raise CheckpointError(f"--rate: expected frames a second above 0, found {options.rate}")
    if options.head is not None and options.head not in checkpoint.heads:
        known = ", ".join(checkpoint.heads) or "none (only training checkpoints carry task heads)"
        raise CheckpointError(f"--head: '{options.head}' is not in the checkpoint; it has {known}")


def _head_scoring(name: str | None, head: TaskHead | None) -> Scoring | None:
    if name is None or head is None:
        return None
    if head.logit_scale is None or head.logit_bias is None:
        raise CheckpointError(f"--head: '{name}' has no logit_scale and logit_bias; it cannot score labels")
    return Scoring(head.logit_scale, head.logit_bias, name, calibrated=True)
