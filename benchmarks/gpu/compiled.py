"""The step of the base model through the engines that compile it: TensorRT of either flavour, and ONNX Runtime on CUDA.

Each runs where it is installed and works; where it does not, the reason is recorded. In a rehearsal TensorRT builds for
a GPU that is not there and its runtime is a stand-in.
"""

from __future__ import annotations

import shutil
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from ...export.tensorrt import build
from ...export.tensorrt_network import BuildOptions
from ...runtime.bundle import Bundle
from ...runtime.engines.engine_files import FLAVOURS
from ...runtime.errors import EngineError
from ...runtime.session import Session
from .hardware import Hardware, spread
from .section import Section
from .sizes import Sizes
from .stand_in import stand_in
from .step import LIMITS, OUTPUTS, WARM_RUNS, _error, _frames, _reference, model_and_bundle

BUILDS = (("fp16", 1), ("fp16", 4), ("fp32", 1))  # precision and streams


class Quiet:
    """A build that reports to nobody."""

    def graph(self, name: str) -> None: ...
    def start(self, phase: str, parent: str | None, steps: int) -> None: ...
    def step(self, phase: str, done: int) -> None: ...
    def finish(self, phase: str) -> None: ...


def tensorrt(section: Section, hardware: Hardware, sizes: Sizes, work: Path) -> None:
    """Build on this machine, compare with the defining module, and measure."""
    model, bundle = model_and_bundle(sizes, work)
    frames = _frames(sizes, sizes.window + 6)
    expected = _reference(model, frames, sizes.window, hardware.device)
    for flavour in FLAVOURS:
        path = work / f"{flavour}.bundle"
        shutil.copytree(bundle.path, path)
        place: AbstractContextManager[Any] = nullcontext()
        capabilities: tuple[str, ...] = ()  # of the GPU at hand
        try:
            if hardware.rehearsal:
                place = stand_in(path, flavour)
                capabilities = ("8.6",)
            with place:
                for precision, streams in BUILDS[1:2] if hardware.rehearsal else BUILDS:
                    options = BuildOptions(precision, streams, flavour, capabilities)
                    _compiled(section, hardware, sizes, path, options, frames, expected)
                    hardware.free()
        except (EngineError, ModuleNotFoundError) as error:  # not installed, or it does not know this GPU
            section.skip(f"{flavour}: {' '.join(str(error).split())[:300]}")


def onnxruntime(section: Section, hardware: Hardware, sizes: Sizes, work: Path) -> None:
    """ONNX Runtime with its state in device memory."""
    model, bundle = model_and_bundle(sizes, work)
    frames = _frames(sizes, sizes.window + 6)
    expected = _reference(model, frames, sizes.window, hardware.device)
    try:
        session = Session(bundle, "onnxruntime", hardware.device.type, 1, OUTPUTS)
    except EngineError as error:  # built without CUDA, or for another
        section.skip(f"onnxruntime on {hardware.device.type}: {' '.join(str(error).split())[:300]}")
        return
    with session:
        row = {"engine": "onnxruntime", "precision": session.precision, "streams": 1}
        _check(section, "onnxruntime", session, frames, expected)
        _measure(section, hardware, sizes, session, row)


def _compiled(
    section: Section,
    hardware: Hardware,
    sizes: Sizes,
    path: Path,
    options: BuildOptions,
    frames: np.ndarray[Any, Any],
    expected: dict[str, Any],
) -> None:
    bundle, report = build(Bundle.open(path, verify=False), options, Quiet())
    precision, streams = options.precision, options.streams
    name = f"{options.flavour} {precision} {streams}"
    backbone = report.graphs[0]
    assert backbone.network is not None
    section.facts[f"{name}: build seconds"] = backbone.seconds
    section.facts[f"{name}: engine bytes"] = backbone.bytes
    section.facts[f"{name}: attentions fused"] = f"{backbone.fused} of {backbone.network.attentions}"
    section.facts[f"{name}: bytes per stream"] = report.bytes_per_stream
    begin = time.perf_counter()
    with Session(bundle, "tensorrt", "auto", streams, OUTPUTS, precision=precision) as session:
        section.facts[f"{name}: load seconds"] = round(time.perf_counter() - begin, 2)
        _check(section, name, session, frames, expected)
        row = {"engine": f"{options.flavour} {report.version}", "precision": precision, "streams": streams}
        _measure(section, hardware, sizes, session, row)


def _check(
    section: Section, name: str, session: Session, frames: np.ndarray[Any, Any], expected: dict[str, Any]
) -> None:
    """Every stream gets the same frames, one after the other: none may see another's."""
    limit = LIMITS[session.precision]
    for _ in range(session.streams):
        stream = session.open_stream()
        results = [stream.step(frame) for frame in frames]
        for output in OUTPUTS:
            found = np.stack([result[output] for result in results])
            section.check(f"{name}: {output}", _error(found, expected[output].numpy()), limit)


def _measure(section: Section, hardware: Hardware, sizes: Sizes, session: Session, row: dict[str, Any]) -> None:
    engine, spec = session._engine, session.frame
    frames = {slot: np.zeros((spec.height, spec.width, 3), np.uint8) for slot in range(session.streams)}
    wall: dict[int, list[float]] = {position: [] for position in sizes.positions}
    for _ in range(4):  # in turns, so that a drift of the clocks meets every position
        for position in sizes.positions:
            for slot in frames:
                engine.seek(slot, position)
            hardware.wall(lambda: engine.step(frames), WARM_RUNS)
            wall[position] += hardware.wall(lambda: engine.step(frames), max(2, sizes.runs // 4))
    for position, spent in wall.items():
        section.add("compiled", **row, position=position, **spread(spent))
