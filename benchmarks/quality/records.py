"""Results on disk, a line of JSON each, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.engine import FP8
from benchmarks.quality.plan import AFTER, NO_PREFIX_CACHE, WINDOW, Item
from benchmarks.quality.protocols import Choice

FILE = "records.jsonl"


class Records:
    """All results of a folder. One more line per (item, probe, policy, keep, protocol); never changed afterwards."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        self.rows: list[dict[str, Any]] = []
        packed = self._path.with_suffix(".jsonl.gz")  # as a run is committed
        if packed.exists() and not self._path.exists():
            self._path.write_bytes(gzip.decompress(packed.read_bytes()))
        if self._path.exists():
            self.rows = [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]
        self._done = {self._key(row) for row in self.rows}

    @staticmethod
    def _key(row: dict[str, Any]) -> tuple[str, str, float, str]:
        return row["item"], row["policy"], row["keep"], row["protocol"]

    def missing(self, item: Item, choices: Sequence[Choice]) -> list[Choice]:
        """Those of `choices` that this item has no results for."""
        return [c for c in choices if (item.name, c.policy, c.keep, c.protocol) not in self._done]

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append the results of one item in one write; the full cache's only the first time."""
        new = [row for row in rows if self._key(row) not in self._done]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in new))
        self.rows += new
        self._done.update(self._key(row) for row in new)


def choices_for(item: Item, policies: Sequence[str], keeps: Sequence[float], protocols: Sequence[str]) -> list[Choice]:
    """The settings that make sense for an item."""
    wanted = {
        "text": [p for p in protocols if p != AFTER],  # nothing is asked, so there is nothing to ask later
        "turns": [WINDOW, NO_PREFIX_CACHE],
    }.get(item.suite, list(protocols))
    choices = [
        Choice(policy, keep, protocol) for protocol in wanted for policy in policies if policy != FP8 for keep in keeps
    ]
    return [*choices, Choice(FP8, 1.0, WINDOW)] if FP8 in policies and item.suite != "ruler" else choices
