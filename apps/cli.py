"""The command line. Each command is a thin wrapper; what it does is in the module it calls."""

from __future__ import annotations

import errno
import functools
import json
import re
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from .. import __version__
from ..runtime.counted import counted
from ..runtime.errors import FramestepError

INTERRUPTED = 130
OUT_OF_MEMORY = ("can't allocate memory", "Insufficient memory")  # as PyTorch and OpenCV say it

app = typer.Typer(
    name="framestep",
    help="Streaming video models, from a checkpoint to a camera.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback means a bug, and is wanted whole
)

BundleArgument = Annotated[Path, typer.Argument(help="Folder of the bundle.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for machines.")]
EngineOption = Annotated[str, typer.Option(help="Engine; auto takes the fastest that runs here.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads of the engine; default: all cores.")]
TurnOption = Annotated[float, typer.Option(help="Seconds of video in a turn.")]
SystemOption = Annotated[str | None, typer.Option(help="System prompt. Default: that of the bundle's chat format.")]
RateOption = Annotated[
    float | None, typer.Option(help="Frames a second that the model is shown. Default: the bundle's rate, or 1.")
]

LabelsOption = Annotated[Path | None, typer.Option(help="File with what to look for: one label a line.")]
TextModelOption = Annotated[
    str | None, typer.Option(help="Folder or hub id of the SigLIP model that embeds the labels.")
]
TextEmbeddingsOption = Annotated[
    Path | None, typer.Option(help="Ready label embeddings (.safetensors), instead of a text model.")
]
TemplateOption = Annotated[
    list[str] | None, typer.Option(help="Text that a label stands for, {} being the label; repeat it for several.")
]
BackgroundOption = Annotated[
    str | None, typer.Option(help="A label that competes in class maps but is reported as no event.")
]
TextGraphOption = Annotated[
    bool, typer.Option("--text-graph", help="Put the text tower into the bundle, for new labels on the device.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"framestep {__version__}")
        raise typer.Exit


@app.callback()
def framestep(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Streaming video models, from a checkpoint to a camera."""


@app.command()
def run(
    bundle: BundleArgument,
    source: Annotated[
        list[str],
        typer.Option(
            "--source",
            "-s",
            help="0, /dev/video0, rtsp://..., http://..., clip.mp4, a folder of images, gst:PIPELINE or "
            "synthetic. Repeat it to run several as streams of one session.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Results, one JSON object a frame (.jsonl); - for standard output.")
    ] = None,
    events: Annotated[Path | None, typer.Option(help="Segments of labels, one JSON object each (.jsonl).")] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Annotated video (.mp4). With several sources: NAME.0.mp4, NAME.1.mp4, ..."),
    ] = None,
    overlay: Annotated[
        str | None,
        typer.Option(help="Draw where a LABEL is as a heat map, or `all` labels as a class map."),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Show a window; q or Escape stops.")] = False,
    save_features: Annotated[
        Path | None,
        typer.Option(
            help="Outputs of every frame as arrays, frames first, with timestamps and indices (.npz). "
            "With several sources: NAME.0.npz, NAME.1.npz, ..."
        ),
    ] = None,
    save_masks: Annotated[
        Path | None,
        typer.Option(
            help="Class map of every frame as STREAM.INDEX.png, each byte a label of labels.json, 255 where the "
            "model did not look (a new folder)."
        ),
    ] = None,
    outputs: Annotated[
        str | None,
        typer.Option(
            help="Which outputs --output and --save-features write, such as `pooled,scores`. Default: scores "
            "in --output; all but patch_scores in --save-features."
        ),
    ] = None,
    on: Annotated[
        float | None,
        typer.Option(help="Score from which a label is present, in events and in annotated video. Default: 0.5."),
    ] = None,
    off: Annotated[
        float | None,
        typer.Option(help="Score below which a present label is gone. Default: three quarters of --on."),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0, help="Frames a second to take; 0: every frame. Default: the bundle's rate."),
    ] = None,
    max_frames: Annotated[int | None, typer.Option(min=1, help="Stop each source after this many frames.")] = None,
    deadline_ms: Annotated[
        float | None, typer.Option(min=0, help="Count the frames whose latency is longer (milliseconds).")
    ] = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    precision: Annotated[
        str,
        typer.Option(
            help="One of the bundle's precisions; auto takes INT8 on a CPU and FP16 on a GPU, where there is one."
        ),
    ] = "auto",
    width: Annotated[int | None, typer.Option(min=1, help="Width asked of a USB camera.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Height asked of a USB camera.")] = None,
    camera_fps: Annotated[
        float | None,
        typer.Option(help="Frames a second asked of a USB camera, or that a folder of images was taken at."),
    ] = None,
    fourcc: Annotated[str | None, typer.Option(help="Pixel format asked of a USB camera, such as MJPG.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a bundle on cameras, videos or images.

    Live sources give their newest frame and count what they drop; files give every frame.

    Ctrl-C, SIGTERM and a terminal that closes (SIGHUP) finish all files and exit 0 ("stopped by user").

    Exit status 2: an error, or a file or source was lost on the way.
    """
    from .run import run as run_bundle
    from .run_options import RunOptions
    from .status import status_for

    piped = output == Path("-")
    if piped and as_json:
        raise FramestepError("--output -: --json writes to standard output too; name a file, or leave --json out")
    options = RunOptions(
        bundle=bundle,
        sources=tuple(source),
        output=Path("/dev/stdout") if piped else output,
        events=events,
        record=record,
        overlay=overlay,
        show=show,
        save_features=save_features,
        save_masks=save_masks,
        outputs=() if outputs is None else tuple(name.strip() for name in outputs.split(",")),
        on=on,
        off=off,
        rate=rate,
        max_frames=max_frames,
        deadline_ms=deadline_ms,
        engine=engine,
        device=device,
        threads=threads,
        precision=precision,
        width=width,
        height=height,
        camera_fps=camera_fps,
        fourcc=fourcc,
    )
    summary = run_bundle(options, status_for(quiet=as_json))
    text = _json(summary.as_dict()) if as_json else summary.as_text()
    print(text, file=sys.stderr if piped else sys.stdout)
    if summary.errors:
        raise typer.Exit(2)


@app.command()
def chat(
    bundle: BundleArgument,
    source: Annotated[
        str,
        typer.Option(
            "--source",
            "-s",
            help="0, /dev/video0, rtsp://..., http://..., clip.mp4, a folder of images, gst:PIPELINE or synthetic.",
            show_default=False,
        ),
    ],
    ask: Annotated[
        list[str] | None,
        typer.Option(
            help="A question that stands from the beginning; repeat it for several. More may come as lines of"
            " standard input, where /questions lists them and /forget N withdraws one."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="What happens, one JSON object each (.jsonl).")] = None,
    turn: TurnOption = 1.0,
    rate: RateOption = None,
    system: SystemOption = None,
    eviction: Annotated[
        str,
        typer.Option(
            help="What a full cache does: slots forgets the oldest turn and moves nothing; cut drops the front"
            " and takes the rest in again."
        ),
    ] = "slots",
    prune: Annotated[
        float | None,
        typer.Option(
            help="Leave out visual tokens that are as similar to the same place before, such as 0.9.", metavar="COSINE"
        ),
    ] = None,
    response_from: Annotated[
        float | None, typer.Option(help="Probability from which the model answers. Default: where it is likeliest.")
    ] = None,
    standby_from: Annotated[
        float | None, typer.Option(help="Probability from which the model stands by. Default: where it is likeliest.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above, answers are drawn.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw among the fewest tokens that have this probability together.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many of the likeliest tokens.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    frames: Annotated[
        int | None,
        typer.Option(
            help="Newest frames that a question is about, for models that do not decide when to speak."
            " Default: as many as it was trained with, or 8."
        ),
    ] = None,
    max_turns: Annotated[int | None, typer.Option(min=1, help="Stop after this many turns.")] = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    precision: Annotated[str, typer.Option(help="One of the bundle's precisions.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Talk with a model about what a camera or a video shows; it says itself when it has something to say.

    The transcript goes to standard output. Ctrl-C ends it in order and exits 0.
    """
    from ..runtime.dialogue_options import DialogueOptions
    from .chat import ChatOptions, standard_input
    from .chat import chat as talk

    options = ChatOptions(
        bundle=bundle,
        source=source,
        questions=tuple(ask or ()),
        output=output,
        max_turns=max_turns,
        dialogue=DialogueOptions(
            turn,
            rate,
            system,
            eviction,
            prune,
            response_from,
            standby_from,
            max_tokens,
            temperature,
            top_p,
            seed,
            frames,
            top_k=top_k,
        ),
        engine=engine,
        device=device,
        threads=threads,
        precision=precision,
    )

    def write(text: str) -> None:
        if not as_json:
            print(text, end="", flush=True)

    def report(line: str) -> None:
        print(f"warning: {line}", file=sys.stderr, flush=True)

    summary = talk(options, write, report, standard_input())
    print(_json(summary.as_dict()) if as_json else summary.as_text())
    if summary.errors:
        raise typer.Exit(2)


@app.command()
def recall(
    bundle: BundleArgument,
    source: Annotated[str, typer.Option("--source", "-s", help="clip.mp4, a folder of images or synthetic.")],
    ask: Annotated[list[str], typer.Option(help="A question that stands from the beginning; repeat it for several.")],
    against: Annotated[
        Path | None, typer.Option(help="Bundle of the reference, such as one in fp32. Default: the same bundle.")
    ] = None,
    prune: Annotated[
        float | None, typer.Option(help="Prune the bundle's visual tokens, as in chat; not the reference's.")
    ] = None,
    turn: TurnOption = 1.0,
    rate: RateOption = None,
    system: SystemOption = None,
    max_turns: Annotated[int | None, typer.Option(min=1, help="Stop after this many turns.")] = None,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare when a model speaks with other weights or fewer tokens: the recall of each state over a video."""
    from ..runtime.dialogue_options import DialogueOptions
    from .recall import RecallOptions
    from .recall import recall as compare

    report = compare(
        RecallOptions(
            bundle=bundle,
            source=source,
            questions=tuple(ask),
            against=against,
            max_turns=max_turns,
            dialogue=DialogueOptions(turn, rate, system, prune=prune),
            engine=engine,
            device=device,
            threads=threads,
        ),
        lambda line: None if as_json else print(line, file=sys.stderr, flush=True),
    )
    _print_facts(report.as_dict(), as_json, report.as_text())


@app.command()
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
            help="Of a decoder: fp32, fp16, or weights of 8 or 4 bits: w8 or w4 for CPUs, fp16+w4 for TensorRT."
            " Default: fp32."
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
    from .exporting import ExportArguments, LabelArguments, agreement
    from .exporting import export as export_checkpoint

    labelling = LabelArguments(labels, text_model, text_embeddings, tuple(template or ()), background, text_graph)
    facts = export_checkpoint(
        ExportArguments(
            checkpoint, output, random_init, config, window, image_size, rate, resize, head, force, labelling,
            precision, capacity, chunk, frame_size, vision_tower,
        ),
        lambda line: None if as_json else print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    notes = "".join(f"\nnote: {note}" for note in facts.get("notes", ()))
    _print_facts(
        facts,
        as_json,
        f"{facts['bundle']}: {facts['bytes'] / 1e6:.1f} MB, {agreement(facts)}{notes}",
    )


@app.command()
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
    from .exporting import LabelArguments
    from .exporting import label as label_bundle

    facts = label_bundle(
        bundle,
        LabelArguments(labels, text_model, text_embeddings, tuple(template or ()), background, text_graph),
    )
    calibrated = "calibrated" if facts["scores_calibrated"] else "uncalibrated"
    _print_facts(facts, as_json, f"{bundle}: {counted(len(facts['labels']), 'label')}, scores {calibrated}")


@app.command()
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
            help="int8, fp16 or fp16+int8; fp16+kv8 or fp32+kv8 remember keys and values as INT8, for the torch engine."
            " Repeat it for several, the main one first. Default: int8."
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
    from .calibrating import CalibrateArguments, as_text
    from .calibrating import calibrate as calibrate_bundle

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
    _print_facts(facts, as_json, as_text(facts))


@app.command()
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
    from .building import BuildArguments, as_text
    from .building import build as build_engines

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
    _print_facts(facts, as_json, as_text(facts))


@app.command()
def inspect(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Show a bundle's graphs, state, bytes per stream, rate, labels and origin."""
    from rich import print as show

    from ..runtime.bundle import Bundle
    from .inspect import describe, table

    opened = Bundle.open(bundle)
    show(table(opened)) if not as_json else print(_json(describe(opened)))


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Show what this machine has, and what to install for the rest."""
    from dataclasses import asdict

    from rich import print as show

    from .doctor import examine, table

    findings = examine()
    show(table(findings)) if not as_json else print(_json([asdict(finding) for finding in findings]))
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)


@app.command()
def bench(
    context: typer.Context,
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")] = Path("report"),
    frames: Annotated[
        str, typer.Option(help="Stream positions to measure at; of a decoder, turns or frames.")
    ] = "1,4,16,64,256,1024,4096",
    streams: Annotated[str, typer.Option(help="Numbers of streams in one step.")] = "1,2,4,8",
    compare: Annotated[
        list[str] | None, typer.Option(help="Baselines to measure beside it: all, or names; repeat or use commas.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="The bundle's checkpoint, which the PyTorch baselines need.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Latencies at each position in each process.")] = 100,
    processes: Annotated[int, typer.Option(min=1, help="Fresh processes for each path.")] = 5,
    steady: Annotated[int, typer.Option(min=0, help="Frames of the steady run.")] = 1000,
    every_frame: Annotated[
        bool, typer.Option("--every-frame", help="Let the steady run go on to the last of --frames.")
    ] = False,
    budget_s: Annotated[float, typer.Option(min=0, help="Seconds that one baseline may take.")] = 600,
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure latency across stream positions, against what one would otherwise run.

    What cannot be measured is told, also in the report. Exit status 2: an error, or framestep itself could not be
    measured.
    """
    from ..runtime.bundle import Bundle
    from ..runtime.schema import to_json
    from .bench import BenchOptions
    from .bench import bench as run_bench
    from .bench.bench import parse_numbers
    from .bench.progress import bench_status_for
    from .record import check_outside_bundles

    options = BenchOptions(
        bundle=bundle,
        output=output,
        frames=parse_numbers(frames, "--frames"),
        streams=parse_numbers(streams, "--streams"),
        compare=tuple(name for names in compare or [] for name in names.split(",") if name),
        samples=samples,
        processes=processes,
        steady=steady,
        every_frame=every_frame,
        engine=engine,
        device=device,
        budget_s=budget_s,
        threads=threads,
        checkpoint=checkpoint,
    )
    check_outside_bundles(output, "--output")
    if checkpoint is not None and not options.compare:
        raise FramestepError("--checkpoint: is what PyTorch's baselines run; name some with --compare, or leave it out")
    opened = Bundle.open(bundle)
    if opened.manifest.language is not None:
        if options.compare or checkpoint is not None:
            raise FramestepError(
                "--compare and --checkpoint: baselines are of models without a decoder; 'framestep recall' compares"
                " the decisions of two bundles"
            )
        for name in ("streams", "processes", "steady", "every_frame", "budget_s"):
            if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE":
                raise FramestepError(
                    f"--{name.replace('_', '-')}: a decoder is measured by turns of one stream in one process;"
                    " it has --frames and --samples"
                )
        from .bench.dialogue import DialogueReport, bench_dialogue
        from .bench.following import FollowingReport, bench_following

        measure = bench_dialogue if opened.manifest.language.cross is None else bench_following
        measured: DialogueReport | FollowingReport = measure(
            opened,
            output,
            options.frames,
            samples,
            engine,
            device,
            threads,
            lambda line: print(line, file=sys.stderr, flush=True),
        )
        _print_facts(to_json(measured), as_json, measured.as_text())
        return
    report = run_bench(options, bench_status_for(quiet=as_json))
    _print_facts(to_json(report), as_json, f"{output / 'report.md'}")
    if report.path("framestep") is None:
        raise typer.Exit(2)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all that it makes.")] = Path("out/demo"),
    source: Annotated[
        str | None, typer.Option("--source", "-s", help="Video to run on. Default: moving shapes, drawn for it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a small trained model on a video, in float32 and INT8, and say what came of it and where it is."""
    from .demo import as_text
    from .demo import demo as run_demo

    facts = run_demo(output, source, lambda line: None if as_json else print(line, file=sys.stderr, flush=True))
    _print_facts(facts, as_json, as_text(facts))


def _print_facts(facts: dict[str, Any], as_json: bool, text: str) -> None:
    print(_json(facts) if as_json else text)


def _json(facts: Any) -> str:
    """JSON that standard output's encoding can carry."""
    return json.dumps(facts, ensure_ascii=(sys.stdout.encoding or "").lower() not in ("utf-8", "utf8"))


def main() -> None:
    """Entry point. An error raised on purpose is one line on standard error and exit status 2."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _terminate)
    sys.exit(_exit_status(sys.argv[1:]))


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave through the cleanup of whatever is under way, so that no half-written file stays."""
    raise SystemExit(128 + number)


@functools.cache
def _command() -> Any:
    return typer.main.get_command(app)  # reads every option of every command, which takes longer than many of them


def _exit_status(arguments: list[str]) -> int:
    try:
        status = _command().main(arguments or ["--help"], prog_name="framestep", standalone_mode=False)
    except FramestepError as error:
        return _fail(_as_typed(str(error), arguments), 2)
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "cv2":
            raise
        return _fail(f"frames are read and drawn with OpenCV ({error}): pip install opencv-python", 2)
    except OSError as error:
        if error.filename is None and error.errno == errno.ENOENT:  # as getcwd says it
            return _fail("the folder that this runs in was removed; run it in another", 2)
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        return _fail(": ".join(str(part) for part in (error.filename, error.strerror) if part), 2)
    except MemoryError as error:
        return _fail(f"not enough memory: {error}", 2)
    except Exception as error:
        if any(text in str(error) for text in OUT_OF_MEMORY):
            return _fail(f"not enough memory: {error}", 2)
        # A usage error. Its class is Click's in some versions of typer and typer's own in others.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        return _fail(f"{error.format_message()} (see `{context.command_path if context else 'framestep'} --help`)", 2)
    if status == INTERRUPTED:
        return _fail("interrupted", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _as_typed(message: str, arguments: list[str]) -> str:
    """What begins with Python's name of an option of the command that runs, as "top_p: ...", begins with the option."""
    named = re.match(r"\w+(?=:| is )", message)
    called = _command().commands.get(arguments[0]) if named and arguments else None
    for option in called.params if called else ():
        typed = max(option.opts, key=len)
        if named and option.name == named[0] and typed.startswith("--"):
            return typed + message[named.end() :]
    return message


def _fail(message: str, status: int) -> int:
    print(f"framestep: {' '.join(message.split())}", file=sys.stderr)
    return status
