"""The GPU suite's command without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SUITE = ROOT / "benchmarks" / "gpu_suite.py"
# All sections in the command's own process, where the suite gives each one of its own: seconds of imports apart.
ONE_PROCESS = """
import argparse, importlib.util, json, sys
found = importlib.util.spec_from_file_location("gpu_suite", sys.argv.pop(1))
suite = importlib.util.module_from_spec(found)
found.loader.exec_module(suite)

def start(name, seconds, gpu, work, output):
    suite.run_section(argparse.Namespace(section=name, seconds=seconds, work=work, output=output, rehearse=not gpu))
    return json.loads((output / f"{name}.json").read_text())

suite._start = start
sys.exit(suite.main())
"""


def run_suite(*arguments: Any, suite: Path = SUITE, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it."""
    return _run([suite, *arguments], {}, cwd)


def rehearse(output: Path, *names: str, suite: Path = SUITE, cwd: Path | None = None) -> None:
    """Run sections with small sizes, and expect that all is well."""
    listed = [word for name in names for word in ("--only", name)]
    done = _run(["-c", ONE_PROCESS, suite, "--rehearse", "-o", output, *listed], {"TRITON_INTERPRET": "1"}, cwd)
    assert done.returncode == 0, done.stdout + done.stderr


def _run(words: list[Any], more: dict[str, str], cwd: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **more}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)
