"""What a session does to the process that it is in, and to the files around it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import framestep
from framestep.runtime.engines.onnxruntime import shared_library
from framestep.runtime.errors import OutputError
from framestep.runtime.library import LIBRARY

STEPS = Path(__file__).parents[1] / "data" / "steps.bundle"
KEPT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")  # and nothing that tells ONNX Runtime of a test

LOAD = f"import framestep; session = framestep.load({str(STEPS)!r}, threads=1)"
ONNX_RUNTIME = "import framestep, onnxruntime"
# The native library by itself, as a program in C has it.
NATIVE = (
    f"import ctypes; native, found = ctypes.CDLL({str(LIBRARY)!r}), ctypes.c_int();"
    f" assert native.fs_device_available({os.fsencode(shared_library())!r}, b'cpu', ctypes.byref(found)) == 0"
)
FORK = """
import os, signal
child = os.fork()
if child:
    assert os.waitpid(child, 0)[1] == 0
else:
    signal.alarm(10)
"""


def run_apart(code: str, home: Path) -> subprocess.CompletedProcess[str]:
    """Python in a user's environment, with `home` and nothing else of this one."""
    environment = {name: os.environ[name] for name in KEPT if name in os.environ} | {"HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=environment
    )


@pytest.mark.parametrize("start", [LOAD, ONNX_RUNTIME, NATIVE], ids=["session", "import", "native"])
def test_nothing_is_reported_or_left_in_the_users_home(start, tmp_path):
    done = run_apart(start, tmp_path)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("start", [LOAD, NATIVE], ids=["session", "native"])
def test_a_child_that_was_forked_from_a_process_with_onnx_runtime_comes_to_its_end(start, tmp_path):
    done = run_apart(start + FORK, tmp_path)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_memory_is_saved_and_continued_where_the_bundle_is_gone(tmp_path):
    bundle = shutil.copytree(STEPS, tmp_path / "steps.bundle")
    black = np.zeros((8, 8, 3), np.uint8)
    with framestep.load(bundle, streams=2) as session:
        stream, other = session.open_stream(), session.open_stream()
        stream.step(black)
        shutil.rmtree(bundle)
        stream.save_state(tmp_path / "stream.state")
        other.load_state(tmp_path / "stream.state")
        ours, others = stream.step(black), other.step(black)
        assert others.position == 1
        assert all(np.array_equal(ours[name], others[name]) for name in ours)


def save_natively(session: framestep.Session, path: Path) -> None:
    """As a program in C does."""
    engine = session._engine
    engine._library.check(engine._library.functions.fs_state_save(engine._streams[0], os.fsencode(path)))


@pytest.fixture(scope="module")
def session() -> Iterator[framestep.Session]:
    with framestep.load(STEPS) as opened:
        yield opened


@pytest.fixture(params=["Python", "C"])
def save(request, session):
    """Saves a stream's memory at a path, in both ways that there are."""
    with session.open_stream() as stream:
        yield stream.save_state if request.param == "Python" else lambda path: save_natively(session, path)


def test_a_saved_state_never_takes_the_place_of_a_device_or_a_pipe(save, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OutputError, match=r"pipe: cannot be written: is a device or a pipe; name a file"):
        save(pipe)
    assert pipe.is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_saved_state_goes_where_a_link_leads(save, tmp_path):
    (tmp_path / "disk").mkdir()
    place, link = tmp_path / "disk" / "a.state", tmp_path / "link.state"
    place.write_bytes(b"before")
    link.symlink_to(place)
    save(link)
    assert link.is_symlink()
    assert place.stat().st_size > 1000
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["a.state"]


def test_a_state_may_have_the_longest_name_that_there_is(save, tmp_path):
    place = tmp_path / ("n" * 255)
    save(place)
    assert [path.name for path in tmp_path.iterdir()] == [place.name]


def test_the_reason_stands_behind_the_longest_path(save):
    with pytest.raises(OutputError, match=r"cannot be written: No such file or directory$"):
        save(Path("/nowhere" + 15 * ("/" + 200 * "n")))


# With a stream of a session, and `path`, where its memory or a bundle goes.
SAVES = {
    "Python": "stream.save_state(path)",
    "C": "native = session._engine._library\n"
    "native.check(native.functions.fs_state_save(session._engine._streams[0], path.encode()))",
    "manifest": "Path(path).write_text((STEPS / 'manifest.json').read_text())\n"
    "bundle = Bundle.open(STEPS)\n"
    "Bundle(Path(path).parent, bundle.manifest).rewrite_manifest(bundle.manifest)",
}


@pytest.fixture(scope="module")
def order_of_writes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], list[list[str]]]:
    """Runs code that writes the file `path`, and gives what it synced and renamed."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    library = tmp_path_factory.mktemp("durable") / "durable.so"
    source = Path(__file__).parent / "durable.c"
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True)

    def run(code: str, path: Path) -> list[list[str]]:
        script = f"""
import framestep
from pathlib import Path
from framestep.runtime.bundle import Bundle, BundleWriter
STEPS, path = Path({str(STEPS)!r}), {str(path)!r}
{code}
"""
        environment = {**os.environ, "LD_PRELOAD": str(library)}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return [line.split() for line in done.stderr.splitlines()]

    return run


@pytest.mark.parametrize("save", SAVES)
def test_a_file_is_on_the_disk_before_it_has_its_name(order_of_writes, save, tmp_path):
    path = tmp_path / ("manifest.json" if save == "manifest" else "a.state")
    found = order_of_writes(f"session = framestep.load(STEPS)\nstream = session.open_stream()\n{SAVES[save]}", path)
    (first, temporary), renamed, last = found
    assert first == "sync" and Path(temporary).parent == tmp_path
    assert renamed == ["rename", temporary, "to", str(path)]
    assert last == ["sync", str(tmp_path)]  # else the name may be gone after a power cut


def test_a_bundle_is_on_the_disk_before_it_has_its_name(order_of_writes, tmp_path):
    code = """
with BundleWriter(path) as writer:
    (writer.folder / "weights.bin").write_bytes(b"weights")
    writer.finish(Bundle.open(STEPS).manifest)
"""
    found = order_of_writes(code, tmp_path / "new.bundle")
    at = next(at for at, line in enumerate(found) if line[0] == "rename" and line[3] == str(tmp_path / "new.bundle"))
    folder = found[at][1]
    assert {f"{folder}/weights.bin", f"{folder}/manifest.json", folder} <= {line[1] for line in found[:at]}
    assert found[at + 1 :] == [["sync", str(tmp_path)]]


def test_labels_are_on_the_disk_before_a_manifest_names_them(order_of_writes, tmp_path):
    bundle = shutil.copytree(STEPS, tmp_path / "steps.bundle")
    code = """
from dataclasses import replace
from framestep.runtime.bundle import file_entry
(Path(path) / "new.safetensors").write_bytes(b"labels")
bundle = Bundle.open(path)
files = {**bundle.manifest.files, "new.safetensors": file_entry(Path(path) / "new.safetensors")}
bundle.rewrite_manifest(replace(bundle.manifest, files=files))
"""
    first, *rest = order_of_writes(code, bundle)
    assert first == ["sync", str(bundle / "new.safetensors")]
    assert [line[0] for line in rest] == ["sync", "rename", "sync"]
