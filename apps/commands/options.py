"""What several commands take on the command line, and how each answers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

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


def print_facts(facts: Any, as_json: bool, text: str) -> None:
    """What a command found, on standard output."""
    print(json_text(facts) if as_json else text)


def json_text(facts: Any) -> str:
    """JSON that standard output's encoding can carry."""
    return json.dumps(facts, ensure_ascii=(sys.stdout.encoding or "").lower() not in ("utf-8", "utf8"))
