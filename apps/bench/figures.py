"""What the figures of decoders share: how a distribution is told, and where they are written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...runtime.durable import write_file
from ...runtime.errors import OutputError
from ...runtime.schema import to_json
from .report import percentile

Spread = tuple[float | None, float | None, float | None, float | None]


class Figures(Protocol):
    """A dataclass that can be told as text."""

    def as_text(self) -> str: ...


def spread(milliseconds: Sequence[float]) -> Spread:
    """p50, p95, p99 and max, None where there are too few for it."""
    if not milliseconds:
        return (None, None, None, None)
    ordered = np.sort(np.asarray(milliseconds, float))
    p50, most = (round(float(value), 4) for value in (np.median(ordered), ordered[-1]))
    return (p50, percentile(ordered, 95), percentile(ordered, 99), most)


def p50_p99_max(figures: Spread) -> str:
    """In words, – where there is none."""
    p50, _, p99, most = figures
    return " / ".join("–" if value is None else f"{value:.2f}" for value in (p50, p99, most))


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
