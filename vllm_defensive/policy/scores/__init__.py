"""How one layer's tokens are scored: one function an aggregate, by what it reads. Importing this enters all of them."""

from vllm_defensive.policy.scores import attention, keys, output, positions, window

__all__ = ["attention", "keys", "output", "positions", "window"]
