"""Tables of what was measured."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from typing import Any

STOCK = "stock"
_ABOUT = """\
Random weights, all requests at once, medians. Beyond prefill: ratio of the time that is left when that of the same load
with answers of two tokens is taken off. Alone: one request at a time."""


def report(records: list[dict[str, Any]]) -> str:
    """Markdown, a table for each load on each machine. Rows that were measured again count once, the last time."""
    lines = ["# Engines", "", _ABOUT]
    groups: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        of = ("model", "prompt", "output", "requests", "pool", "graphs", "chunk", "block", "machine")
        groups[json.dumps([record[name] for name in of])][_name(record)] = record
    for rows in groups.values():
        group = list(rows.values())
        load = "{model}: {requests} x ({prompt} + {output}) tokens, a pool of {pool:g}, graphs: {graphs}"
        lines += ["", f"## {load.format(**group[0])}", ""]
        lines += [", ".join(f"{name} {value}" for name, value in group[0]["machine"].items()), ""]
        lines += ["| row | output tok/s | to stock | beyond prefill | peak running | evictions, s | preemptions |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
        loaded = [record for record in group if record["loads"]]
        stock = next((_rates(record) for record in loaded if record["row"] == STOCK), None)
        for record in loaded:
            rate, seconds = _rates(record)
            ratios = ["-", "-"] if stock is None else [f"{rate / stock[0]:.2f}", f"{stock[1] / seconds:.2f}"]
            peak = max(one["peak_running"] for one in record["loads"])
            spent = statistics.median(one["eviction_seconds"] for one in record["loads"])
            thrown = sum(one["preemptions"] for one in record["loads"])
            cells = [_name(record), f"{rate:.0f}", *ratios, f"{peak}", f"{spent:.2f}", f"{thrown:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "| alone | TTFT, ms | eviction, ms | of the TTFT | its memory, MiB | decode step, ms |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
        for record in group:
            for name, one in record["alone"].items():
                share = one["eviction_ms"] / one["ttft_ms"]
                cells = [f"{_name(record)}: {name}, {one['tokens']} tokens", f"{one['ttft_ms']:.1f}"]
                memory = f"{one['eviction_mib']:.0f}" if one.get("eviction_mib") else "-"
                cells += [f"{one['eviction_ms']:.2f}", f"{share:.1%}", memory, f"{one['step_ms']:.2f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _name(record: dict[str, Any]) -> str:
    return STOCK if record["row"] == STOCK else f"{record['row']} {record['keep']:g}"


def _rates(record: dict[str, Any]) -> tuple[float, float]:
    """Median output throughput, and median seconds beyond those of the same load with answers of two tokens."""
    beyond = [one["seconds"] - record["prefill"]["seconds"] for one in record["loads"]]
    return statistics.median(one["output_throughput"] for one in record["loads"]), statistics.median(beyond)
