"""The command line. Each command is a thin wrapper; what it does is in the module it calls."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..runtime.errors import FramestepError

INTERRUPTED = 130

app = typer.Typer(
    name="framestep",
    help="Streaming video models, from a checkpoint to a camera.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback means a bug, and is wanted whole
)

BundleArgument = Annotated[Path, typer.Argument(help="Folder of the bundle.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for machines.")]


@app.callback()
def framestep() -> None:
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
    output: Annotated[Path | None, typer.Option(help="Results, one JSON object a frame (.jsonl).")] = None,
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
    outputs: Annotated[
        str | None,
        typer.Option(
            help="Which outputs --output and --save-features write, such as `pooled,scores`. Default: scores "
            "in --output; all but patch_scores in --save-features."
        ),
    ] = None,
    on: Annotated[float, typer.Option(help="Score from which a label is present.")] = 0.5,
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
    engine: Annotated[str, typer.Option(help="Engine; auto takes the fastest that runs here.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the engine; default: all cores.")] = None,
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

    Live sources give their newest frame and count what they drop; files give every frame. Ctrl-C and SIGTERM
    finish all files and exit 0 ("stopped by user"). Exit status 2: an error, or a file or source was lost on
    the way.
    """
    from .run import RunOptions
    from .run import run as run_bundle
    from .status import status_for

    options = RunOptions(
        bundle=bundle,
        sources=tuple(source),
        output=output,
        events=events,
        record=record,
        overlay=overlay,
        show=show,
        save_features=save_features,
        outputs=tuple(name.strip() for name in outputs.split(",")) if outputs else (),
        on=on,
        off=off,
        rate=rate,
        max_frames=max_frames,
        deadline_ms=deadline_ms,
        engine=engine,
        device=device,
        threads=threads,
        width=width,
        height=height,
        camera_fps=camera_fps,
        fourcc=fourcc,
    )
    summary = run_bundle(options, status_for(quiet=as_json))
    print(json.dumps(summary.as_dict(), ensure_ascii=False) if as_json else summary.as_text())
    if summary.errors:
        raise typer.Exit(2)


def main() -> None:
    """Entry point. An error raised on purpose is one line on standard error and exit status 2."""
    sys.exit(_exit_status(sys.argv[1:]))


def _exit_status(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        status = command.main(arguments or ["--help"], prog_name="framestep", standalone_mode=False)
    except FramestepError as error:
        return _fail(str(error), 2)
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except BrokenPipeError:  # whoever read our output, such as `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        # A usage error. Its class is Click's in some versions of typer and typer's own in others.
        if not hasattr(error, "format_message"):
            raise
        return _fail(f"{error.format_message()} (see `framestep --help`)", 2)
    if status == INTERRUPTED:
        return _fail("interrupted", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int) -> int:
    print(f"framestep: {' '.join(message.split())}", file=sys.stderr)
    return status
