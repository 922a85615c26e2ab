"""What a run tells while it goes on: a live line on a terminal, a plain line now and then elsewhere.

Everything goes to standard error; standard output belongs to results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ..runtime.counted import counted
from .latency import Percentiles

TERMINAL_PERIOD_S = 0.1
PLAIN_PERIOD_S = 5.0


@dataclass(frozen=True, slots=True)
class LaneStatus:
    """How one source is doing: figures of its recent frames, its likeliest labels with their scores."""

    name: str
    frames: int
    fps: float
    latency_ms: Percentiles
    dropped: int
    top: Sequence[tuple[str, float]]

    def as_text(self) -> str:
        latency = self.latency_ms
        parts = [
            f"{counted(self.frames, 'frame')}  {self.fps:.1f} fps",
            f"latency p50 {latency.p50:.1f}  p95 {latency.p95:.1f}  p99 {latency.p99:.1f} ms",
            f"dropped {self.dropped}",
        ]
        if self.top:
            parts.append(", ".join(f"{label} {score:.2f}" for label, score in self.top))
        return "   ".join(parts)


class Status(Protocol):
    """Where a run reports. `lanes` is called only when something is shown.

    A terminal or a reader of the log that went away keeps nothing from going on.
    """

    def update(self, lanes: Callable[[], Sequence[LaneStatus]]) -> None: ...

    def report(self, message: str) -> None:
        """Something happened, and the run goes on."""
        ...

    def error(self, message: str) -> None:
        """Something failed that makes the exit status 2, though the run goes on."""
        ...

    def close(self) -> None: ...


class QuietStatus:
    """Reports and errors, no status."""

    def update(self, lanes: Callable[[], Sequence[LaneStatus]]) -> None:
        pass

    def report(self, message: str) -> None:
        self._print(f"warning: {message}")

    def error(self, message: str) -> None:
        self._print(f"framestep: {message}")

    def close(self) -> None:
        pass

    def _print(self, line: str) -> None:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


class PlainStatus(QuietStatus):
    """A line every few seconds, for logs."""

    def __init__(self, period_s: float = PLAIN_PERIOD_S) -> None:
        self._period_s = period_s
        self._next = time.monotonic() + period_s

    def update(self, lanes: Callable[[], Sequence[LaneStatus]]) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + self._period_s
        self._print(" | ".join(_lines(lanes())))


class TerminalStatus(QuietStatus):
    """A line for each source that is rewritten in place."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._next = 0.0

    def update(self, lanes: Callable[[], Sequence[LaneStatus]]) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + TERMINAL_PERIOD_S
        with suppress(OSError):
            self._live.start()
            self._live.update(Text("\n".join(_lines(lanes())), no_wrap=True, overflow="ellipsis"), refresh=True)

    def close(self) -> None:
        with suppress(OSError):
            self._live.stop()

    def _print(self, line: str) -> None:
        with suppress(OSError):
            self._console.print(Text(line), soft_wrap=True)


def status_for(quiet: bool) -> Status:
    """The way to report that suits where standard error goes."""
    if quiet:
        return QuietStatus()
    return TerminalStatus() if sys.stderr.isatty() else PlainStatus()


def _lines(lanes: Sequence[LaneStatus]) -> list[str]:
    if len(lanes) == 1:
        return [lanes[0].as_text()]
    return [f"{lane.name}: {lane.as_text()}" for lane in lanes]
