"""A V4L2 camera for programs that the tests start: native/v4l2_stand_in.c, preloaded."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np

DEVICE = "/dev/video0"
WIDTH, HEIGHT = 64, 48
SOURCE = Path(__file__).parent / "native" / "v4l2_stand_in.c"


def yuyv_picture() -> np.ndarray:
    """uint8 [48, 64, 2]: soft waves in luma and in both chromas, over their whole range."""
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    luma = 126 + 110 * np.sin(x / 7 + y / 11)
    chroma = np.where(x % 2 == 0, 128 + 112 * np.cos(x / 19), 128 + 112 * np.sin(y / 13))
    return np.stack([luma, chroma], axis=2).round().astype(np.uint8)


class StandIn:
    """Compiled, with the picture above to send.

    Args:
        folder: an empty one for it.
    """

    def __init__(self, folder: Path) -> None:
        self._library = folder / "v4l2_stand_in.so"
        self._picture = folder / "picture"
        self._picture.write_bytes(yuyv_picture().tobytes())
        command = ["gcc", "-shared", "-fPIC", "-O1", str(SOURCE), "-o", str(self._library), "-ldl", "-lpthread"]
        subprocess.run(command, check=True)

    def environment(self, **settings: object) -> dict[str, str]:
        """For the program: the settings that the C file lists, by their names in lower case."""
        usual = {"device": DEVICE, "formats": "YUYV,MJPG", "frame": self._picture, "size": f"{WIDTH}x{HEIGHT}"}
        named = {**usual, "frames": 30, "period_us": 2000, **settings}
        return {"LD_PRELOAD": str(self._library), **{f"STAND_IN_{key.upper()}": str(named[key]) for key in named}}
