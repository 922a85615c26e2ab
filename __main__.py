"""The command `framestep`, also as `python -m framestep`."""

from __future__ import annotations

import io
import os
import sys
import threading


def main() -> None:
    """Entry point. What the command line needs takes a moment to load, and Ctrl-C meanwhile is one line too."""
    _mend_standard_files()
    try:
        from framestep.apps.cli import main as run_command

        run_command()
    except KeyboardInterrupt:
        print("framestep: interrupted", file=sys.stderr)
        _leave(130)
    except SystemExit as ending:
        _leave(ending.code)


def _mend_standard_files() -> None:
    """Let closed ones lead nowhere, and escape what a terminal's encoding lacks."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened, a result, would get what is meant for the terminal
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error does


def _leave(status: str | int | None) -> None:
    if isinstance(status, int) and any(thread.name == "framestep source" for thread in threading.enumerate()):
        # A camera's reader is stuck in OpenCV. Were it to come back while Python shuts down, the process would abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
