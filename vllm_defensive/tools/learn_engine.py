"""The engine in which a score is learned, from the arguments of the one that is to go by it."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

from vllm_defensive import learned
from vllm_defensive.packing import ECHO_OVERHEAD, ECHO_TOKENS
from vllm_defensive.settings.engine import AUTO_POLICIES, KEY, NONE
from vllm_defensive.tools import learn_checks

LENGTH, LEAST_LENGTH = 960, 64
TEACHER, JOINED = AUTO_POLICIES["reconstruct"], AUTO_POLICIES["learned"]
_WINDOW = 32


def prepared(engine_args: Any) -> Any:
    """Arguments of a plain engine with this model: eager, alone, with our settings. Those given stay as they are."""
    from vllm.engine.arg_utils import EngineArgs

    settings = {
        "policy": NONE,
        "per_request": True,
        "policies": [TEACHER, *learn_checks.POLICIES],
        "learning": True,
        "shared": "evict",  # what is compared shares its whole prompt, and must be evicted as if it were alone
        "reuse": "off",  # and where it ends, to the token
        "window": _WINDOW,
        "min_tokens": _WINDOW,
    }
    made = copy.copy(engine_args)
    made.__class__ = EngineArgs
    known = {field.name: field for field in fields(EngineArgs)}
    for name in [name for name in vars(made) if name not in known]:
        delattr(made, name)  # a server's
    for name, field in known.items():
        if name.startswith(("data_parallel", "spec")):  # drafts change no answer, and forbid logits processors
            setattr(made, name, field.default)
    made.enforce_eager = True
    made.disable_log_stats = True
    made.logits_processors = [learn_checks.processor()]
    additional = {name: value for name, value in (made.additional_config or {}).items() if name != KEY}
    made.additional_config = {**additional, KEY: settings}
    return made


def lengths(wanted: int | None, engine_args: Any) -> tuple[int, int]:
    """(tokens of a text, `max_model_len`). wanted: of a text; None: `LENGTH`, or what there are positions for.

    Raises what vLLM does where there is no such model, and ValueError, for a model that cannot repeat a text, too.
    """
    model = engine_args.create_model_config()
    if model.is_hybrid:
        raise ValueError(
            f"{engine_args.model}: nothing can be learned of it, for its recurrent layers would see a text that is "
            "repeated as one that goes on"
        )
    positions = model.max_model_len
    most = max((positions - ECHO_OVERHEAD) // 2, positions - ECHO_OVERHEAD - ECHO_TOKENS)
    length = min(LENGTH, most) if wanted is None else wanted
    if not LEAST_LENGTH <= length <= most:
        raise ValueError(
            f"--length {length}: a text and what of it is repeated at once must fit {positions} tokens; choose "
            f"{LEAST_LENGTH} to {most}"
        )
    needed = length + min(length, ECHO_TOKENS) + ECHO_OVERHEAD
    return length, needed if engine_args.max_model_len is None else positions


def fingerprint(engine_args: Any) -> str | None:
    return learned.fingerprint(engine_args.model, engine_args.revision, engine_args.download_dir)
