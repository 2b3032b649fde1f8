"""Kernels of vllm_defensive: each op has a readable PyTorch reference and a Triton kernel of the same signature."""
