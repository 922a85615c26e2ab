"""The C functions from many threads and with every call failing in its turn, under the sanitizers; see sanitize.sh.

The longer runs, over ONNX Runtime and under valgrind, are made by hand with the same script.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "runtime" / "native" / "tests" / "sanitize.sh"


@pytest.mark.parametrize("kind", ["thread", "address"])
def test_what_is_around_engines_is_clean(kind, tmp_path):
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("needs cmake and g++")
    flag = "-fsanitize=" + kind
    program = ["g++", flag, "-x", "c++", "-", "-o", tmp_path / "probe"]
    if subprocess.run(program, input=b"int main() { return 0; }", capture_output=True, check=False).returncode != 0:
        pytest.skip(f"this compiler has no {kind} sanitizer")
    done = subprocess.run(["bash", SCRIPT, kind, "stress"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "ok\n"
