"""What the kernels cost on a GPU, beside its limits and other implementations: `python -m benchmarks.kernels`."""
