"""Calibration: bundle and sample video to a quantized bundle."""
