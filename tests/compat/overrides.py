"""What classes of ours take over from vLLM's, and what they say that they can do, by inspection."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_defensive.compat.names import BY_SIDE
from vllm_defensive.worker.capabilities import STOCKS

TABLE = {(module, name) for names in BY_SIDE.values() for module, rows in names.items() for name in rows}
_GIVEN_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

# Looked at, and not done by our kernels. What vLLM adds belongs here or into `STOCKS`.
NOT_OURS = {
    "supports_alibi_sqrt",
    "supports_batch_invariance",
    "supports_dcp",
    "supports_device_cpu_query_lens_mismatch",  # of drafts that are cut on the device
    "supports_kv_cache_update_bypass",  # since 0.33: attention without keys and values, which are in the cache already
    "supports_kv_connector",
    "supports_non_causal",
    "supports_non_causal_dcp",
    "supports_pcp",
    "supports_per_head_quant_scales",
    "supports_rswa",
}


def overridden(ours: type) -> Iterator[tuple[str, Any, Any]]:
    """(name, our function, vLLM's) of what `ours` writes anew."""
    # Not what dataclasses make, nor constructors that only we call, nor what backends say that they can do, which has a
    # test of its own.
    stock = [cls for cls in ours.__mro__ if cls.__module__.startswith("vllm.")]
    for cls in ours.__mro__:
        for name, made in vars(cls).items() if cls.__module__.startswith("vllm_defensive.") else ():
            below = next((other for other in stock if name in vars(other)), None)
            function = inspect.unwrap(getattr(made, "__func__", made))
            written = inspect.isfunction(function) and Path(function.__code__.co_filename).exists()
            handed_on = name != "__init__" or (written and "super" in function.__code__.co_names)
            if below is not None and written and handed_on and not name.startswith("supports_"):
                theirs = vars(below)[name]
                yield name, function, inspect.unwrap(getattr(theirs, "__func__", theirs))


def unlisted(ours: type) -> set[str]:
    """Overridden methods that no row names for any of vLLM's classes below."""
    return {
        f"{ours.__name__}.{name}"
        for name, *_ in overridden(ours)
        if not any((c.__module__, f"{c.__name__}.{name}") in TABLE for c in ours.__mro__)
    }


def narrower(ours: type) -> set[str]:
    """Overridden methods that do not take all that vLLM's takes."""
    return {f"{ours.__name__}.{name}" for name, mine, theirs in overridden(ours) if not _takes(mine, theirs)}


def _takes(mine: Any, theirs: Any) -> bool:
    have, want = inspect.signature(mine).parameters, inspect.signature(theirs).parameters
    any_position, any_keyword = (any(p.kind is kind for p in have.values()) for kind in _GIVEN_ANY)
    missing = [p for p in want.values() if p.name not in have and p.kind not in _GIVEN_ANY]
    if missing and not (any_keyword and (any_position or all(p.kind is p.KEYWORD_ONLY for p in missing))):
        return False
    order = [name for name in want if name in have and want[name].kind not in _GIVEN_ANY]
    return [name for name in have if name in order] == order


def promises(backend: type) -> dict[str, bool]:
    """What it says of everything that vLLM may ask and we do not leave to its own backend."""
    names = {name for name in dir(backend) if name.startswith("supports_")} - STOCKS
    values = {name: getattr(backend, name) for name in names}
    return {name: value() if callable(value) else value for name, value in values.items()}
