"""Requests are checked before the engine sees them: a mistake is an HTTP 400, or VLLMValidationError from `LLM`."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

from vllm_defensive.compat.serving import request_error
from vllm_defensive.platforms import PLATFORMS, current
from vllm_defensive.settings.engine import from_vllm_config
from vllm_defensive.settings.request import (
    RequestFieldError,
    items_of,
    names_fields,
    refuse_beam_search,
    refuse_booleans,
    refuse_items_behind,
    refuse_session,
    refuse_strays,
    refuse_whole,
    resolve,
)

_MENTION = re.compile(rb"(?i)eviction")


def check_request(vllm_config: Any, prompt: Any, params: Any) -> None:
    """Refuse a request with wrong `kv_eviction*` fields: HTTP 400, or VLLMValidationError from `LLM`.

    vllm_config: of the engine that is asked. It may be a stock one, though another of the process evicts.
    """
    extra_args = getattr(params, "extra_args", None) or {}
    settings = from_vllm_config(vllm_config)
    if settings is None or not (extra_args or settings.prompts == "bounded"):
        return
    try:
        if _is_session(prompt):
            refuse_session(extra_args)
            refuse_whole(settings, None, None, vllm_config)
        if (num_tokens := _length(prompt)) is None:
            return
        placeholders = prompt.get("mm_placeholders") or {}
        items = items_of((kind, place) for kind, places in placeholders.items() for place in places)
        own = resolve(settings, extra_args, num_tokens, items)
        refuse_whole(settings, None if items else own, num_tokens, vllm_config)
        if items and vllm_config.model_config.is_mm_prefix_lm and current() == PLATFORMS["cuda"]:
            refuse_items_behind(own.boundary, items)
    except RequestFieldError as error:
        raise request_error(str(error), error.field, error.value) from None


def _is_session(prompt: Any) -> bool:
    """Whether the prompt comes in pieces: all of them, or one that the engine has made a request of."""
    return isinstance(prompt, AsyncIterator) or (isinstance(prompt, dict) and bool(prompt.get("resumable")))


def _length(prompt: Any) -> int | None:
    """Tokens of a prompt, None if it is not yet tokenized: it comes again once it is."""
    if not isinstance(prompt, dict):
        return None
    for name in ("prompt_token_ids", "prompt_embeds"):
        if prompt.get(name) is not None:
            return len(prompt[name])
    return None


async def _body(request: Any, fields: Any, raw_request: Any) -> dict[str, Any]:
    """What the client sent, as far as it is known; empty where it does not mention us, for it may be long."""
    if raw_request is None:
        return {**(getattr(request, "model_extra", None) or {}), "vllm_xargs": fields}
    if not names_fields(fields) and not _MENTION.search(await raw_request.body()):
        return {}
    body = await raw_request.json()
    return body if isinstance(body, dict) else {}


async def check_body(vllm_config: Any, request: Any, raw_request: Any) -> None:
    """Refuse what `check_request` does not see: fields beside `vllm_xargs` and those of a beam search, and booleans,
    which it sees as 0 and 1.

    raw_request: None in `vllm run-batch`, where only what vLLM made of the body can be seen.
    """
    fields = getattr(request, "vllm_xargs", None) or {}
    body = await _body(request, fields, raw_request)
    settings = from_vllm_config(vllm_config) if body else None
    if settings is None:
        return
    try:
        refuse_strays(body)
        if getattr(request, "use_beam_search", False):
            refuse_beam_search(fields)
        refuse_booleans(settings, body.get("vllm_xargs"))
    except RequestFieldError as error:
        raise request_error(str(error), error.field, error.value) from None
