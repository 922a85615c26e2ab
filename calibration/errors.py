"""The error of this folder."""

from __future__ import annotations

from ..runtime.errors import FramestepError


class CalibrationError(FramestepError):
    """Video that cannot be calibrated on, a bundle that cannot be quantized, or an accuracy that cannot be reached."""
