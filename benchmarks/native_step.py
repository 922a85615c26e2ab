"""What a step costs outside ONNX Runtime's own run, and how steady it is beside busy Python threads.

    python benchmarks/native_step.py BUNDLE [--steps 5000] [--runs 5] [--output result.json]

Overhead: frames of 1280x720 from a C loop on one thread of ONNX Runtime; the time of `fs_step` less that of the
engine's run, and how often the library asked for memory in 200 steps (tests/runtime/allocations.c). Jitter: p99.9 over
the steps while three Python threads compute in the same process, for the C loop on its own thread and for the loop in
Python over `onnxruntime` (python_loop.py), each `--runs` times; the medians of those are compared. A run in Python
takes minutes: a call adds its runs to those that the output file has.

The three threads hold Python's lock in turns, so they fill one core. The C loop wants the other: with less than two
cores to themselves both loops wait for the operating system, and their ratio says nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from python_loop import PythonLoop

from framestep.runtime.bundle import Bundle
from framestep.runtime.engines.onnxruntime import shared_library
from framestep.runtime.library import HEADER, LIBRARY, library

CAMERA = (720, 1280, 3)
BUSY_THREADS = 3


class NativeLoop:
    """A session driven by native_loop.c."""

    def __init__(self, bundle: Path, precision: str, folder: Path) -> None:
        helper = folder / "native_loop.so"
        source = Path(__file__).parent / "native_loop.c"
        command = ["gcc", "-O2", "-shared", "-fPIC", f"-I{HEADER.parent}", str(source), "-o", str(helper)]
        subprocess.run([*command, f"-L{LIBRARY.parent}", "-lframestep", f"-Wl,-rpath,{LIBRARY.parent}"], check=True)
        self.native = native = library()
        native.ffi.cdef(
            "int run_loop(fs_session, fs_stream, const uint8_t *, int, int, long, double *, double *);", override=True
        )
        self.helper = native.ffi.dlopen(str(helper))
        options = native.new("fs_session_options")
        texts = [native.ffi.new("char[]", text.encode()) for text in (shared_library(), precision, "cpu")]
        options.library, options.precision, options.device = texts
        options.threads = 1
        session, stream = native.ffi.new("fs_session *"), native.ffi.new("fs_stream *")
        native.check(native.functions.fs_session_open(os.fsencode(bundle), options, session))
        native.check(native.functions.fs_stream_open(session[0], stream))
        self.session, self.stream = session[0], stream[0]

    def run(self, rgb: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Milliseconds of each step, and of them those outside the engine's run. The GIL is free meanwhile."""
        spent, outside = np.zeros(steps), np.zeros(steps)
        pointers = [self.native.ffi.cast("double *", array.ctypes.data) for array in (spent, outside)]
        pixels = self.native.ffi.cast("uint8_t *", rgb.ctypes.data)
        height, width, _ = rgb.shape
        self.native.check(self.helper.run_loop(self.session, self.stream, pixels, width, height, steps, *pointers))
        return spent, outside

    def run_plainly(self, rgb: np.ndarray, steps: int) -> np.ndarray:
        """Milliseconds of each step, with nothing between them."""
        spent = np.zeros(steps)
        arguments = (self.native.ffi.cast("double *", spent.ctypes.data), self.native.ffi.NULL)
        pixels = self.native.ffi.cast("uint8_t *", rgb.ctypes.data)
        height, width, _ = rgb.shape
        self.native.check(self.helper.run_loop(self.session, self.stream, pixels, width, height, steps, *arguments))
        return spent


def run_python(loop: PythonLoop, rgb: np.ndarray, steps: int) -> np.ndarray:
    from time import perf_counter

    spent = np.zeros(steps)
    for step in range(steps):
        start = perf_counter()
        loop.step(rgb)
        spent[step] = (perf_counter() - start) * 1e3
    return spent


class Busy:
    """Python threads that compute and never wait."""

    def __enter__(self) -> Busy:
        self._stop = False
        self._threads = [threading.Thread(target=self._compute, daemon=True) for _ in range(BUSY_THREADS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *given: object) -> None:
        self._stop = True
        for thread in self._threads:
            thread.join()

    def _compute(self) -> None:
        number = 1
        while not self._stop:
            number = (number * 48271) % 2147483647


def allocations(bundle: Path, folder: Path) -> int:
    """How often the library asks for memory in 200 steps after the first ones."""
    source = Path(__file__).parents[1] / "tests" / "runtime" / "allocations.c"
    program = folder / "allocations"
    command = [
        "gcc",
        "-O1",
        f"-I{HEADER.parent}",
        str(source),
        "-o",
        str(program),
        f"-L{LIBRARY.parent}",
        "-lframestep",
    ]
    subprocess.run([*command, f"-Wl,-rpath,{LIBRARY.parent}", "-ldl"], check=True)
    done = subprocess.run([program, bundle, shared_library()], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[1])


def machine() -> dict[str, Any]:
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    return {
        "cpu": model.partition(": ")[2],
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": version("onnxruntime"),
    }


def summary(spent: np.ndarray) -> dict[str, float]:
    p50, p99, p999 = np.percentile(spent, [50, 99, 99.9])
    return {"p50_ms": round(float(p50), 4), "p99_ms": round(float(p99), 4), "p99.9_ms": round(float(p999), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    frame = Bundle.open(given.bundle).manifest.frame
    small = np.random.default_rng(0).integers(0, 256, (frame.height, frame.width, 3), np.uint8)
    large = np.random.default_rng(0).integers(0, 256, CAMERA, np.uint8)
    found: dict[str, Any] = {"machine": machine(), "steps": given.steps}
    jitter: dict[str, list[float]] = {"native": [], "python": []}
    if given.output is not None and given.output.exists():
        before = json.loads(given.output.read_text())
        if before["steps"] != given.steps:
            parser.error(f"{given.output} has runs of {before['steps']} steps")
        jitter = before["p99.9_ms_beside_busy_threads"]
    with tempfile.TemporaryDirectory() as folder:
        native = NativeLoop(given.bundle, given.precision, Path(folder))
        python = PythonLoop(given.bundle, given.precision, ("features", "pooled"), 1)
        native.run(large, 50)
        found["outside_run_1280x720"] = summary(native.run(large, 1000)[1])
        found["allocations_in_200_steps"] = allocations(given.bundle, Path(folder))
        native.run_plainly(small, 50), run_python(python, small, 50)
        with Busy():
            for _ in range(given.runs):  # in turns, so that a drift of the machine meets both
                jitter["native"].append(float(np.percentile(native.run_plainly(small, given.steps), 99.9)))
                jitter["python"].append(float(np.percentile(run_python(python, small, given.steps), 99.9)))
    medians = {name: float(np.median(values)) for name, values in jitter.items()}
    found["p99.9_ms_beside_busy_threads"] = jitter
    found["median_p99.9_ms"] = medians
    found["ratio"] = medians["native"] / medians["python"]
    print(json.dumps(found, indent=1))
    if given.output is not None:
        given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
