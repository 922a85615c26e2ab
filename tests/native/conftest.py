"""What tests of the native library share: its parts, the page for C and C++ programs and the examples, built once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from c_api_page import Reader
from native_parts import Parts, build_parts
from v4l2_stand_in import StandIn


@pytest.fixture(scope="session")
def parts() -> Parts:
    return build_parts()


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    return StandIn(tmp_path_factory.mktemp("camera"))


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory, stand_in: StandIn) -> Reader:
    """Someone who has pasted every command of docs/c-api.md."""
    for tool in ("cmake", "g++", "pkg-config", "bash"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    return Reader(tmp_path_factory.mktemp("reader"), stand_in.environment(frames=0))


@pytest.fixture(scope="session")
def examples(reader: Reader) -> Path:
    """Folder of the examples' programs."""
    folder = reader.folder / "build" / "examples"
    assert (folder / "camera").is_file(), reader.results[-1].stderr
    return folder
