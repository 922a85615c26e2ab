"""The parts of `benchmarks/gpu_suite.py`, one section each."""
