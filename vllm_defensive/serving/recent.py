"""Who was evicted lately, as far as this process has heard, and by which names a client can ask for it."""

from __future__ import annotations

import re
from collections import deque
from itertools import islice
from typing import Any

from vllm_defensive.counts import REMEMBERED

# What vLLM's APIs call a request that they send to the engine: the kind of API, the id, and this; a random suffix
# follows. Beam searches send one for each beam and token. A request for n > 1 answers is n of them, a number in front.
_BEAM = r"-[0-9a-f]{16}-beam-\d+"
_KINDS = (
    ("cmpl-", rf"-\d+|{_BEAM}"),  # the prompt's number
    ("chatcmpl-", rf"|{_BEAM}"),
    ("chatcmpl-", r"_\d+"),  # the conversation's number, in a batch of them
    ("generate-tokens-", ""),
    ("(?:decision|generative-scoring)-", r"-\d+"),
    ("", r"_\d+"),  # responses: their id says what they are
)
_INTERNAL = [re.compile(rf"(?:\d+_)?({kind}(.+?))(?:{after})(?:-[0-9a-f]{{8}})?") for kind, after in _KINDS]

_counted = False  # whether evictions are reported to this process
_publishes = True  # whether packings can be found again, as far as an engine has said
_records: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)


def forget() -> None:
    """Start anew, for another engine."""
    global _counted, _publishes
    _records.clear()
    _counted, _publishes = False, True


def count() -> None:
    """From now on evictions are counted in this process, and `remember` is called for them."""
    global _counted
    _counted = True


def counted() -> bool:
    """Whether evictions are counted in this process."""
    return _counted


def note_publishing(there: bool) -> None:
    """An engine says whether packings can be found again: that depends on its layers."""
    global _publishes
    _publishes = there


def publishes() -> bool:
    """Whether packings can be found again, as an engine last said."""
    return _publishes


def remember(record: dict[str, Any]) -> None:
    """Add `counts.record_of` an eviction; one that followed on another of the request stands in its place."""
    for place, other in enumerate(reversed(_records)) if record["repeat"] else ():
        if other["request_id"] == record["request_id"]:
            del _records[len(_records) - 1 - place]
            break
    _records.append(record)


def last(number: int) -> list[dict[str, Any]]:
    """At most so many evictions, latest first."""
    return list(islice(reversed(_records), number))


def find(request_id: str) -> list[dict[str, Any]]:
    """Evictions of the response or `X-Request-Id` called `request_id`, latest first.

    Several prompts or answers of one request, and a preempted one, have several entries.
    """
    return [r for r in reversed(_records) if request_id in names_of(r["request_id"])]


def names_of(internal_id: str) -> set[str]:
    """By which ids the request that the engine calls `internal_id` can be asked for.

    Only a chat whose own id ends in `_1` cannot be told from the second one of a batch.
    """
    found = (pattern.fullmatch(internal_id) for pattern in _INTERNAL)
    return {internal_id, *(name for match in found if match for name in match.groups())}
