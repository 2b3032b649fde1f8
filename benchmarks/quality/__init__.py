"""What each policy costs in quality, measured through the real engine: `python -m benchmarks.quality`."""
