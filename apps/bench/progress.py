"""How a bench tells what it is doing: a bar with the remaining time on a terminal, a line a step in a log, nothing for
machines. All on standard error."""

from __future__ import annotations

import sys
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class BenchStatus(Protocol):
    """Where a bench reports. Times are estimates in seconds of measuring."""

    def plan(self, total_s: float) -> None:
        """How much there is to do, as far as is known now."""
        ...

    def working(self, what: str, done_s: float) -> None: ...

    def report(self, message: str) -> None:
        """Something could not be measured, and the bench goes on."""
        ...

    def close(self) -> None: ...


class QuietBenchStatus:
    """Problems on standard error, nothing else."""

    def plan(self, total_s: float) -> None:
        pass

    def working(self, what: str, done_s: float) -> None:
        pass

    def report(self, message: str) -> None:
        print(f"warning: {message}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class PlainBenchStatus(QuietBenchStatus):
    """A line for each measurement as it begins, for logs."""

    def __init__(self) -> None:
        self._total_s = 0.0
        self._what = ""

    def plan(self, total_s: float) -> None:
        self._total_s = total_s

    def working(self, what: str, done_s: float) -> None:
        if what != self._what:
            self._what = what
            left = max(0.0, self._total_s - done_s)
            told = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
            print(f"{what} (about {told} left)" if self._total_s else what, file=sys.stderr, flush=True)


class BenchProgress:
    """A bar with the remaining time."""

    def __init__(self) -> None:
        console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            speed_estimate_period=600,
        )
        self._task: TaskID = self._progress.add_task("starting", total=None)
        self._progress.start()

    def plan(self, total_s: float) -> None:
        self._progress.update(self._task, total=total_s)

    def working(self, what: str, done_s: float) -> None:
        self._progress.update(self._task, description=what, completed=done_s)

    def report(self, message: str) -> None:
        self._progress.console.print(Text(f"warning: {message}"), soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def bench_status_for(quiet: bool) -> BenchStatus:
    """What suits where standard error goes; problems alone where `quiet`."""
    if quiet:
        return QuietBenchStatus()
    return BenchProgress() if sys.stderr.isatty() else PlainBenchStatus()
