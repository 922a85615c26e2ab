"""What engines in Python share: a step around their `run_range`, and a run of one graph, over buffers of the host."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..counted import counted
from ..errors import EngineError
from ..manifest import STREAMS, TOKENS, Graph, Manifest
from ..preprocess import Preprocess
from . import StepTimes

Array = npt.NDArray[Any]


class BufferEngine:
    """An engine that runs graphs over buffers, a slot of which belongs to each stream.

    Steps and runs take turns: one at a time is at work.

    Args:
        manifest: flattened to one precision.
        own_graphs: names of the graphs that are run by themselves.

    Attributes:
        frames: uint8 [streams, height, width, 3], the input of the next step.
        positions: int64 [streams], frames since reset.
        outputs: [streams, ...] by name, filled by `run_range`.
    """

    frames: npt.NDArray[np.uint8]
    positions: npt.NDArray[np.int64]
    outputs: dict[str, Array]

    def __init__(self, manifest: Manifest, own_graphs: Sequence[str]) -> None:
        self._preprocess = Preprocess(manifest.frame)
        self._times = StepTimes(0.0, 0.0, 0.0)
        self._own_graphs = {name: manifest.graphs[name] for name in own_graphs}
        self._most = _most(manifest)
        self._rows = {state.name: int(state.shape[state.axis]) for state in manifest.states}
        self._turn = threading.RLock()

    def run_range(self, first: int, stop: int) -> None:
        """One step of the slots first..stop; every slot in the range runs, in place."""
        raise NotImplementedError

    def run_graph(self, slot: int, name: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """One of the own graphs for one slot, in place. All arrays have a streams axis of 1; the outputs are copies."""
        raise NotImplementedError

    def zero_states(self, slot: int, names: Sequence[str] | None = None) -> None:
        """Zero a slot's memory, or these of its states."""
        raise NotImplementedError

    def step(self, frames: Mapping[int, Array]) -> dict[int, tuple[str, ...]]:
        """See `Engine.step`."""
        start = time.perf_counter()
        with self._turn:
            for slot, rgb in frames.items():
                self._preprocess(rgb, self.frames[slot])
            fitted = time.perf_counter()
            self.run_range(min(frames), max(frames) + 1)
            ran = time.perf_counter()
            broken = {slot: names for slot in frames if (names := self.advance(slot))}
        end = time.perf_counter()
        self._times = StepTimes((fitted - start) * 1e3, (ran - fitted) * 1e3, (end - start) * 1e3)
        return broken

    def run(self, slot: int, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `GraphEngine.run`."""
        declared = self._own_graphs[graph]
        given = fit_inputs(graph, declared, inputs)
        self._check_numbers(graph, declared, given)
        with self._turn:
            found = self.run_graph(slot, graph, given)
            if not all(np.isfinite(array).all() for array in found.values()):
                self.zero_states(slot, [use.state for use in declared.states if use.output is not None])
        return {name: array[0] for name, array in found.items()}

    def _check_numbers(self, name: str, graph: Graph, given: Mapping[str, Array]) -> None:
        """What a device would read or write beside its memory for."""
        tokens = 1
        for port in graph.inputs:
            array, most = given[port.name], self._most.get(port.role)
            if TOKENS in port.shape:
                tokens = array.shape[port.shape.index(TOKENS)]
            if most is not None and (array.min() < 0 or array.max() > most):
                wrong = array.min() if array.min() < 0 else array.max()
                raise EngineError(f"graph '{name}': input '{port.name}' has {wrong}, expected 0 to {most}")
        capacity = min((self._rows[use.state] for use in graph.states if use.output is not None), default=0)
        for port in graph.inputs:
            if port.role == "write_index" and not 0 <= (first := int(given[port.name].min())) <= capacity - tokens:
                raise EngineError(
                    f"graph '{name}': no room for {counted(tokens, 'token')} from slot {first} on,"
                    f" the capacity is {capacity}"
                )

    def fit(self, frames: Sequence[Array]) -> npt.NDArray[np.uint8]:
        """Frames of any size as the model takes them: uint8 [frames, height, width, 3]."""
        fitted = np.empty((len(frames), *self.frames.shape[1:]), np.uint8)
        for rgb, out in zip(frames, fitted, strict=True):
            self._preprocess(rgb, out)
        return fitted

    def advance(self, slot: int) -> tuple[str, ...]:
        """Count a frame, or start again where an output is not finite; the names of such outputs."""
        bad = tuple(name for name, array in self.outputs.items() if not np.isfinite(array[slot]).all())
        if bad:
            self.zero_states(slot)  # a NaN in a hidden slot still counts: 0 * NaN is NaN
            self.positions[slot] = 0
        else:
            self.positions[slot] += 1
        return bad

    def output(self, slot: int) -> dict[str, Array]:
        """See `Engine.output`."""
        return {name: array[slot] for name, array in self.outputs.items()}

    def position(self, slot: int) -> int:
        """Frames since the slot's reset."""
        return int(self.positions[slot])

    def seek(self, slot: int, position: int) -> None:
        """Set the slot's clock and leave its memory."""
        self.positions[slot] = position

    def warm_up(self, steps: int) -> None:
        """Run every number of slots `steps` times; no clock moves."""
        for _ in range(steps):
            for count in range(1, len(self.positions) + 1):
                self.run_range(0, count)

    def last_step(self, slot: int) -> StepTimes:
        """Where the time of the last step went; of whichever slots it was."""
        return self._times


def _most(manifest: Manifest) -> dict[str, int]:
    """The largest number that an input may hold, by role."""
    language = manifest.language
    if language is None:
        return {}
    vocabulary = manifest.graphs[language.decoder].outputs[0].shape[-1]
    assert isinstance(vocabulary, int)
    newline = "newline" in language.tokens  # has the id after the last
    last = language.positions - 1
    return {"tokens": vocabulary - (not newline), "position_ids": last, "slot_positions": last}


def fit_inputs(name: str, graph: Graph, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Inputs of one stream as a graph takes them, with a streams axis of 1.

    Raises:
        EngineError: one is missing, unknown, or of another type or shape.
    """
    ports = {port.name: port for port in graph.inputs}
    for key in inputs:
        if key not in ports:
            raise EngineError(f"graph '{name}': has no input '{key}'; it takes {', '.join(ports)}")
    sizes: dict[int | str, int] = {STREAMS: 1}
    given = {}
    for key, port in ports.items():
        if key not in inputs:
            raise EngineError(f"graph '{name}': the input '{key}' is missing")
        array = np.ascontiguousarray(inputs[key]).reshape(1, *np.shape(inputs[key]))
        fits = array.dtype == port.dtype and array.ndim == len(port.shape)
        for n, extent in zip(port.shape, array.shape, strict=False):
            fits = fits and extent > 0 and extent == (sizes.setdefault(n, extent) if isinstance(n, str) else n)
        if not fits:
            raise EngineError(
                f"graph '{name}': input '{key}' takes {port.dtype} {_listed(port.shape)},"
                f" found {array.dtype} {_listed(array.shape)}"
            )
        given[key] = array
    return given


def missing_labels(name: str) -> EngineError:
    """What to say of an input that nobody gave."""
    return EngineError(
        f"input '{name}' needs labels; set them before the first step, or add them to the bundle with 'framestep label'"
    )


def _listed(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape[1:]))}]"
