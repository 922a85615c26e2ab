"""The command line `framestep`: its commands, and how a process that runs one of them ends."""

from __future__ import annotations

import errno
import functools
import os
import re
import signal
import sys
from types import FrameType
from typing import Annotated, Any

import typer

from .. import __version__
from ..runtime.errors import FramestepError
from .commands import COMMANDS

INTERRUPTED = 130
NOT_TAKEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # by the disk behind standard output
OUT_OF_MEMORY = ("can't allocate memory", "Insufficient memory")  # as PyTorch and OpenCV say it

app = typer.Typer(
    name="framestep",
    help="Streaming video models, from a checkpoint to a camera.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a traceback means a bug, and is wanted whole
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"framestep {__version__}")
        raise typer.Exit


@app.callback()
def framestep(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Streaming video models, from a checkpoint to a camera."""


for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """Entry point. An error raised on purpose is one line on standard error and exit status 2."""
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _terminate)
    if os.environ.get("COLUMNS") == "0":  # as a terminal without a size has it: rich would show nothing
        del os.environ["COLUMNS"]
    sys.exit(_exit_status(sys.argv[1:]))


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave through the cleanup of whatever is under way, so that no half-written file stays."""
    raise SystemExit(128 + number)


@functools.cache
def _command() -> Any:
    return typer.main.get_command(app)  # reads every option of every command, which takes longer than many of them


def _exit_status(arguments: list[str]) -> int:
    try:
        status = _command().main(arguments or ["--help"], prog_name="framestep", standalone_mode=False)
    except FramestepError as error:
        return _fail(_as_typed(str(error), arguments), 2)
    except (typer.Abort, KeyboardInterrupt):
        status = INTERRUPTED
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "cv2":
            raise
        from ..runtime.sources.opencv import what_to_install

        return _fail(f"frames are read and drawn with OpenCV ({error}): {what_to_install(error)}", 2)
    except OSError as error:
        if error.filename is None and error.errno == errno.ENOENT:  # as getcwd says it
            return _fail("the folder that this runs in was removed; run it in another", 2)
        if error.filename is None and error.errno not in NOT_TAKEN:
            raise
        return _fail(": ".join(str(part) for part in (error.filename, error.strerror) if part), 2)
    except MemoryError as error:
        return _fail(f"not enough memory: {error}", 2)
    except Exception as error:
        if any(text in str(error) for text in OUT_OF_MEMORY):
            return _fail(f"not enough memory: {error}", 2)
        # A usage error. Its class is Click's in some versions of typer and typer's own in others.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        return _fail(f"{error.format_message()} (see `{context.command_path if context else 'framestep'} --help`)", 2)
    if status == INTERRUPTED:
        return _fail("interrupted", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _as_typed(message: str, arguments: list[str]) -> str:
    """What begins with Python's name of an option of the command that runs, as "top_p: ...", begins with the option."""
    named = re.match(r"\w+(?=:| is )", message)
    called = _command().commands.get(arguments[0]) if named and arguments else None
    for option in called.params if called else ():
        typed = max(option.opts, key=len)
        if named and option.name == named[0] and typed.startswith("--"):
            return typed + message[named.end() :]
    return message


def _fail(message: str, status: int) -> int:
    print(f"framestep: {' '.join(message.split())}", file=sys.stderr)
    return status
