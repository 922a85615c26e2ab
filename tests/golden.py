"""The golden checkpoint and its outputs, computed by the reference implementation; see tests/data/README.md."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnxruntime

CHECKPOINT = Path(__file__).parent / "data" / "streamformer-tiny"
TOLERANCE = 2e-4

# Engine, precision and tolerance with which the steps of data/steps.npz are found again: ONNX Runtime's own operators
# recorded them on x86-64. Others, and its own elsewhere or in an earlier version, sum in another order; of INT8 some
# numbers then round to the next integer.
VERSION = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
SUMMED_ALIKE = platform.machine() == "x86_64" and VERSION >= (1, 31)
RECORDED_STEPS = [
    ("onnxruntime:plain", "fp32", 1e-6 if SUMMED_ALIKE else 2e-5),
    ("onnxruntime:plain", "int8", 1e-6 if SUMMED_ALIKE else 0.1),
    ("onnxruntime", "fp32", 2e-5),
    ("onnxruntime", "int8", 0.1),
]


def real_footage() -> Path | None:
    """325 frames of a film, where the folder that has it lies beside the checkout."""
    found = [folder / "shared" / "videos" / "nasa_13013.mp4" for folder in Path(__file__).resolve().parents[1:3]]
    return next((path for path in found if path.is_file()), None)


def load() -> dict[str, np.ndarray]:
    with np.load(CHECKPOINT / "golden.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert float(np.abs(found - expected).max()) <= tolerance
