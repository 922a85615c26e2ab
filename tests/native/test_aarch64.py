"""The native library compiles for 64-bit Arm, where Debian's cross compiler is (apt-get install g++-aarch64-linux-gnu).

Whole sources would take a minute: here are those with a part for each processor, and all else that is x86-64's alone is
looked for in the others' text.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from native_parts import ROOT

NATIVE = ROOT / "runtime" / "native"
COMPILER = "aarch64-linux-gnu-g++"
OF_X86 = re.compile(r"__x86_64__|immintrin|cpuid\.h|__builtin_cpu_supports|\b_mm\d*_\w+")
PARTS = sorted(path.name for path in NATIVE.glob("*.cpp") if "__x86_64__" in path.read_text("utf-8"))


@pytest.mark.parametrize("name", PARTS)
def test_what_has_parts_for_x86_compiles_for_arm_too(name, tmp_path):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"needs {COMPILER}")
    # char is unsigned there, which -Wextra says of comparisons; optimised, as some warnings come of that alone
    command = [COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-I", str(ROOT / "include")]
    done = subprocess.run([*command, "-c", NATIVE / name, "-o", tmp_path / "out.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_others_have_nothing_of_x86():
    assert len(PARTS) >= 4
    files: list[Path] = [*NATIVE.glob("*.cpp"), *NATIVE.glob("*.h")]
    found = {path.name for path in files if OF_X86.search(path.read_text("utf-8"))}
    assert found == {*PARTS, "processor.h"}  # which those include
