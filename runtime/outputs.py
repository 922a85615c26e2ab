"""What can be fetched from a bundle for each frame, and what is where nothing is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .bundle import Bundle
from .errors import EngineError
from .manifest import LABEL_ROLES, STREAM_ROLES, Manifest, Port


@dataclass(frozen=True, slots=True)
class FrameOutput:
    """An output that comes from frames.

    Attributes:
        labelled: it needs labels.
    """

    port: Port
    labelled: bool


def frame_outputs(manifest: Manifest) -> dict[str, FrameOutput]:
    """The outputs that come from frames, by name."""
    fed = {*STREAM_ROLES, *LABEL_ROLES}
    return {
        port.name: FrameOutput(port, any(item.role in LABEL_ROLES for item in graph.inputs))
        for graph in manifest.graphs.values()
        if all(item.role in fed for item in graph.inputs)
        for port in graph.outputs
    }


def default_outputs(manifest: Manifest) -> tuple[str, ...]:
    """What the decoder sees, where there is one; otherwise all that comes from frames.

    Of the scores only those of whole frames, [S, C], which cost next to nothing.
    """
    if manifest.language is not None:
        return () if manifest.language.visual is None else (manifest.language.visual,)
    return tuple(
        name
        for name, output in frame_outputs(manifest).items()
        if not output.labelled or (manifest.labels is not None and len(output.port.shape) == 2)
    )


def decoder_graphs(manifest: Manifest) -> tuple[str, ...]:
    """The graphs that a language decoder needs."""
    language = manifest.language
    if language is None:
        return ()
    cross = language.cross
    frames = () if cross is None else tuple(name for name in (cross.graph, cross.rebase) if name is not None)
    return (language.embed, language.decoder, language.rebase, *frames)


def check_outputs(outputs: Sequence[str], graphs: Sequence[str], bundle: Bundle) -> None:
    """Raise EngineError where an output cannot be fetched, or nothing is asked for: no output and no graph."""
    manifest = bundle.manifest
    available = frame_outputs(manifest)
    if not outputs and not graphs:
        raise EngineError(f"outputs: expected at least one of {', '.join(available)}")
    for name in outputs:
        if name not in available:
            raise EngineError(f"outputs: '{name}' is unknown; this bundle has {', '.join(available)}")
        if available[name].labelled and manifest.labels is None and manifest.text is None:
            raise EngineError(
                f"outputs: '{name}' needs labels, and {bundle.path} has none; add them with 'framestep label'"
            )
