"""Budgets counted: in single tokens, to the last one as the reference implementation counts them.

The engine allocates whole pages (`select`); tokens are for parity with the reference, where a page is one token.
"""

from vllm_defensive.policy.definition import Scope


def kept_fraction(keep_ratio: float) -> float:
    """The reference is configured by the ratio that goes, so it computes with 1 - (1 - keep): 0.2 becomes
    0.19999999999999996, and int() then drops a token."""
    return 1 - (1 - keep_ratio)


def reference_budget(scope: Scope, *, prompt_tokens: int, keep_ratio: float, kv_heads: int, layers: int) -> int:
    """Tokens, the window's included, that one head, one layer or the whole model keeps."""
    fraction = kept_fraction(keep_ratio)
    if scope == "head":
        return int(prompt_tokens * fraction)
    if scope == "layer":
        return int(prompt_tokens * fraction * kv_heads)
    return int(prompt_tokens * fraction * kv_heads * layers)


def guarded(guard: float, even_budget: int) -> int:
    """Tokens or pages of each head that competition cannot take: a share of what an even split gives it."""
    return int(guard * even_budget)


def stage_one_cap(scored_tokens: int, keep_ratio: float, window: int) -> int:
    """Most tokens a head may have for certain (DefensiveKV). The reference takes the window off twice, and indexes
    with the negative result of a short prompt; here that is zero."""
    return max(int(scored_tokens * kept_fraction(keep_ratio) - window), 0)
