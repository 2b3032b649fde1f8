"""The flags: `--kv-eviction POLICY` and its companions, on every vLLM command that takes engine arguments.

They are folded into `additional_config["kv_eviction"]`, which is where `LLM(additional_config=...)` puts them too, so
there is one way on from here (`startup.py`).
"""

from __future__ import annotations

import argparse
from typing import Any

from vllm_defensive.compat import contract
from vllm_defensive.packing import OFFERED
from vllm_defensive.settings import engine as config

_PREFIX = "kv_eviction"
_STATUS = "vllm_defensive.serving.status.StatusMiddleware"


def flag_of(field: str) -> str:
    """`--kv-eviction` for the policy, `--kv-eviction-<field>` for every other setting."""
    return "--" + config.option_name(field).replace("_", "-")


def add_flags(parser: Any, supported: bool = True) -> None:
    """Add our argument group to one of vLLM's parsers, and fold what it parses into `additional_config`.

    supported: whether eviction runs on this vLLM; if not, whatever is given is refused.
    """
    if _PREFIX in {action.dest for action in parser._actions}:
        return
    group = parser.add_argument_group(
        title="KV eviction",
        description="Evict KV cache at the end of prefill, so that more long requests fit."
        if supported
        else f"Not available. {contract.refusal()}",
    )
    metavars = {"policy": "POLICY", "keep": "RATIO", "window": "TOKENS", "min_tokens": "TOKENS", "audit": "DIR"}
    metavars |= {
        "score": "auto|window|reconstruct|learned",
        "learned": "FILE",
        "widths": "|".join((config.AUTO, *OFFERED)),
        "shared": "keep|evict",
        "reuse": "off|boundary|prefix|chat",
        "pinned": "RATIO",
        "budget": "TOKENS",
        "when": "always|full",
        "answers": "keep|evict",
        "interval": "TOKENS",
        "prompts": "whole|bounded",
        "prompt_interval": "TOKENS",
        "admission": "eager|steady",
        "policies": "POLICY,...",
    }
    for name in config.FLAGS:
        field = config.EvictionConfig.model_fields[name]
        default = config.NONE if name == "policy" else field.default
        allowed = f": {', '.join(config.allowed_policies())}" if name == "policy" else ""
        # Values stay strings here: all of them are checked in one place, with one wording.
        value = {"action": "store_true"} if field.annotation is bool else {"metavar": metavars[name]}
        group.add_argument(
            flag_of(name),
            dest=config.option_name(name),
            default=argparse.SUPPRESS,  # None would be printed as the default by vLLM's help formatter
            help=f"{field.description}{allowed} (default: {default})",
            **value,
        )

    original = parser.parse_known_args

    def parse_known_args(*args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        namespace, rest = original(*args, **kwargs)
        try:
            (fold if supported else refuse)(namespace)
        except ValueError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        return namespace, rest

    parser.parse_known_args = parse_known_args


def refuse(arguments: Any) -> None:
    """ValueError, one line, if a flag or setting of ours was given to a vLLM that we do not run on.

    arguments: what was parsed, or `EngineArgs`.
    """
    given = any(hasattr(arguments, config.option_name(name)) for name in config.FLAGS)
    additional = getattr(arguments, "additional_config", None)
    if given or (isinstance(additional, dict) and additional.get(config.KEY) is not None):
        raise ValueError(contract.refusal(contract.check(contract.all_sides())))


def fold(namespace: argparse.Namespace) -> None:
    """Move our flags from `namespace` into `namespace.additional_config`. ValueError says in one line what is wrong."""
    given: dict[str, Any] = {}
    for name in config.FLAGS:
        value = namespace.__dict__.pop(config.option_name(name), None)
        if value is not None:
            given[name] = value
    additional = dict(getattr(namespace, "additional_config", None) or {})
    before = additional.get(config.KEY)
    if not given and before is None:
        return
    raw = {**before, **given} if isinstance(before, dict) else given or before
    settings = config.parse(raw, flag_of)
    if settings is None:
        # As if we were not there: vLLM hashes additional_config into its compile cache key.
        additional.pop(config.KEY, None)
    else:
        additional[config.KEY] = settings.as_json()
        middleware = getattr(namespace, "middleware", None)  # servers have it, other commands do not
        if middleware is not None and _STATUS not in middleware:
            # Starlette calls the last one first: in this order the user's own, which may guard the server, are asked.
            namespace.middleware = [_STATUS, *middleware]
    namespace.additional_config = additional
