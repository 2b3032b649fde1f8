"""Ask the engine, score what it says, and keep every answer in a file, so that a run goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.quality.engine import Engine, Setting
from benchmarks.quality.prompts import Prompts
from benchmarks.ruler.samples import Sample

Row = dict[str, Any]
FULL = "full"
EXCLUDED, INCLUDED = "excluded", "included"
PROTOCOLS = (EXCLUDED, INCLUDED)
"""Is the question part of what is compressed? Excluded: evict where it begins. Included: at the prompt's end."""


class Choice(NamedTuple):
    """A policy, the share of the cache that it keeps, and a protocol; for the full cache the latter two say nothing."""

    policy: str
    keep: float = 1.0
    protocol: str | None = None

    def setting(self, boundary: int) -> Setting:
        if self.policy == FULL:
            return Setting()
        return Setting(self.policy, self.keep, boundary if self.protocol == EXCLUDED else None)


def choices(policies: Sequence[str], keeps: Sequence[float], protocols: Sequence[str]) -> list[Choice]:
    """All combinations; the full cache once, if it is among the policies."""
    evicted = [policy for policy in policies if policy != FULL]
    combined = [Choice(p, keep, protocol) for protocol in protocols for keep in keeps for p in evicted]
    return [Choice(FULL)] * (FULL in policies) + combined


class Answers:
    """The answers of a file, a line of JSON each: one per (model, sample, choice), never changed afterwards."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        whole, _, half = text.rpartition("\n")
        if half:  # a run was ended while it wrote its last line
            path.write_text(whole + "\n" * bool(whole), encoding="utf-8")
        self.rows: list[Row] = [json.loads(line) for line in whole.splitlines()]
        self._done = {self._key(row) for row in self.rows}

    @staticmethod
    def _key(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("model", "task", "length", "index", "policy", "keep", "protocol"))

    def missing(self, model: str, sample: Sample, wanted: Sequence[Choice]) -> list[Choice]:
        """Those of `wanted` that have no answer to this sample yet."""
        place = (model, sample.task, sample.length, sample.index)
        return [choice for choice in wanted if (*place, *choice) not in self._done]

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows in one write."""
        new = [row for row in rows if self._key(row) not in self._done]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in new))
        self.rows += new
        self._done.update(map(self._key, new))


def ask(
    engine: Engine, sample: Sample, wanted: Sequence[Choice], score: Callable[[str, list[str]], float]
) -> list[Row]:
    """The answers of all `wanted` to one sample, in one batch over one prefill.

    prefill_seconds: of the whole prompt, once. seconds: the batch's, divided by the answers in it: hits of the prefix
    cache, evictions, questions and answers.
    """
    tokens, boundary = Prompts(engine.tokenizer).join(sample.context, sample.question, sample.answer_prefix)
    began = time.perf_counter()
    engine.free([(tokens, 1, Setting())])  # so that everybody finds the prompt in the prefix cache
    prefilled = time.perf_counter()
    settings = [choice.setting(boundary) for choice in wanted]
    outputs = engine.free([(tokens, sample.most, setting) for setting in settings])
    seconds = (time.perf_counter() - prefilled) / len(wanted)
    return [
        {
            "task": sample.task,
            "length": sample.length,
            "index": sample.index,
            **choice._asdict(),
            "score": score(output.outputs[0].text, list(sample.references)),
            "answer": output.outputs[0].text,
            "references": sample.references,
            "prompt_tokens": len(tokens),
            "context_tokens": boundary,
            "answer_tokens": len(output.outputs[0].token_ids),
            "retention": round(engine.retention(setting, len(tokens)), 4),
            "prefill_seconds": round(prefilled - began, 3),
            "seconds": round(seconds, 3),
            "batch": len(wanted),
        }
        for choice, setting, output in zip(wanted, settings, outputs, strict=True)
    ]
