"""Tables and plots from the records of a folder: `results.json`, `report.md`, and plots if matplotlib is there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.quality import metrics, paired, ruler
from benchmarks.quality.engine import FP8
from benchmarks.quality.plan import AFTER, IN_PARTS, NO_PREFIX_CACHE, PART_TOKENS, WINDOW

Row = dict[str, Any]
_VALUES = ("kl", "kl_with_first", "nll", "exact", "score")
OLD_COUNT = "Measured by the old count, which leaves the first token of an answer out here too.\n"
_PROTOCOLS = {
    WINDOW: "question in the window",
    AFTER: "question after the eviction",
    NO_PREFIX_CACHE: NO_PREFIX_CACHE,
    IN_PARTS: f"prompt read in parts of {PART_TOKENS} tokens",
}


def write(rows: list[Row], folder: Path) -> str:
    """Write all files; returns one line that says where."""
    if not rows:
        return f"no records in {folder}"
    table = summarise(rows)
    runs = _runs(folder)
    pairs = [cell for first, second in paired.PAIRS for cell in paired.compare(rows, first, second)]
    results = json.dumps({"runs": runs, "cells": table, "pairs": pairs}, indent=1)
    (folder / "results.json").write_text(results, encoding="utf-8")
    text = markdown(table) + paired.markdown(rows) + _costs(runs)
    (folder / "report.md").write_text(text, encoding="utf-8")
    try:
        from benchmarks.quality import plots
    except ImportError:
        return f"{folder / 'report.md'} (no plots: matplotlib is not installed)"
    plots.draw(table, folder)
    return str(folder / "report.md")


def _runs(folder: Path) -> list[Row]:
    path = folder / "runs.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def summarise(rows: Iterable[Row]) -> list[Row]:
    """One cell per (suite, task, context, protocol, policy, keep): means, intervals over documents, the worst 5 %."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        suite, task, context, _seed = row["item"].split("/")
        key = (suite, task, int(context), row["protocol"], row["policy"], row["keep"])
        groups.setdefault(key, []).append(row)
    return [_cell(key, members) for key, members in groups.items()]


def _cell(key: tuple[Any, ...], members: list[Row]) -> Row:
    suite, task, context, protocol, policy, keep = key
    cell: Row = {
        "suite": suite,
        "task": task,
        "context": context,
        "protocol": protocol,
        "policy": policy,
        "keep": keep,
        "probes": len(members),
        "documents": len({m["item"] for m in members}),
        "retention": metrics.mean([m["retention"] for m in members]),
    }
    for name in _VALUES:
        values = [m[name] for m in members if name in m]
        if values:
            cell[name] = metrics.mean(values)
            cell[f"{name}_interval"] = metrics.interval(values, [m["item"] for m in members if name in m])
            if len(values) < len(members):  # some were measured by the old count
                cell[f"{name}_answers"] = len(values)
            if name in ("kl", "nll"):
                cell[f"{name}_worst"] = metrics.worst(values)
    return cell


# -- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(table: list[Row]) -> str:
    """The tables of all policies."""
    parts = [
        "# Quality: measured through the engine\n",
        "Cells are means over questions; in brackets the 95 % bootstrap interval over documents. KL is "
        "KL(full || evicted) in nats a token, on the tokens of the right answer, the first one left out; `with first`: "
        "that one too, where the question comes after the eviction and what was kept decides it. `kept` is "
        "what is really held of the prompt's KV cache, whole pages and the tail included.\n",
    ]
    for suite, task, context in sorted({(c["suite"], c["task"], c["context"]) for c in table}):
        cells = [c for c in table if (c["suite"], c["task"], c["context"]) == (suite, task, context)]
        if suite != "ruler":
            parts += [_forced_table(suite, task, context, cells)]
    for context in sorted({c["context"] for c in table if c["suite"] == "ruler"}):
        parts += [_ruler_table(context, [c for c in table if c["suite"] == "ruler" and c["context"] == context])]
    return "\n".join(parts)


def _forced_table(suite: str, task: str, context: int, cells: list[Row]) -> str:
    full = next(c for c in cells if c["policy"] == "none")
    fp8 = next((c for c in cells if c["policy"] == FP8), None)
    cells = [c for c in cells if c["policy"] != FP8]
    keeps = sorted({c["keep"] for c in cells if c["policy"] != "none"}, reverse=True)
    lines = [
        f"\n## {suite}: {task}, {context} tokens\n",
        f"{full['probes']} answers from {full['documents']} documents. Full cache: exact answers {full['exact']:.2f}, "
        f"NLL {full['nll']:.3f}.",
        f"Nothing evicted, the cache in fp8 (half the memory): KL {_with_interval(fp8, 'kl')}.\n" if fp8 else "",
    ]
    for protocol in dict.fromkeys(c["protocol"] for c in cells if c["policy"] != "none"):
        here = [c for c in cells if c["protocol"] == protocol and c["policy"] != "none"]
        kept = {k: metrics.mean([c["retention"] for c in here if c["keep"] == k]) for k in keeps}
        lines.append(f"### {_PROTOCOLS[protocol]}\n")
        extra = keeps if any("kl_with_first" in c for c in here) else []
        if protocol == AFTER and not extra:
            lines.append(OLD_COUNT)
        lines.append(
            "| policy | "
            + " | ".join(f"KL, keep {k:g} (kept {kept[k]:.3f})" for k in keeps)
            + "".join(f" | with first, {k:g}" for k in extra)
            + " | worst 5 % | exact |"
        )
        lines.append("| --- |" + " ---: |" * (len(keeps) + len(extra) + 2))
        for policy in dict.fromkeys(c["policy"] for c in here):
            by_keep = {c["keep"]: c for c in here if c["policy"] == policy}
            lines.append(
                f"| {policy} | "
                + " | ".join(_with_interval(by_keep.get(k), "kl") for k in keeps)
                + "".join(f" | {_with_interval(by_keep.get(k), 'kl_with_first')}" for k in extra)
                + " | "
                + " / ".join(f"{by_keep[k]['kl_worst']:.2f}" if k in by_keep else "-" for k in keeps)
                + " | "
                + " / ".join(f"{by_keep[k]['exact']:.2f}" if k in by_keep else "-" for k in keeps)
                + " |"
            )
        lines.append("")
    return "\n".join(lines)


def _ruler_table(context: int, cells: list[Row]) -> str:
    tasks = [t for t in ruler.TASKS if any(c["task"] == t for c in cells)]
    count = max(c["documents"] for c in cells)
    lines = [
        f"\n## RULER tasks, {context} tokens, free answers\n",
        f"String match, {count} samples a task at most. {', '.join(ruler.JUDGE_NOTHING)} are beyond a model of this "
        "size: no policy is judged by them.\n",
        "| policy | keep | protocol | " + " | ".join(tasks) + " |",
        "| --- | ---: | --- |" + " ---: |" * len(tasks),
    ]
    rows = dict.fromkeys((c["policy"], c["keep"], c["protocol"]) for c in cells)
    for policy, keep, protocol in sorted(rows, key=lambda r: (r[0] != "none", -r[1], r[2] != WINDOW)):
        scores = {c["task"]: c for c in cells if (c["policy"], c["keep"], c["protocol"]) == (policy, keep, protocol)}
        where = "" if policy == "none" else protocol
        values = " | ".join(f"{scores[t]['score']:.2f}" if t in scores else "-" for t in tasks)
        lines.append(f"| {policy if policy != 'none' else 'full cache'} | {keep:g} | {where} | {values} |")
    return "\n".join(lines)


def _with_interval(cell: Row | None, name: str) -> str:
    if cell is None or name not in cell:
        return "-"
    low, high = cell[f"{name}_interval"]
    digits = 3 if cell[name] < 0.1 else 2
    some = f" ({cell[f'{name}_answers']} answers)" if f"{name}_answers" in cell else ""
    return f"{cell[name]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{some}"


def _costs(runs: list[Row]) -> str:
    lines = ["\n## Runs\n"]
    for run in runs:
        each = ", ".join(f"{k} {v:g}" for k, v in run["seconds_per_item_and_setting"].items())
        lines += [
            f"- `{run['command']}`: {run['seconds']:.0f} s ({run['dtype']}, {run['page_tokens']} tokens a page; "
            f"seconds per item and setting: {each})"
        ]
    if runs:
        last = runs[-1]
        lines += [f"\nText: {last['text']}. vLLM {last['vllm']}, torch {last['torch']}, Python {last['python']}."]
    return "\n".join(lines) + "\n"
