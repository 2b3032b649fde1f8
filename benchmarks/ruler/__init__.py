"""RULER by NVIDIA's own generators and scorers, answered through the engine: `python -m benchmarks.ruler`."""
