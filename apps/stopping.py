"""SIGINT, SIGTERM and SIGHUP as a wish that what goes on comes to an orderly end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stopping:
    """Set by a signal, or by whoever calls `ask`.

    Attributes:
        then: called when it is asked; takes no lock.
        number: of the signal that asked.
    """

    then: Callable[[], None] | None = None
    asked: bool = False
    number: int | None = None

    def ask(self) -> None:
        self.asked = True
        if self.then is not None:
            self.then()

    def obey(self) -> None:
        """Give the signal that asked, if one did, its usual effect."""
        if self.number is not None:
            signal.raise_signal(self.number)
            raise KeyboardInterrupt  # it is ignored here, as in the background of a script


@contextmanager
def stop_on_signals(then: Callable[[], None] | None = None) -> Iterator[Stopping]:
    """SIGINT, SIGTERM and, where it is not ignored, SIGHUP ask the run to stop; a second one has its usual effect."""
    stopping = Stopping(then)
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] == signal.SIG_IGN:  # nohup
        del before[signal.SIGHUP]

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        stopping.number = number
        stopping.ask()
        restore()

    for number in before:
        signal.signal(number, stop)
    try:
        yield stopping
    finally:
        restore()
