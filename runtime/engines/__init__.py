"""Engines: each runs step graphs over preallocated, bound buffers, and knows no model by name."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..bundle import Bundle, Manifest
from ..errors import EngineError

ENGINES = ("onnxruntime",)
DEVICES = ("cpu", "cuda")


class Engine(Protocol):
    """What a session needs of an engine.

    Attributes:
        frames: uint8 [streams, height, width, 3], input of the next step.
        positions: int64 [streams], input of the next step.
        outputs: float32 [streams, ...] by name, result of the last step.
    """

    frames: npt.NDArray[np.uint8]
    positions: npt.NDArray[np.int64]
    outputs: dict[str, npt.NDArray[Any]]

    def set_constants(self, values: Mapping[str, npt.NDArray[Any]]) -> None: ...
    def run(self, first: int, stop: int) -> None: ...
    def state_names(self) -> list[str]: ...
    def state_address(self, name: str) -> int: ...
    def read_state(self, name: str, slot: int) -> npt.NDArray[Any]: ...
    def write_state(self, name: str, slot: int, value: npt.NDArray[Any]) -> None: ...
    def zero_states(self, slot: int) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class EngineChoice:
    """An engine on a device, and why it was taken."""

    engine: str
    device: str
    reason: str


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_engine(manifest: Manifest, engine: str, device: str) -> EngineChoice:
    """Take the fastest engine that the bundle and the machine allow, or the one asked for.

    Raises:
        EngineError: unknown, or not usable here.
    """
    if engine not in ("auto", *ENGINES):
        raise EngineError(f"engine '{engine}' is unknown; expected auto, {', '.join(ENGINES)}")
    if device not in ("auto", *DEVICES):
        raise EngineError(f"device '{device}' is unknown; expected auto, {', '.join(DEVICES)}")
    from .onnxruntime import available_devices

    found = available_devices()
    if device != "auto" and device not in found:
        raise EngineError(
            f"device '{device}' is not available to ONNX Runtime here (found {', '.join(found)});"
            " pip install 'framestep[gpu]' on a machine with an NVIDIA GPU"
        )
    taken = found[0] if device == "auto" else device
    why = "asked for" if device != "auto" else "the fastest device found" if len(found) > 1 else "no GPU provider found"
    return EngineChoice("onnxruntime", taken, f"onnxruntime on {taken} ({why})")


def make_engine(
    choice: EngineChoice,
    bundle: Bundle,
    graphs: Sequence[str],
    outputs: Sequence[str],
    streams: int,
    threads: int,
) -> Engine:
    from .onnxruntime import OnnxRuntimeEngine

    return OnnxRuntimeEngine(bundle, graphs, outputs, streams, choice.device, threads)
