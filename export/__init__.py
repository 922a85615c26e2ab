"""Export: checkpoint to bundle."""
