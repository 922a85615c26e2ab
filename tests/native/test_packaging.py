"""What a source archive and a pkg-config file have to say, wherever the library is installed."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "runtime" / "native"


def test_a_source_archive_has_every_file_of_the_native_build():
    tree = ast.parse((ROOT / "setup.py").read_text())
    (patterns,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "SOURCES"
    )
    files = {path.name for path in NATIVE.iterdir() if path.is_file() and path.suffix != ".so"}
    assert files == {path.name for pattern in patterns for path in NATIVE.glob(pattern)}


def test_a_wheel_has_the_command_as_a_module_and_no_setup(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    files = {path.name for path in (tmp_path / "framestep").glob("*.py")}
    assert files == {"__init__.py", "__main__.py"}
    assert (tmp_path / "framestep" / "include" / "framestep.h").is_file()


@pytest.mark.parametrize("source", ["own_operators", "attention", "block_products", "grouped_products"])
def test_clang_takes_what_is_written_for_instruction_sets_and_for_onnx_runtime(source):
    if shutil.which("clang++") is None:
        pytest.skip("needs clang++")
    command = [
        "clang++",
        "-std=c++17",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        f"-I{NATIVE}",
        f"-I{ROOT}/include",
    ]
    done = subprocess.run([*command, NATIVE / f"{source}.cpp"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A build folder: what CMake finds of the compiler it keeps there."""
    return tmp_path_factory.mktemp("build")


@pytest.mark.parametrize("libraries", ["lib", "lib64", "lib/x86_64-linux-gnu"])
def test_the_pkg_config_file_finds_its_prefix(build, tmp_path, libraries):
    for tool in ("cmake", "pkg-config"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    prefix = tmp_path / "prefix"
    configure = ["cmake", "-S", str(NATIVE), "-B", str(build), f"-DCMAKE_INSTALL_LIBDIR={libraries}"]
    subprocess.run(configure, check=True, capture_output=True)
    folder = prefix / libraries / "pkgconfig"
    folder.mkdir(parents=True)
    shutil.copy(build / "framestep.pc", folder)
    places = []
    for variable in ("prefix", "libdir", "includedir"):
        command = ["pkg-config", f"--variable={variable}", str(folder / "framestep.pc")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        places.append(Path(said).resolve())
    assert places == [prefix, prefix / libraries, prefix / "include"]


@pytest.mark.parametrize(
    "version, headers, found", [("10.15", ["cuda.h"], False), ("10.14", None, False), ("10.15", None, True)]
)
def test_the_tensorrt_engine_is_built_where_all_headers_are(build, tmp_path, version, headers, found):
    """A system may have some of CUDA's headers alone; then the library is built without the engine."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    major, minor = version.split(".")
    (tmp_path / "NvInferRuntime.h").touch()
    (tmp_path / "NvInferVersion.h").write_text(
        f"#define NV_TENSORRT_MAJOR {major}\n#define NV_TENSORRT_MINOR {minor}\n"
    )
    for header in headers or ["cuda.h", "cuda_runtime_api.h"]:
        (tmp_path / header).touch()
    folders = [f"-D{name}_INCLUDE_DIR={tmp_path}" for name in ("TENSORRT", "CUDA")]
    said = []
    for wanted in ("AUTO", "ON"):
        configure = ["cmake", "-S", NATIVE, "-B", build, *folders, f"-DFRAMESTEP_TENSORRT={wanted}"]
        said.append(subprocess.run(configure, capture_output=True, text=True, check=False))
    assert [done.returncode == 0 for done in said] == [True, found]
    assert ("with the TensorRT engine" in said[0].stdout) == found
    assert found or "FRAMESTEP_TENSORRT=ON needs the headers of TensorRT 10.15 or later" in said[1].stderr
