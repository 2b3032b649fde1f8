"""The user's settings: parsed once, checked once, then frozen.

Field names are those of `additional_config={"kv_eviction": {...}}`; the flag of a field is `--kv-eviction-<field>`, and
`--kv-eviction` itself is `policy`. Help texts and defaults of the flags are read from here (`cli.py`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_defensive.packing import OFFERED, WIDTHS, Format, Region
from vllm_defensive.policy import PRESETS, public_names

KEY = "kv_eviction"
NONE = "none"
AUTO = "auto"
TURN_OFF = "turn eviction off (--kv-eviction none, without --kv-eviction-per-request)"
INTERNAL_POLICIES = "VLLM_DEFENSIVE_INTERNAL_POLICIES"


AUTO_POLICIES = {"window": "halokv", "reconstruct": "echokv", "learned": "learned-halokv"}
"""What `auto` stands for, by what a request is scored by."""

AUTO_WIDTHS = ((1.0, "16"), (0.56, "8"), (0.43, "k8v4"), (0.15, "8,4"), (0.0, "k8v4"))
"""In what `auto` packs, where the device reads such pages well, from a ratio on. 8 and k8v4 hold every token from there
on; below, what keeps most answers as they were (docs/quality.md)."""

WIDTHS_AGAIN = ("16", "8", "k8v4")
"""In what a request is packed that is evicted more than once. Not with keys of 4 bits: they would be quantised from so
few again and again, each time among others."""

ScoredBy = Literal["auto", "window", "reconstruct", "learned"]
Reuse = Literal["off", "boundary", "prefix", "chat"]
Answers = Literal["keep", "evict"]
Prompts = Literal["whole", "bounded"]
When = Literal["always", "full"]


class EvictionConfig(BaseModel):
    """Settings of one engine. Immutable and hashable; travels to the workers inside the KV cache spec."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: str = Field(description="eviction policy")
    score: ScoredBy = Field(
        "auto",
        description="what the policy auto scores by: the observation window; or the prompt repeated, which costs a "
        "second prefill; or a learned score and the window; auto: the last where a learned score is there (without a "
        "boundary only at ratios at which it was found to do), else the second where a request names a boundary, else "
        "the first",
    )
    learned: str | None = Field(
        None,
        description="learned score, a file that `python -m vllm_defensive.learn` has written; without it the model's "
        "own is looked for in vLLM's cache folder and in this package; none: go without",
    )
    learn: bool = Field(
        False,
        description="make the model's learned score before the engine is started, if none is found: what "
        "`python -m vllm_defensive.learn` does, in a process of its own",
    )
    learning: Literal[True] | None = Field(
        None,
        description="set by that command alone: a learned score is made in this engine, which goes by it afterwards",
    )
    window_keep: float | None = Field(
        None, description="set from the learned score: the least ratio at which auto goes by it without a boundary, too"
    )
    keep: float = Field(
        0.2,
        gt=0,
        le=1,
        description="fraction of the bytes of each prompt's KV cache to keep; 1 where only a budget is given",
    )
    budget: int | None = Field(
        None,
        ge=1,
        description="keep no more bytes of a request than so many tokens take that nothing was evicted of, whatever "
        "its length; beside a ratio, the smaller counts",
    )
    when: When = Field(
        "always",
        description="full: requests stay whole as long as there is memory, and are evicted when others would have to "
        "wait, or be thrown out, for want of it: first those of which most is there, down to what is to be kept, by "
        "halves where scores last; by the policies that can evict answers; always: as soon as they are read",
    )
    answers: Answers = Field(
        "keep",
        description="evict: what is generated is evicted like the prompt, again and again, by policies whose scores "
        "last (learnedkv, with which learned-halokv goes on; streamingllm, random), on CPUs also by those that look at "
        "a window; keep: never",
    )
    interval: int = Field(256, ge=1, description="tokens that are generated between two evictions of a request")
    prompts: Prompts = Field(
        "whole",
        description="bounded: prompts longer than an interval are evicted in parts as they are read, so that they may "
        "be larger than the memory; by the same policies; whole: at their end",
    )
    prompt_interval: int | None = Field(
        None, ge=1, description="tokens that are read between two evictions of such a prompt; none: those of a chunk"
    )
    widths: str = Field(
        AUTO,
        description="bits in which what is kept is packed: 16, as the cache has it; or 8; or 4; or 8,4: the best "
        "quarter of the pages 8; or k8v4: keys 8, values 4, two and a half times as many tokens in the same bytes; "
        "auto: with the policy auto on CPUs by the ratio, with rdkv its own mix, else 16",
    )
    auto_widths: bool = Field(False, description="set by the device: whether the policy auto packs in fewer bits")
    classes: tuple[str, ...] | None = Field(
        None, description="set by the device: the kinds of pages that are compiled; none: any are"
    )
    repeats: Literal["any", "lasting", "none"] = Field(
        "any", description="set by the device: policies that can evict a request more than once"
    )
    window: int = Field(
        32, ge=1, description="observation window: the last prompt tokens, whose attention scores all others"
    )
    min_tokens: int = Field(256, ge=1, description="prompts shorter than this are left alone")
    audit: str | None = Field(None, description="write one safetensors file per evicted request into this folder")
    shared: Literal["keep", "evict"] = Field(
        "keep",
        description="leading blocks that other live requests use too: keep them whole, or evict them like the rest",
    )
    reuse: Reuse = Field(
        "boundary",
        description="packings that outlive their request, for who asks about the same tokens later: off; boundary: "
        "what was kept of a prompt up to the boundary that its request names (by default only with vLLM's prefix "
        "cache); prefix: and a request that names none begins with the longest of these that its prompt begins with; "
        "chat: and leaves its own end for the next turn",
    )
    pinned: float = Field(
        0.25, ge=0, le=0.9, description="share of the memory that packings may take which a request has pinned, at most"
    )
    admission: Literal["eager", "steady"] = Field(
        "eager",
        description="let a waiting request in as soon as its prompt fits, or once all are expected to fit to their end",
    )
    per_request: bool = Field(
        False, description="let requests choose their own policy even if the server's own policy is none"
    )
    policies: tuple[str, ...] | None = Field(
        None,
        description="policies that requests may choose, separated by commas, beside none and the server's own: without "
        "it all on CPUs and no other on GPUs, where each is compiled at start",
    )

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        return known_policy(name)

    @field_validator("widths", mode="before")
    @classmethod
    def _known_widths(cls, widths: Any) -> str:
        return known_widths(widths)

    @field_validator("policies", mode="before")
    @classmethod
    def _known_policies(cls, names: Any) -> Any:
        listed = names.split(",") if isinstance(names, str) else names
        return [known_policy(str(name).strip()) for name in listed] if isinstance(listed, (list, tuple)) else listed

    @property
    def choices(self) -> list[str]:
        """The policies that a request may name, in the order of `--kv-eviction`'s values, internal ones last."""
        there = [name for name in allowed_policies() if self.is_there(name)]
        if self.policies is None:
            return there
        chosen = {NONE, self.policy, *self.policies}
        known = [name for name in there if name in chosen]
        return known + sorted(chosen.difference(known))

    @property
    def served(self) -> list[str]:
        """The policies that a request may be evicted by, those included that serve who cannot be repeated, and those
        that evict what is generated."""
        named = [policy for name in self.choices if name != NONE for policy in self.stands_for(name)]
        others = (other for name in named for other in (PRESETS[name].fallback, PRESETS[name].later) if other)
        return list(dict.fromkeys([*named, *others]))

    @property
    def described(self) -> str:
        """The server's own policy, for a line that people read."""
        if self.policy != AUTO:
            return self.policy
        usual, bounded = self.meant(AUTO), self.meant(AUTO, boundary=self.when == "always")
        told = usual if usual == bounded else f"{usual}; {bounded} where a request names a boundary"
        if self.score_file is not None and self.window_keep is not None:
            told += f"; without one {AUTO_POLICIES['learned']} at ratios from {self.window_keep:g} on"
        return f"{AUTO} ({told})"

    @property
    def reconstructs(self) -> bool:
        """Whether one of them takes a second look at a prompt."""
        return any(PRESETS[name].reconstructs for name in self.served)

    def stands_for(self, policy: str) -> tuple[str, ...]:
        """The policies that requests may be evicted by which name this one."""
        return tuple(filter(self.is_there, AUTO_POLICIES.values())) if policy == AUTO else (policy,)

    def is_there(self, policy: str) -> bool:
        """Whether what the policy needs beside the model is there, or will be: a learned score, pages of its widths."""
        return policy not in PRESETS or (self.has_score(policy) and self.allows_widths(PRESETS[policy].widths))

    def has_score(self, policy: str) -> bool:
        """Whether the policy goes by no learned score, or there is one, or will be."""
        return self.score_file is not None or self.learning is not None or not PRESETS[policy].learned

    @property
    def score_file(self) -> str | None:
        """The learned score that requests may be evicted by; None: there is none."""
        return None if self.learned == NONE else self.learned

    def meant(
        self, policy: str, *, boundary: bool = False, score: ScoredBy | None = None, keep: float | None = None
    ) -> str:
        """The policy that a request is evicted by which names this one. boundary: it names one, and something comes
        behind it. score, keep: its own."""
        if policy != AUTO:
            return policy
        by = self.score if score is None else score
        if by == "auto":
            enough = self.window_keep is not None and (self.keep if keep is None else keep) >= self.window_keep
            learned = self.score_file is not None and (boundary or enough)
            by = "learned" if learned else "reconstruct" if boundary else "window"
        return AUTO_POLICIES[by]

    def meant_widths(self, policy: str, widths: str | None = None, keep: float | None = None) -> str:
        """In what a request is packed that names this policy, these widths or none, and this ratio or none."""
        widths = self.widths if widths is None else widths
        if widths != AUTO:
            return widths
        if policy != AUTO or not self.auto_widths:
            return PRESETS[policy].widths if policy in PRESETS else "16"
        keep = self.keep if keep is None else keep
        return next(name for least, name in AUTO_WIDTHS if keep >= least)

    def meant_widths_again(self, policy: str, widths: str | None = None) -> str:
        """As `meant_widths`, of a request that is evicted more than once, or when memory is short."""
        widths = self.widths if widths is None else widths
        if widths != AUTO:
            return widths
        if policy == AUTO and self.auto_widths and "k8v4" in self.widths_again:
            return "k8v4"
        return PRESETS[policy].widths if policy in PRESETS else "16"

    @property
    def widths_again(self) -> list[str]:
        """Those that such a request may be packed in."""
        return [widths for widths in WIDTHS_AGAIN if self.allows_widths(widths) and self.repeats == "any"] or ["16"]

    @property
    def described_widths(self) -> str:
        """What the server's own policy packs in, for a line that people read."""
        if self.again_or_late:
            meant = told = self.meant_widths_again(self.policy)
        else:
            meant = self.meant_widths(self.policy)
            told = f"{meant} at {self.keep:g}"
        return f"{AUTO} ({told})" if self.policy == AUTO and self.widths == AUTO else meant

    def allows_widths(self, widths: str) -> bool:
        """Whether pages of these widths can be made, and read."""
        return self.classes is None or all(name in self.classes for name, _ in WIDTHS[widths])

    @property
    def own_widths(self) -> list[str]:
        """What requests are packed in which say nothing of widths, by the server's own policy and those listed beside
        it."""
        named = [name for name in dict.fromkeys((self.policy, *(self.policies or ()))) if name != NONE]
        again = [self.meant_widths_again(name) for name in named if self.again_or_late]
        return list(dict.fromkeys([*map(self.meant_widths, named), *again]))

    def allows(self, policy: str) -> bool:
        """Whether a request may name this policy, one that `known_policy` knows."""
        named = (NONE, self.policy, *(self.policies or ()))
        listed = self.policies is None or policy in named or any(policy in self.stands_for(name) for name in named)
        return listed and self.is_there(policy)

    @property
    def again(self) -> bool:
        """Whether requests that say nothing of it are evicted more than once, if their policy can."""
        return self.answers == "evict" or self.prompts == "bounded"

    @property
    def again_or_late(self) -> bool:
        """The same, of those as well that are evicted when memory is short."""
        return self.again or self.when == "full"

    def evicts_again(self, policy: str) -> bool:
        """Whether requests that are evicted by this policy can be evicted more than once."""
        name = PRESETS[policy].evicts_answers_by if policy in PRESETS else None
        return name is not None and (self.repeats == "any" or (self.repeats == "lasting" and PRESETS[name].lasting))

    @property
    def evict_again(self) -> list[str]:
        """The policies that requests may name and that can evict them more than once."""
        return [name for name in self.choices if self.evicts_again(name)]

    def evicts_late(self, policy: str, answers: Answers) -> str | None:
        """The policy that evicts a request when memory is short, whose own is this one; None: none can. Answers are
        long by then, and the window of a prompt's end says nothing of them; on GPUs windows are kept for a step."""
        if not self.evicts_again(policy):
            return None
        row = PRESETS[policy]
        if answers == "evict" or self.repeats == "lasting":
            name = row.evicts_answers_by
            return name if name is not None and PRESETS[name].lasting else None
        return None if row.accumulates or row.reconstructs else policy

    def evict_late(self, answers: Answers) -> list[str]:
        """The policies that requests may name and that can evict them when memory is short."""
        meant = {name: self.meant(name, boundary=answers == "evict") for name in self.choices}
        return [name for name in meant if self.evicts_late(meant[name], answers) is not None]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON, from which `parse` makes the same settings: vLLM hashes it, and prints it with its config.
        `reuse` is left out as long as nobody has named it, nor settled what its default is (`settled`)."""
        unsettled = {"reuse"}.difference(self.model_fields_set)
        return self.model_dump(mode="json", exclude_none=True, exclude=unsettled)

    def settled(self, prefix_caching: bool) -> EvictionConfig:
        """These settings on an engine with or without vLLM's prefix cache: packings are found by its hashes, and the
        default asks for nothing that is not there. What the user has named stays."""
        if "reuse" in self.model_fields_set:
            return self
        return self.model_copy(update={"reuse": self.reuse if prefix_caching else "off"})

    def region(self, stop: int, shared_blocks: int, block_tokens: int, page_tokens: int | None = None) -> Region:
        """What an eviction at `stop` chooses from, with this engine's window. page_tokens: rows of a page, if it is
        smaller than a block."""
        return Region(stop, shared_blocks, self.window, block_tokens, page_tokens or block_tokens)

    def blocks_between(self, held_blocks: int, part: int, block_tokens: int) -> int:
        """Blocks that a request which is evicted more than once holds at most. held_blocks: after an eviction, or
        before its first. part: tokens until the next. One of fewer than `min_tokens` is not evicted."""
        least = math.ceil(self.min_tokens / block_tokens)
        return max(held_blocks, least) + math.ceil(part / block_tokens) + 1  # that is being filled

    def budget_blocks(
        self,
        region: Region,
        policy: str | None = None,
        keep: float | None = None,
        format: Format | None = None,
        budget: int | None = None,
        held_blocks: int | None = None,
    ) -> int:
        """`K` of a request with these settings, or with a policy, a ratio and a budget of its own, packed in this
        format, or in 16 bits. 0 means: leave it alone. held_blocks: see `Region.budget_blocks`."""
        format = region.plain if format is None else format
        policy = self.meant(self.policy if policy is None else policy)
        if policy == NONE or region.stop < self.min_tokens:
            return 0
        if PRESETS[policy].keep_all:
            held_blocks = region.blocks if held_blocks is None else held_blocks
            return min(held_blocks, region.blocks_for_all(format)) if region.stop > region.window else 0
        keep, budget = self.keep if keep is None else keep, self.budget if budget is None else budget
        return region.budget_blocks(keep, format, budget, held_blocks)


_SET_AT_START = ("learning", "window_keep", "auto_widths", "classes", "repeats")
FLAGS = tuple(name for name in EvictionConfig.model_fields if name not in _SET_AT_START)
"""The fields that users set, each of which has a flag."""


def known_policy(name: str) -> str:
    """`name` if it is "none", "auto" or a policy that users may choose. Raises ValueError otherwise.

    Internal policies cost memory or quality for the sake of a test; they must be unlocked by the environment.
    """
    unlocked = os.environ.get(INTERNAL_POLICIES) == "1"
    if name not in (NONE, AUTO) and (name not in PRESETS or (PRESETS[name].internal and not unlocked)):
        raise ValueError(f"choose one of {', '.join(allowed_policies())}")
    return name


def known_widths(widths: Any) -> str:
    """The name of these widths, or "auto"; numbers stand for their own. Raises ValueError."""
    name = str(widths).replace(" ", "") if isinstance(widths, (str, int)) and not isinstance(widths, bool) else ""
    if name not in (AUTO, *OFFERED):
        raise ValueError(f"choose one of {listed((AUTO, *OFFERED))}")
    return name


def listed(widths: Iterable[str]) -> str:
    """Their names, one after the other; some have a comma of their own."""
    return ", ".join(f'"{name}"' if "," in name else name for name in widths)


def allowed_policies() -> list[str]:
    """The values of `--kv-eviction` that users may choose."""
    return [NONE, AUTO, *public_names()]


def parse(raw: Any, name_of: Callable[[str], str] | None = None) -> EvictionConfig | None:
    """Settings from `additional_config["kv_eviction"]`; None when eviction is off.

    Raises ValueError with one line that names each wrong field (as `name_of(field)`), its value and what is allowed.
    """
    name_of = name_of or option_name
    if raw is None:
        return None
    if not isinstance(raw, dict):
        raise ValueError(f"{KEY}={raw!r}: give an object such as {{'policy': 'layer-defensivekv', 'keep': 0.2}}")
    if raw.get("budget") is not None and "keep" not in raw:
        raw = {**raw, "keep": 1.0}
    try:
        # Settings are checked even if they have no effect, so that a typing error does not wait for the day they have.
        settings = EvictionConfig(**{"policy": NONE, **raw})
    except ValidationError as error:
        raise ValueError("; ".join(_describe(e, name_of) for e in error.errors())) from None
    if raw and "policy" not in raw and "per_request" not in raw:
        without = ", ".join(name_of(field) for field in raw)
        raise ValueError(f"{without}: give {name_of('policy')} as well, one of {', '.join(allowed_policies())}")
    if settings.score != "auto" and AUTO not in settings.choices:
        raise ValueError(f"{name_of('score')}={settings.score}: goes with {name_of('policy')} {AUTO}; leave it out")
    return settings if settings.policy != NONE or settings.per_request else None


def from_vllm_config(vllm_config: Any) -> EvictionConfig | None:
    """Settings that `vllm_config.additional_config` carries, or None."""
    additional = getattr(vllm_config, "additional_config", None)
    return parse(additional.get(KEY)) if isinstance(additional, dict) else None


def option_name(field: str) -> str:
    """The name under which messages speak of a field: `kv_eviction` for the policy, else `kv_eviction_<field>`."""
    return KEY if field == "policy" else f"{KEY}_{field}"


_ALLOWED = {
    "policy": lambda: f"choose one of {', '.join(allowed_policies())}",
    "score": lambda: "choose one of auto, window, reconstruct, learned",
    "learned": lambda: "name a file, or none",
    "learn": lambda: "choose true or false",
    "learning": lambda: "leave it out",
    "window_keep": lambda: "leave it out",
    "keep": lambda: "choose a value in (0, 1]",
    "widths": lambda: f"choose one of {listed((AUTO, *OFFERED))}",
    "auto_widths": lambda: "leave it out",
    "classes": lambda: "leave it out",
    "budget": lambda: "choose a whole number of tokens, 1 or more",
    "when": lambda: f"choose one of {', '.join(get_args(When))}",
    "answers": lambda: f"choose one of {', '.join(get_args(Answers))}",
    "interval": lambda: "choose a whole number of tokens, 1 or more",
    "prompts": lambda: f"choose one of {', '.join(get_args(Prompts))}",
    "prompt_interval": lambda: "choose a whole number of tokens, 1 or more",
    "repeats": lambda: "leave it out",
    "window": lambda: "choose a whole number of tokens, 1 or more",
    "min_tokens": lambda: "choose a whole number of tokens, 1 or more",
    "audit": lambda: "name a folder",
    "shared": lambda: "choose one of keep, evict",
    "reuse": lambda: f"choose one of {', '.join(get_args(Reuse))}",
    "pinned": lambda: "choose a value in [0, 0.9]",
    "admission": lambda: "choose one of eager, steady",
    "per_request": lambda: "choose true or false",
    "policies": lambda: f"choose from {', '.join(allowed_policies())}, separated by commas",
}


def _describe(error: Any, name_of: Callable[[str], str]) -> str:
    field = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return f"{name_of(field)}: unknown setting, choose from {', '.join(FLAGS)}"
    return f"{name_of(field)}={error['input']}: {_ALLOWED[field]()}"
