"""The work of `framestep build`: from what a person typed to the builder's options, and a bar while it works."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ..runtime.bundle import Bundle
from ..runtime.counted import counted
from ..runtime.errors import EngineError
from ..runtime.schema import to_json
from .stopping import Stopping, stop_on_signals

MIB = 1 << 20
MOST_WORKSPACE = 1 << 30  # MiB; TensorRT counts bytes in 64 bits
MOST_PHASES = 2  # shown at a time, the outermost: below those TensorRT works in fractions of a millisecond


@dataclass(frozen=True)
class BuildArguments:
    """What `framestep build` was given; names as on the command line."""

    bundle: Path
    precision: str | None = None
    streams: int = 1
    flavour: str = "auto"
    compute_capability: tuple[str, ...] = ()
    hardware_compatible: bool = False
    version_compatible: bool = False
    workspace: int | None = None
    attention: str = "native"
    again: bool = False


def build(arguments: BuildArguments, quiet: bool) -> dict[str, Any]:
    """Build engines into a bundle.

    Returns:
        Facts for the report.
    """
    from ..export.tensorrt import build as build_engines
    from ..export.tensorrt_network import BuildOptions

    capabilities = tuple(name for text in arguments.compute_capability for name in re.split(r"[,\s]+", text) if name)
    for name in capabilities:
        if re.fullmatch(r"\d+\.\d", name) is None:
            raise EngineError(f"--compute-capability: expected one such as 8.6, found '{name}'")
    options = BuildOptions(
        precision=arguments.precision,
        streams=arguments.streams,
        flavour=arguments.flavour,
        compute_capabilities=tuple(dict.fromkeys(capabilities)),
        hardware_compatible=arguments.hardware_compatible,
        version_compatible=arguments.version_compatible,
        workspace=None if arguments.workspace is None else arguments.workspace * MIB,
        attention=arguments.attention,
        again=arguments.again,
    )
    if arguments.workspace is not None and arguments.workspace > MOST_WORKSPACE:
        raise EngineError(f"--workspace: expected at most {MOST_WORKSPACE} MiB, found {arguments.workspace}")
    # A signal that is raised while TensorRT calls back, be it to log a line, is lost in there: it waits for the bar.
    with stop_on_signals() as stopping, BuildBar(quiet, stopping) as bar:
        _, report = build_engines(Bundle.open(arguments.bundle), options, bar)
        stopping.obey()
    facts: dict[str, Any] = to_json(report)
    facts["bytes_per_stream"] = report.bytes_per_stream
    return facts


def as_text(facts: dict[str, Any]) -> str:
    """The facts for a person."""
    built_for = ", ".join(facts["compute_capabilities"])
    streams = facts["streams"]
    lines = [
        f"{facts['bundle']}: {facts['precision']} for compute capability {built_for}, up to {streams}"
        f" stream{'s' if streams > 1 else ''}, by {facts['flavour']} {facts['version']}"
    ]
    for item in facts["graphs"]:
        text = f"{item['graph']:>12}  {item['bytes'] / 1e6:.1f} MB  "
        network = item["network"]
        if network is None:
            lines.append(f"{text}there already: {item['file']}")
            continue
        text += f"in {item['seconds']:.1f} s, {counted(network['layers'], 'layer')}"
        if item["engine_layers"] is not None:
            text += f" ({item['engine_layers']} after fusion)"
        if network["cache_updates"] or network["copied_states"]:
            text += f", {counted(network['cache_updates'], 'state')} updated in place"
        if network["copied_states"]:
            text += f" and {len(network['copied_states'])} copied"
        if network["cast_states"]:
            text += f", {counted(len(network['cast_states']), 'state')} converted in every step"
        if network["attentions"]:
            text += f", {item['fused']} of {counted(network['attentions'], 'attention')} fused"
        lines.append(text)
    memory = f"state {facts['state_bytes'] / 1e6:.1f} MB"
    if facts["bytes_per_stream"] is not None:
        memory += f", with activations {facts['bytes_per_stream'] / 1e6:.1f} MB"
    else:
        memory += "; activations are known where the GPU is"
    lines.append(f"{'per stream':>12}  {memory}")
    lines += [f"{'note':>12}  {note}" for note in facts["notes"]]
    return "\n".join(lines)


class BuildBar:
    """TensorRT's own phases as bars on a terminal; a line a graph in a log; nothing for machines. On standard error.

    It ends the build, by the signal's usual effect, where `stopping` was asked.
    """

    def __init__(self, quiet: bool, stopping: Stopping) -> None:
        self._stopping = stopping
        self._console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not sys.stderr.isatty(),
        )
        self._phases: dict[str, TaskID] = {}  # those under way, the outermost first

    def __enter__(self) -> BuildBar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def graph(self, name: str) -> None:
        self._stopping.obey()
        for phase in list(self._phases):
            self.finish(phase)
        self._console.print(f"building {name}", highlight=False)

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        # TensorRT starts some phases several times over: they share a bar
        if phase not in self._phases and len(self._phases) < MOST_PHASES:
            self._phases[phase] = self._bar.add_task(phase, total=steps)

    def step(self, phase: str, done: int) -> None:
        self._stopping.obey()
        if phase in self._phases:
            self._bar.update(self._phases[phase], completed=done)

    def finish(self, phase: str) -> None:
        if phase in self._phases:
            self._bar.remove_task(self._phases.pop(phase))
