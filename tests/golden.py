"""The golden checkpoint and its outputs, computed by the reference implementation; see tests/data/README.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np

CHECKPOINT = Path(__file__).parent / "data" / "streamformer-tiny"
TOLERANCE = 2e-4


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
