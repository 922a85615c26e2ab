"""Export: checkpoint to bundle.

From Python, for instance for a model that a notebook has in memory:

    from framestep.export import ExportOptions, checkpoint_of, export_streamformer

    export_streamformer(checkpoint_of(model), "mine.bundle", ExportOptions(window=16, rate=8))

A name is imported when it is first used: of this folder some modules run on machines without PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import checkpoint_of, read_checkpoint
    from .decoder_checkpoint import read_decoder_checkpoint
    from .decoder_export import DecoderOptions, export_decoder
    from .export import ExportOptions, export_streamformer
    from .labelling import LabelOptions, label_bundle

__all__ = [
    "DecoderOptions",
    "ExportOptions",
    "LabelOptions",
    "checkpoint_of",
    "export_decoder",
    "export_streamformer",
    "label_bundle",
    "read_checkpoint",
    "read_decoder_checkpoint",
]
PLACES = {
    "checkpoint": ("checkpoint_of", "read_checkpoint"),
    "decoder_checkpoint": ("read_decoder_checkpoint",),
    "decoder_export": ("DecoderOptions", "export_decoder"),
    "export": ("ExportOptions", "export_streamformer"),
    "labelling": ("LabelOptions", "label_bundle"),
}


def __getattr__(name: str) -> Any:
    for module, names in PLACES.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
