"""KV-cache eviction for vLLM: at the end of prefill, keep what each head needs and free the rest."""

__version__ = "0.1.0"
