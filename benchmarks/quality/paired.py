"""Two policies on the same answers: the mean of their differences, surer than the difference of two means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.quality import metrics

Row = dict[str, Any]

PAIRS = (
    ("halokv", "layer-defensivekv"),
    ("layer-defensivekv", "defensivekv"),
    ("criticalkv@value_weight=l2-gram", "criticalkv"),
    ("defensivekv@value_weight=l2-gram", "defensivekv"),
    ("layer-defensivekv@value_weight=l2-gram", "layer-defensivekv"),
)
Answers = dict[tuple[str, int], dict[str, float]]
"""By document and question, and then by policy."""
CELL = ("suite", "task", "context", "protocol", "keep")
COUNT_NAMES = {"kl": "Without the first token", "kl_with_first": "With the first token"}


def by_cell(rows: Sequence[Row], count: str = "kl") -> dict[tuple[str, ...], Answers]:
    """The answers of each cell, whose fields are `CELL`, as far as they have a value of `count`."""
    cells: dict[tuple[str, ...], Answers] = {}
    for row in rows:
        if count in row:
            suite, task, context, _seed = row["item"].split("/")
            answers = cells.setdefault((suite, task, context, row["protocol"], str(row["keep"])), {})
            answers.setdefault((row["item"], row["probe"]), {})[row["policy"]] = row[count]
    return cells


def in_order(cell: Row) -> tuple[Any, ...]:
    """A key that sorts rows of tables by what a cell is."""
    return cell["suite"], cell["task"], int(cell["context"]), cell["protocol"] != "window", -float(cell["keep"])


def compare(rows: Sequence[Row], first: str, second: str) -> list[Row]:
    """KL of `first` minus KL of `second`, for each cell that has both."""
    found = {
        cell: [(kl[first], kl[second], item) for (item, _probe), kl in answers.items() if {first, second} <= set(kl)]
        for cell, answers in by_cell(rows).items()
    }
    return [
        {
            "first": first,
            "second": second,
            **dict(zip(CELL, cell, strict=True)),
            "answers": len(both),
            "kl_first": metrics.mean([a for a, _, _ in both]),
            "kl_second": metrics.mean([b for _, b, _ in both]),
            "difference": metrics.mean([a - b for a, b, _ in both]),
            "difference_interval": metrics.interval([a - b for a, b, _ in both], [item for *_, item in both]),
        }
        for cell, both in found.items()
        if both
    ]


def markdown(rows: Sequence[Row]) -> str:
    """A table for each pair that was measured."""
    parts = [
        "\n## Pairs, on the same answers\n",
        "KL of the first minus KL of the second; below zero: the first is better.\n",
    ]
    for first, second in PAIRS:
        cells = compare(rows, first, second)
        if not cells:
            continue
        parts.append(f"### {first} against {second}\n")
        parts.append("| task | tokens | question | keep | answers | first | second | difference |")
        parts.append("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
        for c in sorted(cells, key=in_order):
            low, high = c["difference_interval"]
            parts.append(
                f"| {c['task']} | {c['context']} | {c['protocol']} | {c['keep']} | {c['answers']} | "
                f"{c['kl_first']:.4f} | {c['kl_second']:.4f} | {c['difference']:+.4f} [{low:+.4f}, {high:+.4f}] |"
            )
        parts.append("")
    return "\n".join(parts)
