"""A section of the suite: what it found, what was wrong, and how much time it has left."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Section:
    """Collects results and keeps them on disk, so that a section that is stopped leaves what it had.

    Attributes:
        rows: results by the table they belong to.
        failures: wrong results; any makes the suite fail.
        skipped: what was not measured, and why.
    """

    name: str
    path: Path
    seconds: float
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    begin: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds left."""
        return self.seconds - (time.monotonic() - self.begin)

    def add(self, table: str, **row: Any) -> None:
        self.rows.setdefault(table, []).append(row)
        print(f"{self.name}: {table}: " + ", ".join(f"{key} {_short(value)}" for key, value in row.items()), flush=True)
        self.save()

    def check(self, what: str, error: float, limit: float) -> None:
        """Note an error, and a failure where it is above its limit or not a number."""
        good = error <= limit
        self.rows.setdefault("checks", []).append({"what": what, "error": error, "limit": limit, "good": good})
        if not good:
            self.fail(f"{what}: error {error:.2e} is above {limit:.0e}")

    def fail(self, message: str) -> None:
        self.failures.append(message)
        print(f"{self.name}: WRONG: {message}", flush=True)
        self.save()

    def skip(self, message: str) -> None:
        self.skipped.append(message)
        print(f"{self.name}: not measured: {message}", flush=True)
        self.save()

    def attempt(self, what: str, call: Callable[[], None]) -> bool:
        """Run a part whose exception is a failure but no reason to stop the others."""
        try:
            call()
        except Exception as error:
            traceback.print_exc()
            self.fail(f"{what}: {type(error).__name__}: {_line(error)}")
            return False
        return True

    def save(self) -> None:
        values = {key: getattr(self, key) for key in ("name", "facts", "rows", "failures", "skipped")}
        values["seconds"] = round(time.monotonic() - self.begin, 1)
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps(values, indent=1))
        temporary.replace(self.path)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
