"""`framestep export`, `label`, `calibrate` and `build`: what makes bundles and changes them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ...runtime.counted import counted
from .options import (
    BackgroundOption,
    BundleArgument,
    JsonOption,
    LabelsOption,
    TemplateOption,
    TextEmbeddingsOption,
    TextGraphOption,
    TextModelOption,
    print_facts,
)


def export(
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="Folder, .pt/.pth file or Hugging Face hub id: a StreamFormer, or a decoder (Streamo and other"
            " Qwen2.5-VL, VideoQA with StreamFormer, Qwen2, Llama).",
            show_default=False,
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle to write.")] = Path("out.bundle"),
    random_init: Annotated[
        str | None, typer.Option(help="Random weights instead of a checkpoint: base or tiny.", metavar="SIZE")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="config.json, where it is not beside the weights.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Frames that one frame attends to, itself included. Default: num_frames.")
    ] = None,
    image_size: Annotated[
        str | None, typer.Option(help="Input size, H or HxW in pixels. Default: the checkpoint's.", metavar="HxW")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Frames a second that the model is to see. Default: every frame.")
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(help="How frames of another size are fitted: crop, stretch or letterbox. Default: crop."),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="Task head of a training checkpoint whose scale and projections score labels.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp32, or weights of 8 bits for CPUs: w8. Of a decoder also fp16, and weights of 4 bits: w4 for CPUs,"
            " fp16+w4 for GPUs. Default: fp32."
        ),
    ] = None,
    capacity: Annotated[int | None, typer.Option(help="Tokens that a decoder's cache holds. Default: 4096.")] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Tokens that one step of a decoder should take at most. Default: 128.")
    ] = None,
    frame_size: Annotated[
        str | None,
        typer.Option(
            help="Frames of a Qwen2.5-VL, in pixels. Default: the largest 16:9 within 100,352 pixels.", metavar="HxW"
        ),
    ] = None,
    vision_tower: Annotated[
        str | None, typer.Option(help="StreamFormer of a VideoQA checkpoint. Default: the one that its config names.")
    ] = None,
    labels: LabelsOption = None,
    text_model: TextModelOption = None,
    text_embeddings: TextEmbeddingsOption = None,
    template: TemplateOption = None,
    background: BackgroundOption = None,
    text_graph: TextGraphOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there already.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint into a bundle, and check that both give the same."""
    from ..exporting import ExportArguments, LabelArguments, agreement
    from ..exporting import export as export_checkpoint

    labelling = LabelArguments(labels, text_model, text_embeddings, tuple(template or ()), background, text_graph)
    facts = export_checkpoint(
        ExportArguments(
            checkpoint, output, random_init, config, window, image_size, rate, resize, head, force, labelling,
            precision, capacity, chunk, frame_size, vision_tower,
        ),
        lambda line: None if as_json else print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    notes = "".join(f"\nnote: {note}" for note in facts.get("notes", ()))
    print_facts(
        facts,
        as_json,
        f"{facts['bundle']}: {facts['bytes'] / 1e6:.1f} MB, {agreement(facts)}{notes}",
    )


def label(
    bundle: BundleArgument,
    labels: LabelsOption = None,
    text_model: TextModelOption = None,
    text_embeddings: TextEmbeddingsOption = None,
    template: TemplateOption = None,
    background: BackgroundOption = None,
    text_graph: TextGraphOption = False,
    as_json: JsonOption = False,
) -> None:
    """Give a bundle other labels. The backbone and saved states stay as they are."""
    from ..exporting import LabelArguments
    from ..exporting import label as label_bundle

    facts = label_bundle(
        bundle,
        LabelArguments(labels, text_model, text_embeddings, tuple(template or ()), background, text_graph),
    )
    calibrated = "calibrated" if facts["scores_calibrated"] else "uncalibrated"
    print_facts(facts, as_json, f"{bundle}: {counted(len(facts['labels']), 'label')}, scores {calibrated}")


def calibrate(
    bundle: BundleArgument,
    video: Annotated[
        list[str],
        typer.Option(
            "--video",
            "-v",
            help="Clip to take ranges from: a video file, a folder of them, a camera or synthetic. Repeat it for"
            " several. CLIP.labels.txt beside CLIP.mp4 holds the label of each frame, one a line.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the bundle to write.")] = Path(
        "int8.bundle"
    ),
    check: Annotated[
        list[str] | None, typer.Option(help="Clip to measure accuracy on. Default: the same clips.", show_default=False)
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames to take ranges from, over all clips.")] = 256,
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help="int8, fp16 or fp16+int8; int8+kv8 and fp32+kv8 remember keys and values as INT8, fp16+kv8 too, for"
            " the torch engine. Repeat it for several, the main one first. Default: int8."
        ),
    ] = None,
    keep_float: Annotated[
        bool, typer.Option("--keep-float", help="Keep the float32 graphs in the bundle too.")
    ] = False,
    method: Annotated[str, typer.Option(help="How ranges are taken: minmax, percentile or entropy.")] = "percentile",
    smooth: Annotated[bool, typer.Option("--smooth", help="Move outlier channels into the weights.")] = False,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0, help="Leave layers in float until INT8 loses no more points of accuracy on labelled clips."
        ),
    ] = None,
    min_cosine: Annotated[
        float | None,
        typer.Option(max=1, help="Leave layers in float until `pooled` has this mean cosine with float32."),
    ] = None,
    drift_frames: Annotated[int, typer.Option(min=0, help="Length of the stream on which drift is measured.")] = 1100,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is there already.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize a bundle with sample video, and report what that costs in accuracy."""
    from ..calibrating import CalibrateArguments, as_text
    from ..calibrating import calibrate as calibrate_bundle

    arguments = CalibrateArguments(
        bundle,
        output,
        tuple(video),
        tuple(check or ()),
        frames,
        tuple(precision or ()),
        keep_float,
        method,
        smooth,
        max_drop,
        min_cosine,
        drift_frames,
        force,
    )
    facts = calibrate_bundle(arguments, lambda line: None if as_json else print(line, file=sys.stderr, flush=True))
    print_facts(facts, as_json, as_text(facts))


def build(
    bundle: BundleArgument,
    precision: Annotated[
        str | None,
        typer.Option(
            help="fp16 (derived from fp32 where the bundle has none), fp16+int8, fp16+w4 or fp32."
            " Default: fp16, or fp16+w4 for a decoder exported so."
        ),
    ] = None,
    streams: Annotated[int, typer.Option(min=1, help="The most streams in one step.")] = 1,
    flavour: Annotated[
        str, typer.Option(help="tensorrt, tensorrt_rtx or auto, which takes the first that is installed.")
    ] = "auto",
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(help="Of the GPU to build for, such as 8.6; repeat it for several. Default: the GPU at hand."),
    ] = None,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="One engine for all GPUs from compute capability 8.0 on.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="An engine that later versions of TensorRT run too.")
    ] = False,
    workspace: Annotated[
        int | None, typer.Option(min=1, help="Device memory that one layer may use while it works (MiB).")
    ] = None,
    attention: Annotated[
        str,
        typer.Option(
            help="native; triton: framestep's own kernel, where TensorRT takes plugins; auto: measure both, keep one."
        ),
    ] = "native",
    again: Annotated[bool, typer.Option("--again", help="Build even what is there already.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compile a bundle's graphs with TensorRT, into the bundle."""
    from ..building import BuildArguments, as_text
    from ..building import build as build_engines

    arguments = BuildArguments(
        bundle,
        precision,
        streams,
        flavour,
        tuple(compute_capability or ()),
        hardware_compatible,
        version_compatible,
        workspace,
        attention,
        again,
    )
    facts = build_engines(arguments, quiet=as_json)
    print_facts(facts, as_json, as_text(facts))
