"""Measurements of quality, speed and memory. Run from the repository root: `python -m benchmarks.NAME`."""
