"""Command line and demo."""
