"""What our attention says that it can do: an allow-list, so that what vLLM's backends learn is not promised by us."""

from __future__ import annotations

from typing import TypeVar

_C = TypeVar("_C", bound=type)

# Answered by vLLM's class below ours. It runs the prompts and the layers that slide, and writes the cache; our kernels
# take what it takes of these, or `limits.check` refuses it; where queries look ahead, within images, is vLLM's part of
# prompts, for none comes behind a boundary (`checks.check_request`). Of everything else (ALiBi, other masks that look
# ahead, scales by head, batch invariance, context parallelism, ...) decode over packed pages does nothing.
STOCKS = frozenset(
    {
        "supports_attn_type",
        "supports_block_size",
        "supports_combination",
        "supports_compute_capability",
        "supports_dtype",
        "supports_head_size",
        "supports_kv_cache_dtype",
        "supports_mm_prefix",
        "supports_sink",
        "supports_sliding_window",
    }
)


def limited(cls: _C) -> _C:
    """A backend, builder or implementation of ours, every `supports_*` of which says no, but for those in `STOCKS`."""
    for name in dir(cls):
        if name.startswith("supports_") and name not in STOCKS:
            setattr(cls, name, classmethod(_no) if callable(getattr(cls, name)) else False)
    return cls


def _no(cls: type) -> bool:
    return False
