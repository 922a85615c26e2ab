"""The time to fit a frame to the model's 224 x 224, native on one core and in Python.

    cmake -S runtime/native -B build/native-tests -DFRAMESTEP_TESTS=ON
    cmake --build build/native-tests --target framestep_parts
    python benchmarks/native_preprocess.py build/native-tests/tests/libframestep_parts.so

Four frames take turns, so that none is still in the inner caches. Medians.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from framestep.runtime.manifest import FrameSpec
from framestep.runtime.preprocess import Preprocess

SIZES = ((480, 640), (720, 1280), (1080, 1920), (2160, 3840))
FRAMES, RUNS = 4, 400
CROP, RGB = 0, 0
SIMD = ("baseline", "avx2", "avx512")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    library = ctypes.CDLL(str(parser.parse_args().library.resolve()))
    simds = range(library.parts_fastest_simd() + 1)
    names = [f"native, {SIMD[simd]}" for simd in simds]
    print(f"| frame | {' | '.join(names)} | Python |\n| --- |{' --- |' * (len(names) + 1)}")
    for height, width in SIZES:
        frames = list(np.random.default_rng(0).integers(0, 256, (FRAMES, height, width, 3), np.uint8))
        out = np.empty((224, 224, 3), np.uint8)
        times = [milliseconds(native(library, simd, frames, out)) for simd in simds]
        fit = Preprocess(FrameSpec(224, 224))
        turns = itertools.cycle(frames)
        times.append(milliseconds(lambda fit=fit, turns=turns, out=out: fit(next(turns), out)))
        print(f"| {width}x{height} | {' | '.join(f'{ms:.3f} ms' for ms in times)} |")


def native(library: ctypes.CDLL, simd: int, frames: list[np.ndarray], out: np.ndarray) -> Callable[[], None]:
    handle, text = ctypes.c_void_p(), ctypes.c_void_p()
    height, width = frames[0].shape[:2]
    library.parts_preprocess_open(224, 224, CROP, simd, ctypes.byref(handle), ctypes.byref(text))
    stride, target = ctypes.c_int64(width * 3), ctypes.c_void_p(out.ctypes.data)
    pointers = itertools.cycle([ctypes.c_void_p(frame.ctypes.data) for frame in frames])

    def fit() -> None:
        library.parts_preprocess_fit(handle, next(pointers), width, height, stride, RGB, target, ctypes.byref(text))

    return fit


def milliseconds(fit: Callable[[], None]) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        fit()
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


if __name__ == "__main__":
    main()
