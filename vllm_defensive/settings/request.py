"""What one request may ask for, over the OpenAI API (`vllm_xargs`) or `SamplingParams.extra_args`.

    kv_eviction            a policy's name, "auto", or "none"
    kv_eviction_score      of auto: "window"; "reconstruct" for a second look at the prompt; "learned" for the learned
                           score; else the server's choice
    kv_eviction_keep       fraction of its bytes that is kept, in (0, 1]
    kv_eviction_budget     bytes that are kept at most, as tokens that nothing was evicted of
    kv_eviction_when       "full": it is evicted when memory is short, and whole until then; or "always"
    kv_eviction_answers    "evict": what is generated is evicted as well, again and again; or "keep"
    kv_eviction_interval   tokens that are generated from one time to the next
    kv_eviction_prompts    "bounded": its prompt is evicted in parts as it is read; or "whole"
    kv_eviction_prompt_interval     tokens of such a part
    kv_eviction_widths     bits in which it is packed: "16", "k8v4", "8", "4", "8,4", or "auto"
    kv_eviction_boundary   evict when this many prompt tokens are computed; the rest of the prompt sees what was
                           kept, and is itself kept whole ("compress the document, then ask")
    kv_eviction_protect    leading prompt tokens that stay whole, in place and shared (a system prompt)
    kv_eviction_reuse      whether its packing outlives it, for later requests: "off", "boundary", "prefix", "chat"
    kv_eviction_pin        seconds for which the packing at its boundary stays, used or not; 0: no longer; -1: nor is
                           anything else asked, and the answer is empty
    kv_eviction_report     1: the response tells what was kept

Checked once in the API server, where a mistake is a 400; the scheduler resolves the same fields and must never raise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_defensive.packing import OFFERED
from vllm_defensive.settings.engine import (
    AUTO,
    NONE,
    Answers,
    EvictionConfig,
    Prompts,
    Reuse,
    ScoredBy,
    When,
    known_policy,
    known_widths,
    listed,
    option_name,
)

_PREFIX = "kv_eviction"
# What a request has of the server's where it does not say otherwise; and of these, what makes it be evicted once, at
# once.
_INHERITED = ("policy", "keep", "reuse", "budget", "when", "answers", "interval", "prompts", "prompt_interval")
_ONCE = {"answers": "keep", "prompts": "whole"}
_AT_ONCE = {"when": "always"}
_LATER = ("prefix", "chat")  # of such reuse, whatever a request packs or takes is asked about by others, later
UNPIN = -1
"""Instead of seconds, of a request that has nothing else to ask."""
_LONGEST_PIN = 30 * 24 * 3600  # seconds: a month, which nobody remembers


class RequestSettings(BaseModel):
    """A request's own settings, with the engine's where it has none. boundary, protect: tokens. report: wanted.

    Once resolved, `policy` is what the request is evicted by, and `widths` what it is packed in, never "auto".
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    policy: str
    score: ScoredBy | None = None
    keep: float = Field(gt=0, le=1)
    widths: str | None = None
    boundary: int | None = Field(None, ge=1)
    protect: int = Field(0, ge=0)
    budget: int | None = Field(None, ge=1)
    when: When = "always"
    answers: Answers = "keep"
    interval: int = Field(256, ge=1)
    prompts: Prompts = "whole"
    prompt_interval: int | None = Field(None, ge=1)
    reuse: Reuse = "off"
    pin: float | None = Field(None, ge=UNPIN, le=_LONGEST_PIN)
    report: bool | Literal[0, 1] = False

    @property
    def outlives(self) -> bool:
        """Whether what is kept of the request is for later ones, too."""
        named = self.reuse == "chat" or (self.boundary is not None and self.reuse != "off")
        return named and not self.protect and self.policy != NONE

    @property
    def takes_any(self) -> bool:
        """Whether the request begins with whatever was packed of its prompt's first tokens."""
        named = self.boundary is None and self.reuse in _LATER
        return named and not self.protect and self.policy != NONE

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        return known_policy(name)

    @field_validator("pin")
    @classmethod
    def _known_pin(cls, seconds: float | None) -> float | None:
        if seconds is not None and UNPIN < seconds < 0:
            raise ValueError
        return seconds

    @field_validator("widths", mode="before")
    @classmethod
    def _known_widths(cls, widths: Any) -> str:
        return known_widths(widths)


class RequestFieldError(ValueError):
    """A per-request field is wrong. `field` is its name as the request spelled it, `value` what it held."""

    def __init__(self, message: str, field: str, value: Any) -> None:
        super().__init__(message)
        self.field, self.value = field, value


def resolve(
    engine: EvictionConfig,
    extra_args: Mapping[str, Any] | None,
    num_prompt_tokens: int,
    items: Iterable[tuple[int, int]] = (),
) -> RequestSettings:
    """The settings of a request of `num_prompt_tokens` tokens. Raises RequestFieldError for wrong fields.

    items: `[begin, end)` prompt tokens of each image, video or audio, none of which can be evicted in half."""
    own = {}
    for name, value in (extra_args or {}).items():
        if name == _PREFIX:
            own["policy"] = value
        elif name in _ALLOWED:
            own[name.removeprefix(f"{_PREFIX}_")] = value
        elif _means_us(name):
            raise _wrong(name, value, _spelling(name))
    inherited = {name: getattr(engine, name) for name in _INHERITED}
    if not own:
        settings = RequestSettings.model_construct(**inherited)
        again = _evicted_again(engine, settings, own)
        if (late := _evicted_late(engine, again or settings.model_copy(update=_ONCE), own)) is not None:
            return late
        if again is not None:
            return again.model_copy(update=_AT_ONCE)
        widths, meant = engine.meant_widths(engine.policy), engine.meant(engine.policy, boundary=engine.reuse in _LATER)
        return settings.model_copy(update={"policy": meant, "widths": widths, **_ONCE, **_AT_ONCE})
    if "budget" in own and "keep" not in own:
        inherited["keep"] = 1.0
    try:
        settings = RequestSettings(**{**inherited, **own})
    except ValidationError as error:
        first = error.errors()[0]
        field = option_name(str(first["loc"][0]))
        raise _wrong(field, first["input"], _allowed(field, engine)) from None
    if not engine.is_there(settings.policy):
        lacks = "learned score for its model"
        if engine.has_score(settings.policy):
            lacks = "compiled function that reads pages of its widths"
        raise _wrong(_PREFIX, settings.policy, f"this server has no {lacks}; choose another policy")
    if not engine.allows(settings.policy):
        raise _wrong(_PREFIX, settings.policy, _allowed(_PREFIX, engine))
    if settings.score is not None and settings.policy != AUTO:
        raise _wrong("kv_eviction_score", settings.score, f"goes with kv_eviction={AUTO!r}; leave it out")
    again = _evicted_again(engine, settings, own)
    settings = settings.model_copy(update=_ONCE if again is None else {"reuse": again.reuse})
    late = _evicted_late(engine, again or settings, own)
    settings = settings.model_copy(update=_AT_ONCE if late is None else {"reuse": late.reuse})
    widths = engine.meant_widths(settings.policy, settings.widths, settings.keep)
    if not engine.allows_widths(widths):
        raise _wrong("kv_eviction_widths", widths, _allowed("kv_eviction_widths", engine))
    for field, tokens in (("boundary", settings.boundary), ("protect", settings.protect)):
        if tokens is not None and tokens > num_prompt_tokens:
            raise _wrong(option_name(field), tokens, f"the prompt has {num_prompt_tokens} tokens")
    if settings.pin is not None and engine.reuse == "off":
        raise _wrong(
            "kv_eviction_pin", settings.pin, "this server pins nothing: --kv-eviction-reuse or the prefix cache is off"
        )
    if settings.pin is not None and (settings.boundary is None or not settings.outlives):
        needs = "goes with kv_eviction_boundary and kv_eviction_reuse, and without kv_eviction_protect"
        raise _wrong("kv_eviction_pin", settings.pin, needs)
    for begin, end in items:
        if settings.boundary is not None and begin < settings.boundary < end:
            way_out = f"inside an image, video or audio; choose {' or '.join(str(b) for b in (begin, end) if b)}"
            raise _wrong("kv_eviction_boundary", settings.boundary, way_out)
    asks_later = settings.boundary is not None and (settings.boundary < num_prompt_tokens or settings.outlives)
    asks_later = asks_later or settings.reuse in _LATER
    meant = engine.meant(settings.policy, boundary=asks_later, score=settings.score, keep=settings.keep)
    if not engine.is_there(meant):
        raise _wrong("kv_eviction_score", settings.score, "this server has no learned score for its model")
    if (other := late or again) is not None:
        return settings.model_copy(update={"policy": other.policy, "widths": other.widths})
    return settings.model_copy(update={"policy": meant, "widths": widths})


def _evicted_again(engine: EvictionConfig, settings: RequestSettings, own: Mapping[str, Any]) -> RequestSettings | None:
    """What becomes of the settings of a request that is evicted more than once; None: it is not. own: fields that it
    named. Raises RequestFieldError if it asks for that and cannot have it."""
    several = [field for field, once in _ONCE.items() if getattr(settings, field) != once]
    for field, wants in (("interval", "answers"), ("prompt_interval", "prompts")):
        if field in own and wants not in several:
            raise _wrong(option_name(field), own[field], f"goes with {option_name(wants)}; leave it out")
    if not several or settings.policy == NONE:
        return None
    named = next((field for field in several if field in own), None)
    # Whatever will be read is asked for later.
    meant = engine.meant(settings.policy, boundary=True, score=settings.score, keep=settings.keep)
    widths, why = engine.meant_widths_again(settings.policy, settings.widths), None
    able = ("off", "boundary") if settings.prompts == "whole" else ("off",)  # of what is packed of parts none is whole
    if engine.repeats == "none":
        why = "this server, on a GPU, was started without --kv-eviction-answers evict"
    elif engine.repeats == "lasting" and settings.prompts != "whole":
        why = "supported on CPUs only"
        named = named and "prompts"
    elif not engine.is_there(meant) or not engine.evicts_again(meant):
        why = f"{settings.policy} evicts a request once; choose from {', '.join(engine.evict_again)}"
    elif widths not in engine.widths_again:
        why = f"goes with kv_eviction_widths {listed(engine.widths_again)} here, not {widths}"
        named = named or ("widths" if "widths" in own else None)
    elif own.get("reuse", "off") not in able:
        why = f"what such a request leaves is no use to others; choose kv_eviction_reuse {able[-1]}"
    if why is not None:
        if named is not None:
            raise _wrong(option_name(named), getattr(settings, named), why)
        return None
    for field in ("interval", "prompt_interval"):
        tokens = getattr(settings, field)
        if tokens is not None and tokens < engine.window:
            raise _wrong(option_name(field), tokens, f"choose {engine.window} or more, as its window has")
    # What a boundary names is packed for others, too, and read only: what comes behind is packed into other blocks.
    published = "boundary" in able and settings.boundary is not None and settings.outlives
    reuse = "boundary" if published else "off"
    return settings.model_copy(update={"policy": meant, "widths": widths, "reuse": reuse})


def _evicted_late(engine: EvictionConfig, settings: RequestSettings, own: Mapping[str, Any]) -> RequestSettings | None:
    """What becomes of the settings of a request that is evicted when memory is short; None: it is evicted as it is
    read. settings: with what it is evicted by more than once, if it is. own: fields that it named. Raises
    RequestFieldError if it asks for that and cannot have it."""
    if settings.when == "always" or settings.policy == NONE:
        return None
    meant = engine.meant(settings.policy, score=settings.score, keep=settings.keep)
    name, why = engine.evicts_late(meant, settings.answers), None
    widths = engine.meant_widths_again(settings.policy, settings.widths)
    if settings.prompts == "bounded":
        why = "such a prompt is evicted as it is read; choose kv_eviction_prompts whole"
    elif engine.repeats == "none":
        why = "this server, on a GPU, was started without --kv-eviction-when full"
    elif name is None or not engine.is_there(meant):
        why = f"{meant} cannot evict so late; choose from {', '.join(engine.evict_late(settings.answers))}"
    elif widths not in engine.widths_again:
        why = f"goes with kv_eviction_widths {listed(engine.widths_again)} here, not {widths}"
    elif own.get("reuse", "off") != "off":
        why = "what such a request is packed into is no use to others; choose kv_eviction_reuse off"
    if why is None:
        return settings.model_copy(update={"policy": name, "widths": widths, "reuse": "off"})
    if "when" in own:
        raise _wrong("kv_eviction_when", settings.when, why)
    return None


def only_unpins(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request asks for nothing but that a packing is no longer pinned."""
    return extra_args is not None and extra_args.get("kv_eviction_pin") == UNPIN


def refuse_items_behind(boundary: int | None, items: Iterable[tuple[int, int]]) -> None:
    """Raises RequestFieldError if an image, video or audio (as in `resolve`) begins at the boundary or behind it."""
    if boundary is not None and any(begin >= boundary for begin, _ in items):
        raise _wrong(
            "kv_eviction_boundary",
            boundary,
            "this model attends to an image as a whole, which works before a boundary only; put images first",
        )


def items_of(places: Iterable[tuple[str, Any]]) -> list[tuple[int, int]]:
    """`[begin, end)` prompt tokens of each image, video or audio. places: vLLM's (modality, placeholder) pairs, where
    embeddings that a client sent for its text count as a modality."""
    return [(place.offset, place.offset + place.length) for kind, place in places if kind != "prompt_embeds"]


def names_fields(fields: Any) -> bool:
    """Whether a request names fields of ours at all, right or wrong ones."""
    return isinstance(fields, dict) and any(map(_means_us, fields))


def refuse_strays(fields: Mapping[str, Any] | None) -> None:
    """Raises RequestFieldError for fields of ours beside `vllm_xargs` instead of in it, where vLLM passes over them."""
    for name, value in (fields or {}).items():
        if _means_us(name):
            raise _wrong(name, value, "has no effect here; put it into vllm_xargs")


def refuse_whole(engine: EvictionConfig, own: RequestSettings | None, num_tokens: int | None, vllm_config: Any) -> None:
    """Raises RequestFieldError if a prompt is not read in parts, and the server relies on that: it may be larger than
    the memory, and the request would wait for ever.

    own: the request's settings; None: whatever they are, it cannot be read in parts. num_tokens: of its prompt, None if
    that grows.
    """
    parts = own is not None and own.prompts == "bounded" and own.policy != NONE
    if engine.prompts == "whole" or parts:
        return
    cache: Any = getattr(vllm_config, "cache_config", None)
    blocks = getattr(cache, "num_gpu_blocks", None)  # of all engines together
    if blocks is not None:
        blocks //= vllm_config.parallel_config.data_parallel_size
    if num_tokens is None or (blocks is not None and num_tokens >= (blocks - 1) * cache.block_size):
        why = "the prompt may be larger than the KV cache, which this server reads in parts: text, and with eviction on"
        raise _wrong("kv_eviction_prompts", "whole", why)


def refuse_beam_search(fields: Mapping[str, Any]) -> None:
    """Raises RequestFieldError for fields of ours in a beam search, of which every step is a request of one token over
    the whole cache."""
    _refuse_all(fields, "has no effect with use_beam_search, which reads the whole cache; leave it out")


def refuse_session(fields: Mapping[str, Any]) -> None:
    """Raises RequestFieldError for fields of ours in a session, whose prompt comes in pieces and has no known end."""
    _refuse_all(fields, "has no effect in a session of streamed inputs, which is never evicted; leave it out")


def _refuse_all(fields: Mapping[str, Any], why: str) -> None:
    for name, value in fields.items():
        if _means_us(name):
            raise _wrong(name, value, why)


def refuse_booleans(engine: EvictionConfig, fields: Any) -> None:
    """Raises RequestFieldError if a field of ours holds a boolean. fields: as the client sent them, of any type."""
    for name, value in fields.items() if isinstance(fields, dict) else ():
        if isinstance(value, bool) and name in _ALLOWED and name not in _SWITCHES:
            raise _wrong(name, value, _allowed(name, engine))


_ALLOWED = {
    "kv_eviction": "choose one of {choices}",
    "kv_eviction_score": "choose one of auto, window, reconstruct, learned",
    "kv_eviction_keep": "choose a number in (0, 1]",
    "kv_eviction_budget": "choose a whole number of tokens, 1 or more",
    "kv_eviction_when": f"choose one of {', '.join(get_args(When))}",
    "kv_eviction_answers": f"choose one of {', '.join(get_args(Answers))}",
    "kv_eviction_interval": "choose a whole number of tokens, 1 or more",
    "kv_eviction_prompts": f"choose one of {', '.join(get_args(Prompts))}",
    "kv_eviction_prompt_interval": "choose a whole number of tokens, 1 or more",
    "kv_eviction_widths": "choose one of {widths}",
    "kv_eviction_boundary": "choose a whole number of prompt tokens, 1 or more",
    "kv_eviction_protect": "choose a whole number of prompt tokens, 0 or more",
    "kv_eviction_reuse": f"choose one of {', '.join(get_args(Reuse))}",
    "kv_eviction_pin": f"choose a number of seconds, 0 to {_LONGEST_PIN}, or {UNPIN}",
    "kv_eviction_report": "choose 0 or 1",
}
_SWITCHES = ("kv_eviction_report",)  # a boolean is what they mean


def _allowed(field: str, engine: EvictionConfig) -> str:
    why = "" if engine.policies is None else ", which --kv-eviction-policies allows"
    widths = listed((AUTO, *filter(engine.allows_widths, OFFERED)))
    return _ALLOWED[field].format(choices=", ".join(engine.choices) + why, widths=widths)


def _letters(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())


def _means_us(name: Any) -> bool:
    """Whether a name is one of ours, rightly spelled or not: `KV-Eviction` and `kvEviction` have no other meaning."""
    return isinstance(name, str) and _letters(name).startswith(_letters(_PREFIX))


def _spelling(name: str) -> str:
    """What to say of a name of ours that is not a field's."""
    meant = [field for field in _ALLOWED if _letters(field) == _letters(name)]
    return f"spell it {meant[0]}" if meant else f"unknown, choose from {', '.join(_ALLOWED)}"


def _wrong(field: str, value: Any, allowed: str) -> RequestFieldError:
    return RequestFieldError(f"{field}={value!r}: {allowed}", field, value)


def settings_or_none(engine: EvictionConfig, request: Any) -> RequestSettings:
    """The settings of a request that is in the scheduler already. Wrong fields, which the API server refuses, and kinds
    of request that cannot be evicted mean: do not evict it."""
    extra_args = getattr(request.sampling_params, "extra_args", None)
    try:
        if not getattr(request, "resumable", False) and request.sampling_params is not None:
            items = items_of((f.modality, f.mm_position) for f in request.mm_features)
            return resolve(engine, extra_args, request.num_prompt_tokens, items)
    except ValueError:
        pass
    return RequestSettings.model_construct(policy=NONE, keep=engine.keep, widths="16")
