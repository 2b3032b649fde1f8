"""What a run measures: a list of items, each a prompt that all settings are tried on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.quality import ruler

WINDOW, AFTER, NO_PREFIX_CACHE = "window", "after", "window, no prefix cache"
"""Protocols: the question inside the observation window, or asked after the eviction; and the former without hits."""

SUITES = ("forced", "text", "turns", "ruler")
YARDSTICK = "niah_multikey_1"
FORCED_TASKS = (YARDSTICK, "niah_single_1", "niah_single_3", "niah_multikey_2", "copy")
NEXT_TOKENS = 64


@dataclass(frozen=True)
class Item:
    """suite: forced (a document's questions, gold answers forced), text (the next 64 tokens of running text), ruler
    (free answers), turns (two questions in one conversation). context: most tokens of document and question."""

    suite: str
    task: str
    context: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.task}/{self.context}/{self.seed}"


def items(
    suites: Sequence[str], contexts: Sequence[int], samples: Sequence[int], seed: int, tasks: Sequence[str] = ()
) -> Iterator[Item]:
    """All items of a run, sample by sample, so that a run that is stopped early has a bit of everything.

    samples: documents for each context. tasks: what "forced" and "ruler" are limited to; empty for all.
    """
    for number in range(max(samples)):
        for context, limit in zip(contexts, samples, strict=True):
            for suite in suites if number < limit else ():
                for task in tasks_of(suite):
                    if not tasks or task in tasks or task == suite:
                        yield Item(suite, task, context, seed + number)


def tasks_of(suite: str) -> tuple[str, ...]:
    """The tasks of a suite; the name of the suite itself where it has only one."""
    if suite == "forced":
        return FORCED_TASKS
    return tuple(task for task in ruler.TASKS if task != "copy") if suite == "ruler" else (suite,)
