"""What was taken from other projects' public headers, against those headers where they are at hand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[2] / "runtime" / "native"
INCLUDE = NATIVE.parents[1] / "include"
CUDA_FOLDERS = (os.environ.get("CUDA_INCLUDE_DIR"), "/usr/local/cuda/include")


def compile_only(*arguments: str | Path, source: str | None = None) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", *arguments]
    done = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def cuda_headers() -> Path:
    folders = [Path(folder) for folder in CUDA_FOLDERS if folder]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:  # it brings them along
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    for folder in folders:
        if (folder / "cuda.h").is_file():
            return folder
    pytest.skip("CUDA's headers are not here (CUDA_INCLUDE_DIR)")


def test_the_cuda_driver_is_called_as_its_header_says():
    compile_only("-I", INCLUDE, "-isystem", cuda_headers(), NATIVE / "cuda_driver.cpp")


def test_the_tensorrt_engine_compiles_against_the_public_headers():
    given = os.environ.get("TENSORRT_INCLUDE_DIR")
    if not given:
        pytest.skip("needs TensorRT's headers, 10.15 or later: name their folder in TENSORRT_INCLUDE_DIR")
    headers = ["-isystem", given, "-isystem", cuda_headers()]
    compile_only("-I", INCLUDE, *headers, NATIVE / "tensorrt_engine.cpp")


def test_entries_of_onnx_runtimes_table_have_their_numbers():
    """`ort_api.h` has numbers in the place of names: the compiler says whether they are those of the real table."""
    given = os.environ.get("ONNXRUNTIME_INCLUDE_DIR")
    if not given:
        pytest.skip("needs ONNX Runtime's header: name the folder of onnxruntime_c_api.h in ONNXRUNTIME_INCLUDE_DIR")
    text = (NATIVE / "ort_api.h").read_text()
    entries = [(name, int(number)) for number, name in re.findall(r"\bX\((\d+), (\w+),", text)]
    entries.append(("GetErrorMessage", 2))
    assert len(entries) > 40
    checks = [
        f'static_assert(offsetof(OrtApi, {name}) == {number} * sizeof(void*), "{name}");' for name, number in entries
    ]
    used = re.search(r"ORT_API_VERSION_USED = (\d+);", text)
    assert used is not None
    checks.append(f'static_assert(ORT_API_VERSION >= {used[1]}, "a header of that version or a later one");')
    operator = re.search(r"struct OrtCustomOp \{\n(.*?)\};", text, re.DOTALL)
    for place, member in enumerate(re.findall(r"\(\*(\w+)\)\(", operator[1]) if operator else []):
        checks.append(f'static_assert(offsetof(OrtCustomOp, {member}) == {place + 1} * sizeof(void*), "{member}");')
    source = "#include <cstddef>\n#include <onnxruntime_c_api.h>\n" + "\n".join(checks)
    compile_only("-isystem", given, "-x", "c++", "-", source=source)
