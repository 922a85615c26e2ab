"""The command `framestep`, also as `python -m framestep`."""

from __future__ import annotations

import os
import sys
import threading


def main() -> None:
    """Entry point. What the command line needs takes a moment to load, and Ctrl-C meanwhile is one line too."""
    try:
        from framestep.apps.cli import main as run_command

        run_command()
    except KeyboardInterrupt:
        print("framestep: interrupted", file=sys.stderr)
        _leave(130)
    except SystemExit as ending:
        _leave(ending.code)


def _leave(status: str | int | None) -> None:
    if isinstance(status, int) and any(thread.name == "framestep source" for thread in threading.enumerate()):
        # A camera's reader is stuck in OpenCV. Were it to come back while Python shuts down, the process would abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
