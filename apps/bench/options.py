"""What `framestep bench` can be asked for."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...runtime.errors import FramestepError
from .baselines import BASELINES, GROUPS, PRECISIONS, precision_path

MOST = 10**9  # of whatever is counted


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What `framestep bench` was asked for; see its help.

    Attributes:
        frames: stream positions, the first frame being 1.
        compare: what `expand_compare` takes.
        samples: latencies at each position in each process.
        processes: fresh processes for each path.
        steady: frames of the steady run; 0 for none.
        every_frame: the steady run goes on to the last of `frames`.
        threads: None for every core.
        checkpoint: of the PyTorch baselines; None where the bundle's origin says how to make it again.
        budget_s: seconds for each baseline over all of its processes; positions up to 64 are taken anyway.
    """

    bundle: Path
    output: Path
    frames: tuple[int, ...]
    streams: tuple[int, ...]
    compare: tuple[str, ...]
    samples: int
    processes: int
    steady: int
    every_frame: bool
    engine: str
    device: str
    budget_s: float
    precision: str = "auto"
    threads: int | None = None
    checkpoint: str | None = None

    def check(self) -> None:
        """Raise FramestepError where a number makes no sense."""
        for name, value, least in (
            ("--samples", self.samples, 1),
            ("--processes", self.processes, 1),
            ("--steady", self.steady, 0),
            ("--threads", self.threads, 1),
            ("--budget-s", self.budget_s, 1),
        ):
            if value is not None and not least <= value <= MOST:
                raise FramestepError(f"{name}: expected {least} to {MOST}, found {value}")

    def command(self, threads: int) -> str:
        """The command that asks for this, without folders."""
        words: list[str] = ["framestep", "bench", self.bundle.name, "-o", self.output.name]
        words += ["--frames", ",".join(map(str, self.frames)), "--streams", ",".join(map(str, self.streams))]
        words += ["--compare", ",".join(self.compare)] if self.compare else []
        words += ["--samples", str(self.samples), "--processes", str(self.processes)]
        words += ["--steady", str(self.steady), *(["--every-frame"] if self.every_frame else [])]
        words += ["--threads", str(threads), "--engine", self.engine, "--device", self.device]
        words += ["--precision", self.precision] if self.precision != "auto" else []
        words += ["--budget-s", f"{self.budget_s:g}"]
        words += ["--checkpoint", Path(self.checkpoint).name] if self.checkpoint else []
        return shlex.join(words)


def parse_numbers(text: str, option: str) -> tuple[int, ...]:
    """`1,4,16` as ascending numbers without repeats.

    Raises:
        FramestepError: something else.
    """
    try:
        numbers = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        raise FramestepError(f"{option}: expected numbers such as 1,4,16, found '{text}'") from None
    if not numbers or numbers[0] < 1:
        raise FramestepError(f"{option}: expected numbers of at least 1, found '{text}'")
    if numbers[-1] > MOST:
        raise FramestepError(f"{option}: expected numbers of at most {MOST}, found '{text}'")
    return tuple(numbers)


def expand_compare(names: Iterable[str], precisions: Sequence[str]) -> tuple[str, ...]:
    """The paths behind the names of `--compare`, each once.

    Args:
        names: keys of `GROUPS` or of `BASELINES`, `framestep-` and a precision, "precisions" for each of these, "all".
        precisions: of the bundle.

    Raises:
        FramestepError: an unknown name.
    """
    found: dict[str, None] = {}
    stored = tuple(precision_path(precision) for precision in precisions)
    for name in names:
        if name == "all":
            group: Sequence[str] = (*BASELINES, *stored)
        elif name == PRECISIONS:
            group = stored
        elif name in GROUPS:
            group = GROUPS[name]
        elif name in (*BASELINES, *stored):
            group = (name,)
        else:
            known = ", ".join(dict.fromkeys((*GROUPS, *BASELINES, *stored)))
            raise FramestepError(f"--compare: '{name}' is unknown; expected all, {PRECISIONS}, {known}")
        found.update(dict.fromkeys(group))
    return tuple(found)
