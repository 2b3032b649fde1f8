"""What a run measures: a list of items, each a prompt that all settings are tried on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.quality import ruler
from benchmarks.quality.files import FILES, Files

WINDOW, AFTER, NO_PREFIX_CACHE, IN_PARTS = "window", "after", "window, no prefix cache", "parts"
"""Protocols: the question inside the observation window, or asked after the eviction; the former without hits; and the
whole prompt read in parts, each over what was kept of those before, never more than the ratio's tokens of it."""
PROTOCOLS = (WINDOW, AFTER, NO_PREFIX_CACHE, IN_PARTS)

SUITES = ("forced", "text", "turns", "ruler")
FILE_SUITES = tuple(FILES)
CONTRACT_SUITES = ("forced", "text")
YARDSTICK = "niah_multikey_1"
FORCED_TASKS = (YARDSTICK, "niah_single_2", "niah_worded", "niah_single_1", "niah_single_3", "niah_multikey_2", "copy")
"""The yardstick's four needles are alike; beside them stand a single one, and four that share no words."""
NEXT_TOKENS = 64
PART_TOKENS = 512


@dataclass(frozen=True)
class Item:
    """suite: forced (a document's questions, gold answers forced), text (the next 64 tokens of running text), ruler
    (free answers), turns (two questions in one conversation); of files (gold answers forced) those of `FILES`. context:
    most tokens of document and question. seed: of a file the document at this place, of those that fit."""

    suite: str
    task: str
    context: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.suite}/{self.task}/{self.context}/{self.seed}"


def items(
    suites: Sequence[str],
    contexts: Sequence[int],
    samples: Sequence[int],
    seed: int,
    tasks: Sequence[str] = (),
    files: Files | None = None,
) -> Iterator[Item]:
    """All items of a run, sample by sample, so that a run that is stopped early has a bit of everything.

    samples: documents for each context. tasks: what suites of several tasks are limited to; empty for all. files: of
    the suites that are read from files, which end where the files do.
    """
    for number in range(max(samples)):
        for context, limit in zip(contexts, samples, strict=True):
            for suite in suites if number < limit else ():
                for task in tasks_of(suite, files):
                    item = Item(suite, task, context, seed + number)
                    if (not tasks or task in tasks or task == suite) and _exists(item, files):
                        yield item


def _exists(item: Item, files: Files | None) -> bool:
    if item.suite not in FILE_SUITES:
        return True
    return files is not None and files.document(item.suite, item.task, item.context, item.seed) is not None


def tasks_of(suite: str, files: Files | None = None) -> tuple[str, ...]:
    """The tasks of a suite; the name of the suite itself where it has only one."""
    if suite in FILE_SUITES:
        return files.tasks(suite) if files else ()
    if suite == "forced":
        return FORCED_TASKS
    return tuple(task for task in ruler.TASKS if task not in ruler.NOT_RULERS) if suite == "ruler" else (suite,)
