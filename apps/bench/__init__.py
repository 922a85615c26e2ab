"""`framestep bench`: latency across stream positions, against what a user would otherwise run."""

from __future__ import annotations

from .bench import BenchOptions, bench
from .report import Report

__all__ = ["BenchOptions", "Report", "bench"]
