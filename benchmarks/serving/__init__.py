"""Throughput under memory pressure: stock vLLM and vLLM with eviction, side by side, through `vllm bench serve`."""
