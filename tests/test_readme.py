"""Every code block of the README runs, in order, as a reader would paste it."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import golden
import pytest
from command_line import main

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Path:
    """A folder with what the README supposes that a reader has."""
    import cv2
    from siglip_text import make_siglip_checkpoint

    import framestep

    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(golden.CHECKPOINT, folder / "checkpoints" / "streamformer")
    make_siglip_checkpoint(folder / "checkpoints" / "siglip")
    (folder / "labels.txt").write_text("opening a door\na red car\n")
    (folder / "others.txt").write_text("a cat\na dog\n")
    writer = cv2.VideoWriter(str(folder / "clip.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, (160, 120))
    for frame in framestep.open_source("synthetic:frames=40,width=160,height=120"):
        writer.write(frame.rgb[..., ::-1].copy())
    writer.release()
    return folder


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs_as_pasted(reader, number, monkeypatch):
    kind, text = BLOCKS[number]
    if kind == "text" and text.startswith("pip"):
        assert re.findall(r"'\.\[([\w,]+)\]'", text) == ["cpu", "gpu", "cpu,text", "cpu,export", "cpu,torch"]
        return
    if kind == "text":  # needs a checkpoint that nobody has here: that there are such commands with such options
        for line in text.splitlines():
            program, command, *words = shlex.split(line)
            assert program == "framestep"
            known = run([sys.executable, "-m", "framestep", command, "--help"], ROOT)
            assert {word for word in words if word.startswith("--")} <= set(re.findall(r"--[\w-]+", known))
        return
    if kind == "python":
        run([sys.executable, "-c", text], reader)
        return
    assert kind == "bash"
    for line in text.splitlines():
        words = shlex.split(line)
        if words[0] == "make":  # installs; here only that make knows the target
            run(["make", "--dry-run", *words[1:]], ROOT)
        else:
            assert words[0] == "framestep"
            monkeypatch.chdir(reader)
            assert main(monkeypatch, *words[1:]) == 0  # a process of its own would load PyTorch for each


def test_blocks_left_their_results(reader):
    assert len((reader / "results.jsonl").read_text().splitlines()) == 13  # 40 frames at 25 fps, sampled at 8
    assert (reader / "annotated.mp4").stat().st_size > 0


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
