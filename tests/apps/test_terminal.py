"""The command where standard files are closed, encodings poor, terminals narrow and names of files no text."""

from __future__ import annotations

import errno
import json
import os
import pty
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from command_line import video_frames
from rich.console import Console

from framestep.apps.doctor import Finding
from framestep.apps.doctor import table as doctor_table
from framestep.apps.inspect import table as inspect_table
from framestep.apps.status import PlainStatus, TerminalStatus
from framestep.runtime.bundle import Bundle
from framestep.runtime.errors import SourceError
from framestep.runtime.sources import open_source
from framestep.runtime.sources.opencv import TAKES_BYTES

STEPS = Path(__file__).parents[1] / "data" / "steps.bundle"
SCENE = "synthetic:frames=3,width=32,height=32"
ODD = b"\xff\xe9"  # no UTF-8


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Of a shell in which $FRAMESTEP is the command."""
    settings = {**os.environ, "FRAMESTEP": f"{sys.executable} -m framestep", "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(["sh", "-c", command], capture_output=True, timeout=60, check=False, env=settings)


def test_a_run_goes_on_where_standard_error_is_closed():
    done = shell(f"$FRAMESTEP run {STEPS} --source {SCENE} 2>&-")
    assert (done.returncode, done.stdout[:12]) == (0, b"3 frames in ")


def test_no_result_file_takes_the_place_of_a_closed_standard_file(tmp_path):
    results = tmp_path / "results.jsonl"
    code = f"""
import os, sys
sys.argv = ["framestep", "run", {str(STEPS)!r}, "--source", {SCENE!r}, "--output", {str(results)!r}]
from framestep.runtime import session
close = session.Session.close
def shout(self):
    for number in range(3):
        os.write(number, b"as a library does")
    close(self)
session.Session.close = shout
from framestep.__main__ import main
main()
"""
    settings = {**os.environ, "CODE": code}
    command = f'{sys.executable} -c "$CODE" <&- >&- 2>&-'
    assert subprocess.run(["sh", "-c", command], env=settings, timeout=60, check=False).returncode == 0
    assert [json.loads(line)["position"] for line in results.read_text().splitlines()] == [0, 1, 2]


def test_a_folder_that_was_removed_is_told_of(tmp_path):
    here = tmp_path / "here"
    done = shell('mkdir "$HERE"; cd "$HERE"; rmdir "$HERE"; $FRAMESTEP export none', HERE=str(here))
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"framestep: the folder that this runs in was removed; run it in another\n"


def test_a_terminal_that_closes_finishes_every_file(tmp_path):
    video, results = tmp_path / "video.mp4", tmp_path / "results.jsonl"
    process, terminal = pty.fork()
    if process == 0:
        source = "synthetic:frames=1000000,width=32,height=32"
        files = ["--record", str(video), "--output", str(results)]
        os.execv(sys.executable, [sys.executable, "-m", "framestep", "run", str(STEPS), "--source", source, *files])
    while b" frames" not in os.read(terminal, 1 << 16):
        pass
    os.close(terminal)  # which is SIGHUP, and every word to the terminal an error from then on
    os.waitpid(process, 0)
    assert video_frames(video) == len(results.read_text().splitlines()) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.jsonl", "video.mp4"]


class Gone(StringIO):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_status_that_nobody_reads_any_more_stops_no_run(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    for status in (PlainStatus(period_s=0), TerminalStatus()):
        status.update(lambda: [])
        status.report("a camera was lost")
        status.error("a file was lost")
        status.close()


@pytest.mark.parametrize("encoding", ["ascii", "latin1", "utf-8:strict"])
def test_what_an_encoding_lacks_is_escaped(encoding, tmp_path):
    bundle = os.fsencode(tmp_path) + "/日 ".encode() + ODD
    shutil.copytree(os.fsencode(STEPS), bundle)
    told = shell('$FRAMESTEP inspect "$BUNDLE"', BUNDLE=os.fsdecode(bundle), PYTHONIOENCODING=encoding, COLUMNS="400")
    assert told.returncode == 0, told.stderr
    assert rb"\udcff\udce9" in told.stdout
    listed = shell('$FRAMESTEP inspect "$BUNDLE" --json', BUNDLE=os.fsdecode(bundle), PYTHONIOENCODING=encoding)
    assert json.loads(listed.stdout)["path"] == os.fsdecode(bundle)


def test_files_whose_names_are_no_text_are_read_and_written(tmp_path):
    if tuple(int(part) for part in cv2.__version__.split(".")[:2]) < TAKES_BYTES:
        pytest.skip("this OpenCV takes no such name")
    folder = tmp_path / os.fsdecode(ODD)
    folder.mkdir()
    clip, results, video = (str(folder / name) for name in ("clip.mp4", "results.jsonl", "video.mp4"))
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (32, 32))
    for _ in range(3):
        writer.write(np.zeros((32, 32, 3), np.uint8))
    writer.release()
    (tmp_path / "clip.mp4").rename(clip)
    done = shell(
        '$FRAMESTEP run "$STEPS" --source "$CLIP" --output "$RESULTS" --record "$VIDEO" --json',
        STEPS=str(STEPS), CLIP=clip, RESULTS=results, VIDEO=video,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == {"results": [results], "video": [video]}
    assert [json.loads(line)["source"] for line in Path(results).read_text().splitlines()] == [clip] * 3
    assert Path(video).stat().st_size > 0


@pytest.mark.parametrize("version", ["4.6.0", "4.11.0-dev"])
def test_an_opencv_that_takes_no_such_name_is_asked_for_none(tmp_path, monkeypatch, version):
    monkeypatch.setattr(cv2, "__version__", version)
    clip = tmp_path / os.fsdecode(b"clip " + ODD + b".mp4")
    clip.write_bytes(b"x")
    with pytest.raises(SourceError, match=rf"clip .*\.mp4: OpenCV {version} cannot open a name that is not UTF-8"):
        open_source(clip)


@pytest.mark.parametrize("name", ["pipe.ts", "pipe.jpg"])
def test_a_named_pipe_is_refused_as_what_it_is(name, tmp_path):
    pipe = tmp_path / name
    os.mkfifo(pipe)
    with pytest.raises(SourceError, match=r"pipe\.[a-z]+: is a pipe, not a file; name the camera"):
        open_source(pipe)


@pytest.mark.parametrize("width", [20, 80])
def test_tables_lose_nothing_in_a_narrow_terminal(width):
    long = "/a/path/that/is/longer/than/any/terminal/" + 20 * "folder/" + "library.so"
    tables = {
        "doctor": doctor_table([Finding("native library", "ok", long, "advice")]),
        "inspect": inspect_table(Bundle.open(STEPS)),
    }
    shown = {}
    for name, table in tables.items():
        for columns in (width, 4000):
            console = Console(width=columns, file=StringIO())
            console.print(table)
            shown[name, columns] = sorted("".join(console.file.getvalue().split()))
        assert shown[name, width] == shown[name, 4000]


def test_a_terminal_without_a_size_is_shown_everything():
    shown = {columns: shell(f"$FRAMESTEP inspect {STEPS}", COLUMNS=columns).stdout for columns in ("0", "80")}
    assert shown["0"] == shown["80"] != b""
