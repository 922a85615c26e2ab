"""The golden checkpoint and its outputs, computed by the reference implementation; see tests/data/README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np

CHECKPOINT = Path(__file__).parent / "data" / "streamformer-tiny"
TOLERANCE = 2e-4


def load() -> dict[str, np.ndarray]:
    with np.load(CHECKPOINT / "golden.npz") as arrays:
        return {name: arrays[name] for name in arrays.files}


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert float(np.abs(found - expected).max()) <= tolerance
