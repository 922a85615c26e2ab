"""INT8 on a processor without VNNI, in an emulator.

The one instruction for products of 8 bits that such a processor has saturates at 16 bits, and what is built on it gives
wrong sums without a word.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import framestep

ROOT = Path(framestep.__file__).parent
BUNDLE = ROOT / "tests" / "data" / "steps.bundle"
EMULATOR = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
PROGRAM = """
import sys
import numpy as np
import framestep
with framestep.load(sys.argv[1], engine=sys.argv[2], precision="int8", outputs=("features", "pooled"), threads=1) as session:
    stream = session.open_stream()
    results = [stream.step(frame.rgb) for frame in framestep.open_source("synthetic:frames=6")]
np.savez(sys.argv[3], **{name: np.stack([result[name] for result in results]) for name in ("features", "pooled")})
"""


@pytest.mark.skipif(EMULATOR is None, reason="qemu-user is not installed")
@pytest.mark.parametrize("engine", ["onnxruntime", "onnxruntime:plain"])
def test_int8_is_the_same_on_a_processor_without_vnni(engine: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for name, command in (("here", []), ("there", [EMULATOR, "-cpu", "Haswell"])):
        words = [*command, sys.executable, "-c", PROGRAM, BUNDLE, engine, tmp_path / f"{name}.npz"]
        done = subprocess.run(list(map(str, words)), env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "here.npz") as here, np.load(tmp_path / "there.npz") as there:
        for name in here.files:  # but for a number that lies between two integers and is rounded to the other
            difference = np.sqrt(np.mean((here[name] - there[name]) ** 2) / np.mean(here[name] ** 2))
            assert difference < 2e-3, name
