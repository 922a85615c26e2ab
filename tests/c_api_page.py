"""A reader of docs/c-api.md, who pastes its commands one after the other into one terminal."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import cv2
from native_parts import BUILD, building
from v4l2_stand_in import DEVICE

import framestep

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "tests" / "data" / "steps.bundle"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "docs" / "c-api.md").read_text("utf-8"), re.M | re.S)
COMMANDS = [text for kind, text in BLOCKS if kind == "bash"]
PYTHON = '#!/bin/sh\nexec "{python}" "$@"\n'
FFMPEG = """#!{python}
# knows the page's command alone
import sys
import cv2
import framestep
command = "-v error -i clip.mp4 -vf fps=8,scale=640:360 -f rawvideo -pix_fmt rgb24 -"
assert sys.argv[1:] == command.split(), sys.argv
for frame in framestep.open_source("clip.mp4", rate=8):
    sys.stdout.buffer.write(cv2.resize(frame.rgb, (640, 360)).tobytes())
"""


class Reader:
    """A home folder with what the page supposes, and what became of each of its commands.

    Attributes:
        folder: where the commands run, and what they left.
        env: the environment after the last command.
        results: of each block of commands; after one that failed no more were run.
    """

    def __init__(self, folder: Path, stand_in: dict[str, str]) -> None:
        self.folder = folder
        self.results: list[subprocess.CompletedProcess[str]] = []
        tools = folder / "tools"
        tools.mkdir()
        self._program(tools / "python", PYTHON)
        if shutil.which("ffmpeg") is None:
            self._program(tools / "ffmpeg", FFMPEG)
        shutil.copytree(BUNDLE, folder / "streamformer.bundle")
        make_clip(folder / "clip.mp4")
        for kind, text in BLOCKS:
            if kind in ("c", "cmake"):  # the first line is a comment with the file's name
                name = text.splitlines()[0].strip("/*# ")
                (folder / name).write_text(text)
        path = f"{tools}{os.pathsep}{os.environ['PATH']}"
        self.env = {**os.environ, "HOME": str(folder), "PATH": path}
        for block in COMMANDS:
            self._paste(block, stand_in if DEVICE in block else {})
            if self.results[-1].returncode != 0:
                break

    def _paste(self, block: str, more: dict[str, str]) -> None:
        # the clone, wherever it is, and a build folder that outlives this reader
        builds = "build/native" in block
        block = block.replace("-S framestep/", f"-S {shlex.quote(str(ROOT))}/")
        block = block.replace("build/native", shlex.quote(str(BUILD)))
        script = f"set -e -o pipefail\n{block}\nenv -0 > environment\n"
        command = ["bash", "-c", script]
        with building() if builds else nullcontext():
            done = subprocess.run(
                command, cwd=self.folder, env={**self.env, **more}, capture_output=True, text=True, check=False
            )
        self.results.append(done)
        if done.returncode == 0:
            pairs = (self.folder / "environment").read_text().split("\0")[:-1]
            after = dict(pair.split("=", 1) for pair in pairs)
            self.env = {name: value for name, value in after.items() if name not in more}

    @staticmethod
    def _program(path: Path, text: str) -> None:
        path.write_text(text.format(python=sys.executable))
        path.chmod(0o755)


def make_clip(path: Path) -> None:
    """40 frames at 25 a second."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 25, (160, 120))
    for frame in framestep.open_source("synthetic:frames=40,width=160,height=120"):
        writer.write(frame.rgb[..., ::-1].copy())
    writer.release()
