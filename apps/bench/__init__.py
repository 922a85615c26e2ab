"""`framestep bench`: latency across stream positions, against what a user would otherwise run."""

from __future__ import annotations

from .bench import bench
from .options import BenchOptions
from .report import Report

__all__ = ["BenchOptions", "Report", "bench"]
