"""How a patch is installed, and the logger of all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_PATCHED = "__kv_eviction_patched__"


def get_logger(name: str) -> Any:
    """A logger under vLLM's own root, so that its level and format settings hold for our lines as well."""
    from vllm.logger import init_logger

    return init_logger(f"vllm.{name}")


def patch(owner: Any, attribute: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `owner.attribute` by `make(original)`, once however often it is asked for."""
    original = getattr(owner, attribute)
    if hasattr(original, _PATCHED):
        return
    replacement = functools.wraps(original)(make(original))
    setattr(replacement, _PATCHED, True)
    is_static = isinstance(owner.__dict__.get(attribute), staticmethod)
    setattr(owner, attribute, staticmethod(replacement) if is_static else replacement)
