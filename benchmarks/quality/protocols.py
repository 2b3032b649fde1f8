"""Carry out one item: the full cache first, then every setting on the same prompt in one batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.quality import ruler, texts
from benchmarks.quality.answers import Forced
from benchmarks.quality.engine import FP8, NONE, Engine, Setting
from benchmarks.quality.files import Files
from benchmarks.quality.plan import (
    AFTER,
    IN_PARTS,
    NEXT_TOKENS,
    NO_PREFIX_CACHE,
    PART_TOKENS,
    WINDOW,
    YARDSTICK,
    Item,
)
from benchmarks.quality.prompts import Prompt, Prompts
from benchmarks.quality.questions import Document, Question, score

TEMPLATE_TOKENS = 90  # what template, question and begun answer may take of a context
FREE_TOKENS = 16  # a free answer may be this much longer than the gold one


@dataclass(frozen=True)
class Choice:
    """One column of the tables: a policy, a nominal ratio and a protocol."""

    policy: str
    keep: float
    protocol: str

    def setting(self, prompt: Prompt) -> Setting:
        if self.protocol == IN_PARTS:
            budget = round(self.keep * len(prompt.tokens))
            return Setting(self.policy, self.keep, budget=budget, part=PART_TOKENS)
        return Setting(self.policy, self.keep, prompt.document if self.protocol == AFTER else None)


FULL = Choice(NONE, 1.0, WINDOW)


class Runner:
    """Runs items on one engine. Each result is a dict that JSON can hold."""

    def __init__(self, engine: Engine, fp8_engine: Engine | None = None, files: Files | None = None) -> None:
        """fp8_engine: runs the choices whose policy is "fp8". files: has the documents of the suites of files."""
        self._engine, self._fp8_engine, self._files = engine, fp8_engine, files
        self._prompts = Prompts(engine.tokenizer)

    def run(self, item: Item, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        """The results of an item for `choices`, and for the full cache."""
        rows = []
        for index, (prompt, question) in enumerate(self._probes(item)):
            measure = self._free if item.suite == "ruler" else self._forced
            for choice, values in measure(prompt, question, choices):
                rows.append(
                    {
                        "item": item.name,
                        "probe": index,
                        "policy": choice.policy,
                        "keep": choice.keep,
                        "protocol": choice.protocol,
                        "prompt_tokens": len(prompt.tokens),
                        "retention": self._engine.retention(choice.setting(prompt), len(prompt.tokens)),
                        **values,
                    }
                )
        return rows

    def _probes(self, item: Item) -> Iterator[tuple[Prompt, Question | None]]:
        if item.suite == "text":
            text = texts.running_text(random.Random(f"text/{item.seed}"), 8 * (item.context + NEXT_TOKENS))
            tokens = self._prompts.encode(text)[: item.context]
            yield Prompt(tokens[:-NEXT_TOKENS], len(tokens) - NEXT_TOKENS, tokens[-NEXT_TOKENS:]), None
            return
        document = self._document(item)
        prompts = [self._prompts.ask(document, question) for question in document.questions]
        if item.suite == "turns":
            second = self._prompts.ask_again(prompts[0], prompts[0].gold, document.questions[1])
            yield second, document.questions[1]
        elif item.suite == "ruler":
            yield prompts[0], document.questions[0]
        else:
            yield from zip(prompts, document.questions, strict=True)

    def _document(self, item: Item) -> Document:
        if self._files and (found := self._files.document(item.suite, item.task, item.context, item.seed)):
            return found
        task = YARDSTICK if item.suite == "turns" else item.task
        return ruler.generate(task, item.context - TEMPLATE_TOKENS, item.seed, self._prompts.count)

    def _forced(
        self, prompt: Prompt, question: Question | None, choices: Sequence[Choice]
    ) -> Iterator[tuple[Choice, dict[str, Any]]]:
        full = Forced(prompt.gold, keep=True)
        self._engine.forced([(prompt.tokens, full, Setting())])
        jobs = [(c, Forced(prompt.gold, full_AV=full.reference())) for c in choices]
        if fp8 := [forced for choice, forced in jobs if choice.policy == FP8]:
            assert self._fp8_engine is not None, "no engine with an fp8 cache"
            self._fp8_engine.forced([(prompt.tokens, forced, Setting()) for forced in fp8])
        for skip_prefix_cache in (False, True):
            some = [(c, f) for c, f in jobs if (c.protocol == NO_PREFIX_CACHE) == skip_prefix_cache and c.policy != FP8]
            self._engine.forced(
                [(prompt.tokens, forced, choice.setting(prompt)) for choice, forced in some],
                skip_prefix_cache=skip_prefix_cache,
            )
        for choice, forced in [(FULL, full), *jobs]:
            yield choice, forced.counts(first_counts=choice.protocol in (AFTER, IN_PARTS))

    def _free(
        self, prompt: Prompt, question: Question | None, choices: Sequence[Choice]
    ) -> Iterator[tuple[Choice, dict[str, Any]]]:
        assert question is not None
        most = len(prompt.gold) + FREE_TOKENS
        for some in ([FULL], choices):
            outputs = self._engine.free([(prompt.tokens, most, choice.setting(prompt)) for choice in some])
            for choice, output in zip(some, outputs, strict=True):
                yield choice, {"score": score(question, output.outputs[0].text)}
