"""What evicting costs that goes on while a request generates: `python -m benchmarks.answers`."""
