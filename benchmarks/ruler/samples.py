"""Samples of RULER's tasks, each cut into context, question and the answer's beginning.

The cut is where the template of the package has it: what stands before and in place of `{context}` is the context,
what comes after it (without the blank before it) the question, and the task's `answer_prefix` begins the answer. Where
a task shows a worked example first (`vt`, `cwe`), that belongs to the context, so all is looked for from the end.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ruler import package
from benchmarks.ruler.package import Task

FILE, NO_MORE = "validation.jsonl", "no-more.txt"


@dataclass(frozen=True)
class Sample:
    """context + question + answer_prefix is the text that RULER made, at most `length` tokens with the answer. index:
    its number in the task's file. references: strings that RULER looks for in the answer. most: tokens of an answer."""

    task: str
    length: int
    index: int
    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    most: int


def split(task: Task, length: int, row: Mapping[str, Any]) -> Sample:
    """A line of a task's file as a `Sample`; ValueError if the template's parts are not in it."""
    text = row["input"]
    prefix_at = text.rfind(_fixed_beginning(task.answer_prefix))
    question_at = max(text.rfind(beginning, 0, prefix_at) for beginning in _question_beginnings(task))
    if question_at < 0 or prefix_at < 0:
        raise ValueError(f"{task.name}, sample {row['index']}: no question or no beginning of an answer in it")
    parts = text[:question_at], text[question_at:prefix_at], text[prefix_at:]
    return Sample(task.name, length, row["index"], *parts, tuple(row["outputs"]), task.tokens_to_generate)


def _fixed_beginning(template: str) -> str:
    return template.partition("{")[0]


def _question_beginnings(task: Task) -> tuple[str, str]:
    """As the template has it, and in the singular that the needles' generator makes of it to ask for one value."""
    beginning = _fixed_beginning(task.template.partition("{context}")[2].lstrip())
    return beginning, beginning.replace("are all", "is")


def load(root: Path, task: Task, tokenizer: Path, length: int, count: int, cache: Path = package.CACHE) -> list[Sample]:
    """The first `count` samples of `task` with at most `length` tokens, made if there are not as many yet.

    tokenizer: folder of the model. Fewer where the next one cannot be made as short. RuntimeError if a generator fails.
    """
    folder = cache / "data" / _name_of(tokenizer) / str(length) / task.name
    if len(_read(folder)) < count and not (folder / NO_MORE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        _make(root, task, tokenizer, length, count, folder)
    return [split(task, length, row) for row in _read(folder)[:count]]


def _make(root: Path, task: Task, tokenizer: Path, length: int, count: int, folder: Path) -> None:
    """Put `count` samples into `folder`, or as many as can be made, with a note that there are no more."""
    with tempfile.TemporaryDirectory(prefix=".making-", dir=folder.parent) as scratch:
        made = Path(scratch)
        try:
            package.generate(root, task, tokenizer, length, count, made)
        except package.DoesNotFit as error:
            if error.fitting:
                package.generate(root, task, tokenizer, length, error.fitting, made)
            (folder / NO_MORE).write_text(f"{error}\n", encoding="utf-8")
        if (made / task.name / FILE).exists():
            (made / task.name / FILE).replace(folder / FILE)


def _read(folder: Path) -> list[dict[str, Any]]:
    file = folder / FILE
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _name_of(tokenizer: Path) -> str:
    """Sizes are in the tokenizer's tokens, so models that share it share the samples."""
    return hashlib.sha256((tokenizer / "tokenizer.json").read_bytes()).hexdigest()[:12]
