"""Engines: each runs step graphs over preallocated, bound buffers, and knows no model by name.

This is their interface; `choosing` says which one is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class StepTimes:
    """Where the time of a step went, in milliseconds.

    Attributes:
        preprocess: resize and crop of all its frames.
        engine: the engine's own library.
        total: from the engine's being called to its return.
    """

    preprocess: float
    engine: float
    total: float


class Engine(Protocol):
    """What a session needs of an engine. A slot is the place of one stream."""

    def set_constants(self, values: Mapping[str, Array]) -> None: ...

    def step(self, frames: Mapping[int, Array]) -> dict[int, tuple[str, ...]]:
        """Advance slots by one frame each, in one run over the range that covers them.

        Args:
            frames: uint8 [height, width, 3] RGB of any size, by slot; checked.

        Returns:
            The slots that got NaN or infinity, and in which outputs. Their memory was zeroed and their clock set to 0.

        Raises:
            FrameError, EngineError: no clock has moved.
        """
        ...

    def output(self, slot: int) -> dict[str, Array]:
        """What the slot's last step gave, by name: views of the engine's memory, until the next step."""
        ...

    def position(self, slot: int) -> int:
        """Frames since the slot's reset."""
        ...

    def seek(self, slot: int, position: int) -> None:
        """Set the slot's clock and leave its memory."""
        ...

    def warm_up(self, steps: int) -> None: ...
    def last_step(self, slot: int) -> StepTimes: ...
    def state_names(self) -> list[str]: ...
    def state_address(self, name: str) -> int: ...
    def read_state(self, name: str, slot: int) -> Array: ...
    def write_state(self, name: str, slot: int, value: Array) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class GraphEngine(Engine, Protocol):
    """An engine that runs graphs by themselves, beside those of a step."""

    def run(self, slot: int, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one graph for a slot, its states in place; see `Stream.run`. The arrays are copies.

        Where an output has NaN or infinity, the states that the graph writes were zeroed for this slot.

        Raises:
            EngineError: an input is missing, unknown or of another type or shape, or the graph refused it.
        """
        ...


@runtime_checkable
class PrefillEngine(Engine, Protocol):
    """An engine that can run many frames of one stream at once."""

    def can_prefill(self) -> bool: ...

    def prime(self, slot: int, frames: Sequence[Array]) -> tuple[str, ...]:
        """Advance a slot by all frames; the names are those of outputs with NaN or infinity, as in `step`."""
        ...
