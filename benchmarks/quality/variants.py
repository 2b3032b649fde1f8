"""Rows of the policy table with other options: `layer-defensivekv@pool_kernel=1+window_bias=true`."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vllm_defensive import learned
from vllm_defensive.policy import PRESETS, Policy, get_policy, public_names, register

_OPTIONS = (
    "value_weight",
    "weight_across",
    "normalise",
    "scope",
    "layer_budget",
    "stages",
    "pool",
    "pool_kernel",
    "halo_tokens",
    "halo_weight",
    "sinks",
    "window_bias",
    "guard",
    "widths",
)


def offered(model: str | Path, score: str | None = None) -> list[str]:
    """The policies that users can choose on this model: those that go by a learned score where there is one."""
    there = score is not None or learned.find(learned.fingerprint(str(model))) is not None
    return [name for name in public_names() if there or not PRESETS[name].learned]


def resolve(name: str) -> str:
    """`name`, its variant registered if it is one. Only in this process: the engine must be in it.

    Raises ValueError for unknown policies, options and values.
    """
    base, _, changes = name.partition("@")
    policy = get_policy(base)
    if changes and name not in PRESETS:
        options = dict(_option(policy, change) for change in changes.split("+"))
        register(replace(policy, name=name, internal=True, **options))
    return name


def _option(policy: Policy, change: str) -> tuple[str, Any]:
    option, _, text = change.partition("=")
    if option not in _OPTIONS:
        raise ValueError(f"variant option {change!r}: choose from {', '.join(_OPTIONS)}")
    kind = type(getattr(policy, option))
    allowed = getattr(next(f for f in fields(Policy) if f.name == option), "type", None)
    value = kind(text.replace(":", ","))  # of widths; a comma parts policies
    if kind is str and value not in getattr(allowed, "__args__", (value,)):
        raise ValueError(f"variant option {change!r}: choose from {', '.join(allowed.__args__)}")
    return option, value
