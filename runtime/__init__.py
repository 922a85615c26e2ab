"""Runtime: bundle and frames to results."""
