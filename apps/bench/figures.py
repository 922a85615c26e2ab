"""What the figures of decoders share: how a distribution is told, and where they are written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...runtime.bundle import write_file
from ...runtime.errors import OutputError
from ...runtime.schema import to_json

RANKS = (50, 95, 99, 100)


class Figures(Protocol):
    """A dataclass that can be told as text."""

    def as_text(self) -> str: ...


def spread(milliseconds: Sequence[float]) -> tuple[float, ...]:
    """p50, p95, p99 and max; zeros where nothing was measured."""
    if not milliseconds:
        return (0.0,) * len(RANKS)
    return tuple(round(float(np.percentile(milliseconds, rank)), 4) for rank in RANKS)


def make_folder(folder: Path) -> None:
    """Make the folder of a report, where there is none.

    Raises:
        OutputError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise OutputError(f"{folder}: is a file; the report needs a folder") from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from None


def write_figures(figures: Figures, folder: Path) -> None:
    """Write `report.json` and `report.md`."""
    values: Any = to_json(figures)
    write_file(folder / "report.json", [(json.dumps(values, indent=1) + "\n").encode()])
    write_file(folder / "report.md", [figures.as_text().encode()])
