"""The native library's inner parts, built for tests."""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from framestep.runtime.library import library

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "native-tests"  # of all tests, kept, so that a later run compiles only what changed
MAX_DEPTH = 64
CPU = Path("/proc/cpuinfo")


class Parts:
    """The test library; a call that fails raises Refused."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.parts_allocations.restype = ctypes.c_size_t

    def __call__(self, name: str, *arguments: Any) -> bytes:
        text = ctypes.c_void_p()
        status = getattr(self.library, f"parts_{name}")(*arguments, ctypes.byref(text))
        content = ctypes.string_at(text) if text else b""
        self.library.parts_free(text)
        if status:
            raise Refused(status, content.decode())
        return content

    def json(self, text: bytes) -> str:
        return self("json", text, ctypes.c_size_t(len(text)), ctypes.c_size_t(MAX_DEPTH)).decode()

    def external_files(self, path: Path) -> list[str]:
        return json.loads(self("external_files", os.fsencode(path)))


class Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        assert "\n" not in message


@contextmanager
def building() -> Iterator[None]:
    """Alone in the build folder, where several processes run tests."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build_parts() -> Parts:
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    configure = ["cmake", "-S", ROOT / "runtime" / "native", "-B", BUILD, "-DFRAMESTEP_TESTS=ON"]
    with building():
        for command in (configure, ["cmake", "--build", BUILD, "--target", "framestep_parts", "--parallel", "2"]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return Parts(BUILD / "tests" / "libframestep_parts.so")


def cpu_has(*sets: str) -> bool:
    """Whether this processor has sets of instructions, by Linux's names."""
    return CPU.is_file() and set(sets) <= set(CPU.read_text("utf-8").split())


def cpu_multiplies_integers() -> bool:
    """Whether products of INT8 are operators of ours here: with AVX512-VNNI, and with AVX2 where no VNNI is."""
    return cpu_has("avx512_vnni") or (cpu_has("avx2", "fma") and not cpu_has("avx_vnni"))


def own_operators(session: Any) -> dict[str, int]:
    """How many parts of each graph of a session operators of ours run."""
    native, info, found = library(), library().new("fs_graph_info"), {}
    while native.functions.fs_graph_describe(session._engine._session, len(found), info) == 0:
        found[native.text(info.name)] = info.own_operators
    return found
