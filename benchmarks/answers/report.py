"""The records of a folder, and tables of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.metrics import interval, mean

Row = dict[str, Any]
RECORDS = "records.jsonl"
FULL = "none"


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def key(row: Row) -> tuple[str, str, int]:
    return row["text"], row["policy"], row["budget"]


def write(rows: Sequence[Row], folder: Path) -> str:
    """Write `report.md` and `results.json`; returns the tables."""
    table = cells(rows)
    (folder / "results.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    text = markdown(table)
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def cells(rows: Sequence[Row]) -> list[Row]:
    """One for each suite, budget and policy: means over texts, 95 % intervals, and differences from the policy that
    comes first, on the texts that both have."""
    groups: dict[tuple[str, int], dict[str, dict[str, Row]]] = {}
    for row in rows:
        suite = row["text"].partition("/")[0]
        groups.setdefault((suite, row["budget"]), {}).setdefault(row["policy"], {})[row["text"]] = row
    found = []
    for (suite, budget), policies in sorted(groups.items()):
        first = next(iter(policies))
        for policy, own in policies.items():
            cell: Row = {"suite": suite, "budget": budget, "policy": policy, "texts": len(own)}
            for name in ("kl", "kl_before", "nll", "exact"):
                if values := [row[name] for row in own.values() if name in row]:
                    cell |= {name: mean(values), f"{name}_interval": interval(values, list(own))}
            both = [text for text in own if text in policies[first]]
            if policy != first and both:
                apart = [own[text]["kl"] - policies[first][text]["kl"] for text in both]
                cell |= {"against": first, "texts_of_both": len(both)}
                cell |= {"difference": mean(apart), "difference_interval": interval(apart, both)}
            found.append(cell)
    return found


def markdown(table: Sequence[Row]) -> str:
    lines = [
        "# Answers that are evicted while they are generated", "",
        "KL(full || evicted) in nats a token, means over texts; in brackets 95 % bootstrap intervals over texts, which",
        "of a few texts are too narrow. Running texts: all tokens behind the first eviction. Needles: tokens of the",
        "values that are asked for. Exact: values of which each token was the most likely one. Differences: from the",
        "first policy, text by text.",
    ]  # fmt: skip
    for suite in dict.fromkeys(cell["suite"] for cell in table):
        own = [cell for cell in table if cell["suite"] == suite]
        full = next((cell for cell in own if cell["policy"] == FULL), None)
        lines += ["", f"## {suite}", ""]
        if full:
            right = f"; exact {full['exact']:.2f}" if "exact" in full else ""
            lines += [f"Full cache beside itself: {full['kl']:.6f}{right} ({full['texts']} texts).", ""]
        exact = any("exact" in cell for cell in own)
        lines += [f"| budget | policy | texts | KL |{' exact |' if exact else ''} difference |"]
        lines += [f"| ---: | --- | ---: | ---: |{' ---: |' if exact else ''} ---: |"]
        for cell in own:
            if cell["policy"] == FULL:
                continue
            columns = [cell["budget"], f"`{cell['policy']}`", cell["texts"], _with_interval(cell, "kl")]
            columns += [f"{cell['exact']:.2f}"] if exact else []
            columns += [_with_interval(cell, "difference", "+") if "difference" in cell else "-"]
            lines.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(lines) + "\n"


def _with_interval(cell: Row, name: str, sign: str = "") -> str:
    """Three digits; no interval where there is one text."""
    low, high = cell[f"{name}_interval"]
    alone = cell["texts_of_both" if name == "difference" else "texts"] == 1
    return f"{cell[name]:{sign}.3g}" + ("" if alone else f" [{low:{sign}.3g}, {high:{sign}.3g}]")
