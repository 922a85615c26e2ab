"""`framestep inspect`, `doctor`, `bench` and `demo`: what shows what is there, and what it gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import BundleArgument, DeviceOption, EngineOption, JsonOption, ThreadsOption, json_text, print_facts


def inspect(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Show a bundle's graphs, state, bytes per stream, rate, labels and origin."""
    from rich import print as show

    from ...runtime.bundle import Bundle
    from ..inspect import describe, table

    opened = Bundle.open(bundle)
    show(table(opened)) if not as_json else print(json_text(describe(opened)))


def doctor(as_json: JsonOption = False) -> None:
    """Show what this machine has, and what to install for the rest."""
    from dataclasses import asdict

    from rich import print as show

    from ..doctor import examine, table

    findings = examine()
    show(table(findings)) if not as_json else print(json_text([asdict(finding) for finding in findings]))
    if any(finding.status == "problem" for finding in findings):
        raise typer.Exit(1)


def bench(
    context: typer.Context,
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")] = Path("report"),
    frames: Annotated[
        str, typer.Option(help="Stream positions to measure at; of a decoder, turns or frames.")
    ] = "1,4,16,64,256,1024,4096",
    streams: Annotated[str, typer.Option(help="Numbers of streams in one step.")] = "1,2,4,8",
    compare: Annotated[
        list[str] | None,
        typer.Option(
            help="What to measure beside it: all, precisions (the bundle's others), or names; repeat or use commas."
        ),
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
    precision: Annotated[str, typer.Option(help="One of the bundle's precisions.")] = "auto",
    engine: EngineOption = "auto",
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure latency across stream positions, against what one would otherwise run.

    What cannot be measured is told, also in the report. Exit status 2: an error, or framestep itself could not be
    measured.
    """
    from ..bench import BenchOptions
    from ..bench.options import parse_numbers
    from ..benching import bench as measure

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
        precision=precision,
        threads=threads,
        checkpoint=checkpoint,
    )
    typed = [
        name for name in context.params if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    measured = measure(options, typed, quiet=as_json)
    print_facts(measured.facts, as_json, measured.text)
    if not measured.framestep:
        raise typer.Exit(2)


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for all that it makes.")] = Path("out/demo"),
    source: Annotated[
        str | None, typer.Option("--source", "-s", help="Video to run on. Default: moving shapes, drawn for it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a small trained model on a video, in float32 and INT8, and say what came of it and where it is."""
    from ..demo import as_text
    from ..demo import demo as run_demo

    facts = run_demo(output, source, lambda line: None if as_json else print(line, file=sys.stderr, flush=True))
    print_facts(facts, as_json, as_text(facts))
