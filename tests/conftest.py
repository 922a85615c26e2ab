"""What tests in several folders share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import the modules of this folder
if not Path("/dev/nvidiactl").exists():
    # Triton's own functions are made when it is first imported, by whichever test does that; they must be interpreted
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def mjpeg_camera() -> Iterator[Any]:
    """A camera that serves MJPEG over HTTP on loopback, started; see mjpeg_camera.py."""
    from mjpeg_camera import MjpegCamera

    camera = MjpegCamera()
    camera.start()
    yield camera
    camera.stop()


@pytest.fixture(scope="session")
def golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint exported with window 16."""
    return _export_golden(tmp_path_factory.mktemp("golden16"), 16)


@pytest.fixture(scope="session")
def long_golden_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden checkpoint exported with window 40."""
    return _export_golden(tmp_path_factory.mktemp("golden40"), 40)


def _export_golden(folder: Path, window: int) -> Path:
    import golden

    from framestep.export.checkpoint import read_checkpoint
    from framestep.export.export import ExportOptions, export_streamformer

    checkpoint = read_checkpoint(str(golden.CHECKPOINT))
    return export_streamformer(checkpoint, folder / "golden.bundle", ExportOptions(window=window)).path
