"""Sessions and streams: the model and its memory.

A `Session` holds the model and room for some streams; a `Stream` is one camera's place in it, with its own clock.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from . import state_file
from .bundle import Bundle
from .cores import default_threads, usable_processors
from .engines import GraphEngine, PrefillEngine
from .engines.choosing import choose_engine, choose_precision, make_engine
from .errors import BundleError, EngineError, FrameError, FramestepError, StateError
from .labels import label_inputs, read_label_embeddings
from .manifest import FrameSpec, graphs_for
from .outputs import check_outputs, decoder_graphs, default_outputs, frame_outputs
from .preprocess import Preprocess, check_frame

Array = npt.NDArray[Any]


class NonFiniteOutputError(FramestepError):
    """A step gave NaN or infinity. The state of those streams was zeroed and their clocks set to 0.

    Attributes:
        streams: the streams concerned.
        results: what the other streams of the same step got.
    """

    def __init__(self, streams: tuple[Stream, ...], outputs: tuple[str, ...], results: dict[Stream, Result]) -> None:
        slots = ", ".join(str(stream.slot) for stream in streams)
        super().__init__(
            f"stream {slots}: the model gave NaN or infinity in {', '.join(outputs)};"
            " its memory was zeroed and it starts again at position 0"
        )
        self.streams = streams
        self.results = results


class Result(Mapping[str, Array]):
    """The outputs for one frame, by name. The arrays are copies and yours to keep.

    Attributes:
        position: index of the frame since the stream's reset.
        latency_ms: from the call of `step` to this result, in milliseconds.
    """

    __slots__ = ("_outputs", "latency_ms", "position")

    def __init__(self, outputs: dict[str, Array], position: int, latency_ms: float) -> None:
        self._outputs = outputs
        self.position = position
        self.latency_ms = latency_ms

    def __getitem__(self, name: str) -> Array:
        try:
            return self._outputs[name]
        except KeyError:
            found = ", ".join(self._outputs)
            raise KeyError(f"{name}: fetched were {found}; load(path, outputs=(...)) chooses") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in self._outputs.items())
        return f"Result(position={self.position}, latency_ms={self.latency_ms:.1f}, {shapes})"


class Session:
    """A model on an engine, with room for `streams` streams. Use `framestep.load`.

    Safe to call from several threads; steps run one at a time.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: str = "auto",
        device: str = "auto",
        streams: int = 1,
        outputs: Sequence[str] | None = None,
        threads: int | None = None,
        precision: str = "auto",
        graphs: Sequence[str] | None = None,
    ) -> None:
        if streams < 1:
            raise EngineError(f"streams: expected at least 1, found {streams}")
        if threads is not None and not 1 <= threads <= usable_processors():
            # threads that share a processor wait for each other while they spin: a step then takes tens of times longer
            raise EngineError(
                f"threads: expected 1 to {usable_processors()}, the cores that this process may use, found {threads}"
            )
        for option, names in (("outputs", outputs), ("graphs", graphs)):
            if isinstance(names, str):
                raise EngineError(f"{option}: expected a list of names, found the text '{names}'")
        choice = choose_engine(bundle.manifest, engine, device, precision)
        self.precision = choose_precision(bundle.manifest, precision, choice.device, choice.name)
        self.bundle = bundle = replace(bundle, manifest=bundle.manifest.at(self.precision))
        self._state_key = bundle.state_key()  # now: the folder may be replaced while the session goes on
        manifest = bundle.manifest
        self.available_outputs = tuple(frame_outputs(manifest))
        self.labels: tuple[str, ...] = manifest.labels.names if manifest.labels else ()
        self.background: str | None = manifest.labels.background if manifest.labels else None
        self.outputs = tuple(outputs) if outputs is not None else default_outputs(manifest)
        self.graphs = tuple(graphs) if graphs is not None else decoder_graphs(manifest)
        if unknown := [name for name in self.graphs if name not in manifest.graphs]:
            raise EngineError(f"graphs: '{unknown[0]}' is unknown; this bundle has {', '.join(manifest.graphs)}")
        check_outputs(self.outputs, self.graphs, bundle)
        self.preprocess = Preprocess(manifest.frame)
        self.streams = streams
        self.engine_choice = f"{choice.reason}, {self.precision}"
        self._engine = make_engine(
            choice,
            bundle,
            graphs_for(manifest, self.outputs),
            self.outputs,
            streams,
            threads or default_threads(),
            self.graphs,
        )
        self._lock = threading.RLock()
        self._labelling = threading.Lock()
        self._slots: list[Stream | None] = [None] * streams
        self._closed = False
        self._text_encoder: Any = None
        if manifest.labels is not None and manifest.scoring is not None:
            embeddings = read_label_embeddings(bundle.file(manifest.labels.file), len(manifest.labels.names))
            self._engine.set_constants(label_inputs(manifest.scoring, *embeddings))

    @property
    def rate(self) -> float | None:
        """Frames a second that the model is to see; None for every frame."""
        return self.bundle.manifest.rate

    @property
    def frame(self) -> FrameSpec:
        """Size of the model's input, and how frames are brought to it."""
        return self.bundle.manifest.frame

    def open_stream(self) -> Stream:
        """Take a free place.

        Raises:
            EngineError: every place is taken.
        """
        with self._lock:
            self._check_open()
            for slot, stream in enumerate(self._slots):
                if stream is None:
                    self._engine.seek(slot, 0)
                    opened = self._slots[slot] = Stream(self, slot)
                    return opened
        raise EngineError(f"every stream of this session is open ({self.streams}); load it with more streams")

    def step(self, frames: Mapping[Stream, Array]) -> dict[Stream, Result]:
        """Advance several streams by one frame each, in one run of the model.

        Args:
            frames: uint8 [height, width, 3] RGB of any size, for each stream to advance.

        Raises:
            FrameError: a frame is of another kind; no stream has advanced.
            NonFiniteOutputError: see there.
        """
        start = time.perf_counter()
        with self._lock:
            self._check_open()
            for stream, rgb in frames.items():
                stream._check_owner(self)
                check_frame(rgb)
            if not frames:
                return {}
            broken = self._engine.step({stream.slot: rgb for stream, rgb in frames.items()})
            return self._collect(frames, broken, start)

    def prime(self, stream: Stream, frames: Iterable[Array]) -> Result:
        """See `Stream.prime`."""
        start = time.perf_counter()
        with self._lock:
            self._check_open()
            stream._check_owner(self)
            given = list(frames)
            if not given:
                raise FrameError("prime: expected at least one frame, found none")
            for rgb in given:
                check_frame(rgb)
            engine = self._engine
            if not isinstance(engine, PrefillEngine) or not engine.can_prefill():
                for rgb in given[:-1]:
                    self.step({stream: rgb})
                return self.step({stream: given[-1]})[stream]
            names = engine.prime(stream.slot, given)
            return self._collect([stream], {stream.slot: names} if names else {}, start)[stream]

    def warm_up(self, steps: int = 2) -> None:
        """Run every number of streams, so that the first frames take no longer than the others."""
        with self._lock:
            self._check_open()
            self._engine.warm_up(steps)

    def set_labels(
        self, labels: Sequence[str], templates: Sequence[str] | None = None, background: str | None = None
    ) -> None:
        """Ask for other labels from the next step on, by the bundle's text graph. The bundle is not changed.

        Args:
            labels: what to look for, in words.
            templates: texts that a label stands for, `{}` being the label; default: the bundle's.
            background: a label that competes in class maps but is not reported as an event.

        Raises:
            BundleError: the bundle has no text graph.
            LabelError: no labels, or one twice.
        """
        from .text import TextEncoder, check_labels

        text, scoring = self.bundle.manifest.text, self.bundle.manifest.scoring
        if text is None or scoring is None:
            raise BundleError(
                f"{self.bundle.path}: has no text graph; export it with --text-graph, or use 'framestep label'"
            )
        check_labels(labels)
        names = tuple(labels)
        if background is not None and background not in names:
            names += (background,)
        with self._labelling:  # streams go on with the old labels meanwhile
            if self._text_encoder is None:
                graph = self.bundle.manifest.graphs[text.graph]
                self._text_encoder = TextEncoder(
                    self.bundle.file(graph.file), self.bundle.file(text.tokenizer), text.length
                )
            embeddings = self._text_encoder.embed(names, text.templates if templates is None else templates)
            patch_embeddings = self._text_encoder.embed(names, text.patch_templates)
            with self._lock:
                self._check_open()
                self._engine.set_constants(label_inputs(scoring, embeddings, patch_embeddings))
                self.labels, self.background = names, background

    def close(self) -> None:
        """Free the memory. Open streams become unusable."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _collect(
        self, streams: Iterable[Stream], broken: Mapping[int, tuple[str, ...]], start: float
    ) -> dict[Stream, Result]:
        results: dict[Stream, Result] = {}
        for stream in streams:
            if stream.slot not in broken:
                outputs = {name: array.copy() for name, array in self._engine.output(stream.slot).items()}
                position = self._engine.position(stream.slot) - 1
                results[stream] = Result(outputs, position, (time.perf_counter() - start) * 1e3)
        if broken:
            names = sorted({name for bad in broken.values() for name in bad})
            concerned = tuple(stream for stream in streams if stream.slot in broken)
            raise NonFiniteOutputError(concerned, tuple(names), results)
        return results

    def _known_state_key(self) -> str:
        if not self._state_key:
            raise StateError(f"{self.bundle.path}: its manifest does not list its files")
        return self._state_key

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("this session is closed")


class Stream:
    """One camera's place in a session. Use `Session.open_stream`."""

    def __init__(self, session: Session, slot: int) -> None:
        self._session = session
        self.slot = slot
        self._open = True

    @property
    def position(self) -> int:
        """Frames since the last reset."""
        self._check_owner(self._session)
        return self._session._engine.position(self.slot)

    def step(self, rgb: Array) -> Result:
        """Advance by one frame.

        Args:
            rgb: uint8 [height, width, 3], RGB, any size.
        """
        return self._session.step({self: rgb})[self]

    def prime(self, frames: Iterable[Array]) -> Result:
        """Advance by several frames at once: from a clip before a stream begins, or to catch up after a stall.

        The stream is left as if it had stepped through them. Engines that can take them together do; the others step.

        Args:
            frames: uint8 [height, width, 3] RGB of any size, at least one. All are held in memory at the model's size.

        Returns:
            The result for the last frame; its latency is that of the whole call.

        Raises:
            FrameError: a frame is of another kind, or there is none; the stream has not advanced.
            NonFiniteOutputError: see there. Frames taken together are judged by what the last of them gives.
        """
        return self._session.prime(self, frames)

    def run(self, graph: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Run one graph of the bundle by itself, with this stream's states in place.

        Graphs that write a common state take turns; all others, and steps whose graphs write none of its states, go on
        beside it in other threads. No clock moves.

        Args:
            graph: one of `Session.graphs`.
            inputs: every input by name, of the manifest's type and shape without the streams axis. An axis of any size,
                such as that of new tokens, may have another one in each run.

        Returns:
            The outputs by name, without the streams axis; copies.

        Raises:
            EngineError: an input is missing, unknown or of another type or shape, or the graph refused it.
            NonFiniteOutputError: the model gave NaN or infinity. What the graph writes was zeroed for this stream.
        """
        session = self._session
        self._check_owner(session)
        engine = session._engine
        if graph not in session.graphs or not isinstance(engine, GraphEngine):
            raise EngineError(f"graph '{graph}' was not loaded to be run by itself; load(..., graphs=('{graph}',))")
        found = engine.run(self.slot, graph, inputs)
        bad = [name for name, array in found.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
        if bad:
            raise NonFiniteOutputError((self,), tuple(bad), {})
        return found

    def reset(self) -> None:
        """Forget every frame so far."""
        with self._session._lock:
            self._check_owner(self._session)
            self._session._engine.seek(self.slot, 0)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write this stream's memory and clock to a file, and wait until the disk has it.

        Steps of other threads go on meanwhile. A power cut leaves the file as it was before, or whole.

        Raises:
            OutputError: the file cannot be written.
        """
        session = self._session
        with session._lock:
            self._check_owner(session)
            tensors = {name: session._engine.read_state(name, self.slot) for name in session._engine.state_names()}
            position = self.position
        state_file.write_state(path, session._known_state_key(), position, tensors)

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Continue from a file that `save_state` wrote, with the same model.

        Raises:
            StateError: damaged, or of another model. The stream is unchanged then.
        """
        session = self._session
        with session._lock:
            self._check_owner(session)
            used = set(session._engine.state_names())
            expected = {
                state.name: (tuple(int(n) for n in state.shape[1:]), state.dtype)
                for state in session.bundle.manifest.states
                if state.name in used
            }
            position, tensors = state_file.read_state(path, session._known_state_key(), expected)
            bad = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
            if bad:
                raise StateError(f"{path}: NaN or infinity in '{bad[0]}'")
            for name, tensor in tensors.items():
                session._engine.write_state(name, self.slot, tensor)
            session._engine.seek(self.slot, position)

    def close(self) -> None:
        """Give the place back."""
        with self._session._lock:
            if self._open:
                self._open = False
                self._session._slots[self.slot] = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_owner(self, session: Session) -> None:
        if self._session is not session:
            raise EngineError("this stream belongs to another session")
        if not self._open:
            raise EngineError("this stream is closed")
        session._check_open()
