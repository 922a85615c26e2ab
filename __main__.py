"""The command `framestep`, also as `python -m framestep`."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point. What the command line needs takes a moment to load, and Ctrl-C meanwhile is one line too."""
    try:
        from framestep.apps.cli import main as run_command

        run_command()
    except KeyboardInterrupt:
        print("framestep: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
