"""framestep: streaming video models with their memory as explicit state, from a checkpoint to a camera.

session = framestep.load("streamformer.bundle")
with session.open_stream() as stream:
    for frame in framestep.open_source("clip.mp4", rate=session.rate):
        result = stream.step(frame.rgb)
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .runtime.errors import FramestepError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .runtime.conversation import FrameSource
    from .runtime.dialogue_options import DialogueOptions
    from .runtime.events import Event
    from .runtime.questions import Question
    from .runtime.session import NonFiniteOutputError, Result, Session, Stream
    from .runtime.sources import Frame, Source

__version__ = "0.1.0"
__all__ = [
    "Frame",
    "FramestepError",
    "NonFiniteOutputError",
    "Result",
    "Session",
    "Stream",
    "converse",
    "load",
    "open_source",
]

# ONNX Runtime from 1.29 on reports every session over the network unless this is set before it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def load(
    path: str | os.PathLike[str],
    engine: str = "auto",
    device: str = "auto",
    streams: int = 1,
    outputs: Sequence[str] | None = None,
    threads: int | None = None,
    precision: str = "auto",
    graphs: Sequence[str] | None = None,
) -> Session:
    """Load a bundle.

    Args:
        path: the bundle's folder.
        engine: "auto", "onnxruntime", "torch" or "tensorrt", the first two with a variant where wanted, such as
            "torch:fp16"; see `runtime.engines.choosing`.
        device: "auto", "cpu" or "cuda".
        streams: number of streams that can be open at once; each takes `framestep inspect`'s bytes per stream.
        outputs: what to fetch for each frame, such as ("pooled", "scores"); what is not named is not computed where it
            has a graph of its own. Default: features and pooled, and scores where the bundle has labels.
        threads: threads of the engine; default: every core that this process may use.
        precision: "auto" for the fastest in the bundle that the device runs well, or one of its own, such as "int8".
        graphs: what to load for `Stream.run`, by name. Default: the language decoder, where the bundle has one.

    Raises:
        FramestepError: the bundle is damaged, or the engine or device cannot be used here.
    """
    from .runtime.bundle import Bundle
    from .runtime.session import Session

    return Session(Bundle.open(path), engine, device, streams, outputs, threads, precision, graphs)


def open_source(spec: str | int | os.PathLike[str], **options: Any) -> Source:
    """Open a camera, video file, folder of images, network stream or `synthetic`; see `runtime.sources.open_source`."""
    from .runtime.sources import open_source

    return open_source(spec, **options)


def converse(
    session: Session,
    source: FrameSource,
    questions: Sequence[str | Question] = (),
    options: DialogueOptions | None = None,
) -> Iterator[Event]:
    """Talk with a model about what a source shows; see `runtime.converse.converse`."""
    from .runtime.converse import converse

    return converse(session, source, questions, options)


def __getattr__(name: str) -> Any:
    if name in ("Session", "Stream", "Result", "NonFiniteOutputError"):
        from .runtime import session

        return getattr(session, name)
    if name == "Frame":
        from .runtime.sources import Frame

        return Frame
    raise AttributeError(f"module 'framestep' has no attribute '{name}'")
