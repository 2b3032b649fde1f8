"""Two policies on the same answers: the mean of their differences, surer than the difference of two means."""

from __future__ import annotations

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


def compare(rows: list[Row], first: str, second: str) -> list[Row]:
    """KL of `first` minus KL of `second`, for each (suite, task, context, protocol, keep) that has both."""
    by_answer = {(r["item"], r["probe"], r["protocol"], r["keep"], r["policy"]): r["kl"] for r in rows if "kl" in r}
    groups: dict[tuple[str, ...], list[tuple[float, float, str]]] = {}
    for (item, probe, protocol, keep, policy), kl in by_answer.items():
        other = by_answer.get((item, probe, protocol, keep, second))
        if policy == first and other is not None:
            suite, task, context, _seed = item.split("/")
            groups.setdefault((suite, task, context, protocol, str(keep)), []).append((kl, other, item))
    return [
        {
            "first": first,
            "second": second,
            **dict(zip(("suite", "task", "context", "protocol", "keep"), key, strict=True)),
            "answers": len(found),
            "kl_first": metrics.mean([a for a, _, _ in found]),
            "kl_second": metrics.mean([b for _, b, _ in found]),
            "difference": metrics.mean([a - b for a, b, _ in found]),
            "difference_interval": metrics.interval([a - b for a, b, _ in found], [item for *_, item in found]),
        }
        for key, found in groups.items()
    ]


def markdown(rows: list[Row]) -> str:
    """A table for each pair that was measured."""
    parts = [
        "\n## Pairs, on the same answers\n",
        "KL of the first minus KL of the second; below zero: the first is better.\n",
    ]
    for first, second in PAIRS:
        cells = compare(rows, first, second)
        if not cells:
            continue
        cells.sort(
            key=lambda c: (c["suite"], c["task"], int(c["context"]), c["protocol"] != "window", -float(c["keep"]))
        )
        parts.append(f"### {first} against {second}\n")
        parts.append("| task | tokens | question | keep | answers | first | second | difference |")
        parts.append("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
        for c in cells:
            low, high = c["difference_interval"]
            parts.append(
                f"| {c['task']} | {c['context']} | {c['protocol']} | {c['keep']} | {c['answers']} | "
                f"{c['kl_first']:.4f} | {c['kl_second']:.4f} | {c['difference']:+.4f} [{low:+.4f}, {high:+.4f}] |"
            )
        parts.append("")
    return "\n".join(parts)
