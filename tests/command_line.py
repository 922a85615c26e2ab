"""The command line, run in this process, and what it left."""

from __future__ import annotations

import json
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import cv2
import pytest
from rich.console import Console

from framestep.apps import cli


def main(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> int:
    """The exit status of `framestep ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["framestep", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


def printed(table: Any) -> str:
    """What a wide terminal shows of a table."""
    console = Console(file=StringIO(), width=300)
    console.print(table)
    return console.file.getvalue()


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def video_frames(path: Path) -> int:
    video, count = cv2.VideoCapture(str(path)), 0
    assert video.isOpened()
    while video.read()[0]:
        count += 1
    return count
