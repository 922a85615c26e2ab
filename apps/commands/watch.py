"""`framestep run`, `chat` and `recall`: what runs a bundle on video."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ...runtime.errors import FramestepError
from .options import (
    BundleArgument,
    DeviceOption,
    EngineOption,
    JsonOption,
    RateOption,
    SystemOption,
    ThreadsOption,
    TurnOption,
    json_text,
    print_facts,
)


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
    from ..record import STANDARD_OUTPUT
    from ..run import run as run_bundle
    from ..run_options import RunOptions
    from ..status import status_for

    piped = output == Path("-")
    if piped and as_json:
        raise FramestepError("--output -: --json writes to standard output too; name a file, or leave --json out")
    options = RunOptions(
        bundle=bundle,
        sources=tuple(source),
        output=STANDARD_OUTPUT if piped else output,
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
    text = json_text(summary.as_dict()) if as_json else summary.as_text()
    print(text, file=sys.stderr if piped else sys.stdout)
    if summary.errors:
        raise typer.Exit(2)


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
    from ...runtime.dialogue_options import DialogueOptions
    from ..chat import ChatOptions, standard_input
    from ..chat import chat as talk

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
    print(json_text(summary.as_dict()) if as_json else summary.as_text())
    if summary.errors:
        raise typer.Exit(2)


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
    from ...runtime.dialogue_options import DialogueOptions
    from ..recall import RecallOptions
    from ..recall import recall as compare

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
    print_facts(report.as_dict(), as_json, report.as_text())
