"""Workers on NVIDIA GPUs."""
