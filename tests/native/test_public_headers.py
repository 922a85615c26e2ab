"""What was taken from other projects' public headers, against those headers where they are at hand."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from framestep.runtime.bundle import Bundle, file_entry
from framestep.runtime.engines.engine_files import named, source_key
from framestep.runtime.manifest import EngineFile

STEPS = Path(__file__).parents[1] / "data" / "steps.bundle"
TENSORRT_TYPES = {"float32": 0, "uint8": 5, "int64": 8}  # nvinfer1::DataType
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


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory) -> Path:
    """Folder of the program that drives the TensorRT engine over stand-ins."""
    given = os.environ.get("TENSORRT_INCLUDE_DIR")
    if not given or shutil.which("cmake") is None:
        pytest.skip("needs cmake and TensorRT's headers, 10.15 or later: name their folder in TENSORRT_INCLUDE_DIR")
    folder = tmp_path_factory.mktemp("rehearsal")
    options = ["-DFRAMESTEP_TESTS=ON", "-DFRAMESTEP_TENSORRT=ON", "-DFRAMESTEP_SANITIZE=address,undefined"]
    headers = [f"-DTENSORRT_INCLUDE_DIR={given}", f"-DCUDA_INCLUDE_DIR={cuda_headers()}"]
    build = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O0 -g1"]
    configure = ["cmake", "-S", NATIVE, "-B", folder, *options, *headers, *build]
    for command in (configure, ["cmake", "--build", folder, "--target", "framestep_rehearsal", "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "tests"


def stand_in_bundle(path: Path, in_place: bool) -> Path:
    """The golden steps with engines for the stand-in (see nvinfer.cpp): their files list an engine's tensors."""
    shutil.copytree(STEPS, path)
    bundle = Bundle.open(path)
    flat = bundle.manifest.at("fp32")
    header = Path(os.environ["TENSORRT_INCLUDE_DIR"], "NvInferVersion.h").read_text()
    major = re.search(r"define (?:TRT_MAJOR_ENTERPRISE|NV_TENSORRT_MAJOR) +(\d+)", header)
    assert major is not None
    states = {state.name: state for state in flat.states}
    engines = {}
    for name in ("backbone", "label"):
        graph, lines = flat.graphs[name], []
        for port, way in [*((port, "in") for port in graph.inputs), *((port, "out") for port in graph.outputs)]:
            row = math.prod(n for n in port.shape if isinstance(n, int))
            lines.append(f"{port.name} {TENSORRT_TYPES[port.dtype]} {way} {row} -")
        for use in graph.states:
            row = math.prod(states[use.state].shape[1:])
            lines.append(f"{use.input} 0 in {row} -")
            lines.append(f"{use.output} 0 out {row} {use.input if in_place else '-'}")
        key = source_key(bundle, graph)
        entry = EngineFile(name, "fp32", "tensorrt", f"{major[1]}.99.1.2", ("8.7",), 12, key, 0, "", labels=16)
        file = named(entry)
        (path / "engines").mkdir(exist_ok=True)
        (path / file).write_text("\n".join(lines))
        written = file_entry(path / file)
        engines[file] = replace(entry, bytes=written.bytes, sha256=written.sha256)
    bundle.rewrite_manifest(replace(bundle.manifest, engines=engines))
    return path


@pytest.mark.parametrize("in_place", [True, False])
def test_the_tensorrt_engine_binds_launches_and_gives_back_as_it_should(rehearsal, tmp_path, in_place):
    bundle = stand_in_bundle(tmp_path / "steps.bundle", in_place)
    command = [rehearsal / "framestep_rehearsal", bundle, rehearsal / "libstand_in_nvinfer.so", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "ok\n"


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
