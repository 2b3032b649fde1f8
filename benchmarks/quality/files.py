"""Documents of others, read from files: LongBench-E (THUDM/LongBench) and KV retrieval (nelson-liu/lost-in-the-middle).

Samples are taken whole, in the files' order, and a document is measured where it fits its context whole. What is asked
of it, and how, is worded here.
"""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.quality.prompts import Prompts
from benchmarks.quality.questions import Document, Question

Sample = dict[str, Any]

LONGBENCH, KV_RETRIEVAL = "longbench", "kv-retrieval"
FILES = {LONGBENCH: "longbench-e.jsonl", KV_RETRIEVAL: "kv-retrieval-75.jsonl"}
"""A line of JSON for each sample; packed by gzip or xz, as the name's ending says, or plain."""
_OPEN = {"": open, ".gz": gzip.open, ".xz": lzma.open}
KV_QUESTIONS = 4

_BRIEFLY = "{input} Answer with as few words as you can."
_ASKED = {
    "qasper_e": (_BRIEFLY, "Answer:"),
    "multifieldqa_en_e": (_BRIEFLY, "Answer:"),
    "hotpotqa_e": (_BRIEFLY, "Answer:"),
    "2wikimqa_e": (_BRIEFLY, "Answer:"),
    "gov_report_e": ("Summarise the report above.", "Summary:"),
    "multi_news_e": ("Summarise the news above.", "Summary:"),
    "passage_count_e": ("Some of the paragraphs above are repeated. How many different ones are there?", "Answer:"),
    "passage_retrieval_en_e": ("Which of the paragraphs above does this summarise?\n\n{input}", "Answer:"),
    "lcc_e": ("Which line of code comes next?", "Next line:\n"),
    "repobench-p_e": ("With the code above in mind, which line comes next in this file?\n\n{input}", "Next line:\n"),
}
"""Of each LongBench task the question, and how its answer begins."""
_EXAMPLES = ("trec_e", "triviaqa_e", "samsum_e")
"""Tasks whose context is a row of examples: the question is one more, and its last line begins the answer."""


def read(folder: Path, suite: str) -> Iterator[Sample]:
    """The samples of a suite's file. Raises FileNotFoundError that names the file."""
    for ending, opener in _OPEN.items():
        path = folder / f"{FILES[suite]}{ending}"
        if path.exists():
            with opener(path, "rt", encoding="utf-8") as file:
                yield from map(json.loads, file)
            return
    raise FileNotFoundError(f"{folder / FILES[suite]}, or the same with .gz or .xz, is not there")


def longbench(sample: Sample, number: int) -> Document:
    """The one question of a sample; any of its answers is right, the first one is forced."""
    task, answer = sample["dataset"], sample["answers"][0]
    if task in _EXAMPLES:
        text, _, prefix = sample["input"].rstrip().rpartition("\n")
    elif task in _ASKED:
        text, prefix = _ASKED[task][0].format(input=sample["input"]), _ASKED[task][1]
    else:
        raise ValueError(f"LongBench task {task!r}: choose samples of {', '.join([*_ASKED, *_EXAMPLES])}")
    gold = answer.rstrip() if prefix.endswith("\n") else f" {answer.strip()}"
    return Document(task, number, sample["context"], (Question(text, prefix, gold, tuple(sample["answers"]), "any"),))


def kv_retrieval(sample: Sample, number: int) -> Document:
    """An object of random keys and values: the key that the sample asks for, and some more of the same object."""
    values = dict(sample["ordered_kv_records"])
    others = [key for key in values if key != sample["key"]]
    more = random.Random(f"{KV_RETRIEVAL}/{number}").sample(others, min(KV_QUESTIONS - 1, len(others)))
    intro = "Below is a JSON object. You will be asked for the values of some of its keys.\n\n"
    questions = tuple(
        Question(f'Which value does the key "{key}" have?', f'The key "{key}" has the value "', value, (value,))
        for key, value in ((key, values[key]) for key in (sample["key"], *more))
    )
    return Document(KV_RETRIEVAL, number, intro + json.dumps(values, indent=1), questions)


_MAKE = {LONGBENCH: longbench, KV_RETRIEVAL: kv_retrieval}


class Files:
    """The documents of a folder, by suite and task. A suite whose file is missing has no tasks; `missing` says so."""

    def __init__(self, folder: Path, prompts: Prompts) -> None:
        self._prompts = prompts
        self._documents: dict[str, dict[str, list[Document]]] = {suite: {} for suite in FILES}
        self._fitting: dict[tuple[str, str, int], tuple[list[Document], Iterator[Document]]] = {}
        self.missing: list[str] = []
        for suite in FILES:
            try:
                self._load(folder, suite)
            except FileNotFoundError as error:
                self.missing.append(f"{suite}: {error}")

    def _load(self, folder: Path, suite: str) -> None:
        for number, sample in enumerate(read(folder, suite)):
            document = _MAKE[suite](sample, number)
            self._documents[suite].setdefault(document.task, []).append(document)

    def tasks(self, suite: str) -> tuple[str, ...]:
        return tuple(self._documents[suite])

    def document(self, suite: str, task: str, context: int, number: int) -> Document | None:
        """Of a task's documents that fit into `context` tokens, question and answer included, the one at `number`."""
        key = suite, task, context
        if key not in self._fitting:
            everything = self._documents.get(suite, {}).get(task, [])
            self._fitting[key] = [], (document for document in everything if self._fits(document, context))
        found, rest = self._fitting[key]  # counting tokens takes time: no more documents than are asked for
        found += islice(rest, max(0, number + 1 - len(found)))
        return found[number] if number < len(found) else None

    def _fits(self, document: Document, context: int) -> bool:
        """Answers of one token are left out too: there is nothing after the first to compare."""
        prompts = (self._prompts.ask(document, question) for question in document.questions)
        return all(len(p.tokens) + len(p.gold) <= context and len(p.gold) > 1 for p in prompts)
