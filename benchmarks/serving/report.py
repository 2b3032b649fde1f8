"""Tables and plots of what has been measured."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.dummies import model_folder
from benchmarks.serving.scenarios import BLOCK_SIZE
from vllm_defensive.settings.engine import EvictionConfig
from vllm_defensive.tools.cache_size import load_config, read_model
from vllm_defensive.tools.planner import plan

Record = dict[str, Any]
STOCK = "stock"


def read(file: Path) -> list[Record]:
    """The records of a file; of a round that was measured again, the last ones."""
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return list({(r["scenario"], r["row"], r["repeat"]): r for r in records}.values())


def cells(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One cell for each scenario and row: medians, and ratios to stock vLLM round by round."""
    table = []
    for r in records:
        # What answers take beyond the prompts; nothing is left to compare where that drowns in the noise.
        beyond = r["duration"] - r["prefill_seconds"]
        r["decode_throughput"] = r["total_output_tokens"] / beyond if beyond > 0.05 * r["duration"] else None
        # While any runs: the load generator takes a while to start, and the last looks may find the server idle.
        running = [sample[1] for sample in r["samples"] if sample[1]]
        r["mean_running"] = statistics.fmean(running) if running else None
    for scenario in dict.fromkeys(r["scenario"] for r in records):
        rounds = [r for r in records if r["scenario"] == scenario]
        stock = {r["repeat"]: r for r in rounds if r["row"] == STOCK}
        for row in dict.fromkeys(r["row"] for r in rounds):
            mine = [r for r in rounds if r["row"] == row]

            def median(name: str, mine: list[Record] = mine) -> float | None:
                return _median(mine, name)

            def ratio(name: str, mine: list[Record] = mine, stock: dict[int, Record] = stock) -> list[float]:
                return _ratio(mine, stock, name)

            table.append(
                {
                    **{k: mine[0][k] for k in ("scenario", "row", "model", "prompt", "output", "requests", "pool")},
                    "rounds": len(mine),
                    "planned": planned(mine[0]),
                    "throughput_ratio": ratio("output_throughput"),
                    "ttft_ratio": ratio("mean_ttft_ms"),
                    "tpot_ratio": ratio("median_tpot_ms"),
                    "duration_ratio": ratio("duration"),
                    # Answers' tokens a second beside the time that the prompts alone take, and what would be left of
                    # stock's time if answers took none: no eviction can be faster.
                    "decode_ratio": ratio("decode_throughput"),
                    "bound": [
                        statistics.median(r["duration"] for r in stock.values()) / median("prefill_seconds")
                    ]
                    if stock
                    else [],
                    "eviction_share": _share(median("eviction_seconds"), median("duration")),
                    **{
                        name: median(name)
                        for name in (
                            "peak_running", "mean_running", "peak_pool", "preemptions", "evicted", "freed_blocks",
                            "eviction_seconds",
                            "request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms",
                            "median_tpot_ms", "p99_tpot_ms", "median_itl_ms", "p99_itl_ms",
                        )
                    },
                }
            )  # fmt: skip
    return table


def _median(mine: Sequence[Record], name: str) -> float | None:
    values = [r[name] for r in mine if r.get(name) is not None]
    return statistics.median(values) if values else None


def _ratio(mine: Sequence[Record], stock: dict[int, Record], name: str) -> list[float]:
    """Median, least and greatest of the ratios to stock vLLM's record of the same round; empty where there are none."""
    pairs = [(r.get(name), stock[r["repeat"]].get(name)) for r in mine if r["repeat"] in stock]
    ratios = [ours / theirs for ours, theirs in pairs if ours is not None and theirs is not None]
    return [statistics.median(ratios), min(ratios), max(ratios)] if ratios else []


_TOLD_APART = (
    "request_throughput", "first_throughput", "later_throughput", "median_ttft_ms", "p90_ttft_ms",
    "first_median_ttft_ms", "first_p90_ttft_ms", "later_median_ttft_ms", "later_p90_ttft_ms",
)  # fmt: skip


def told_apart(records: Sequence[Record]) -> list[dict[str, Any]]:
    """`cells` of records that tell the first round from later ones: of loads in which texts come again."""
    table = []
    for scenario in dict.fromkeys(r["scenario"] for r in records):
        measured = [r for r in records if r["scenario"] == scenario]
        stock = {r["repeat"]: r for r in measured if r["row"] == STOCK}
        for row in dict.fromkeys(r["row"] for r in measured):
            mine = [r for r in measured if r["row"] == row]
            about = ("scenario", "row", "model", "prompt", "output", "requests", "pool", "rounds", "asked_tokens")
            counted = ("computed_tokens", "echo_tokens", "adoptions", "evicted", "published", "lost", "preemptions")
            table.append(
                {
                    **{name: mine[0][name] for name in about},
                    "repeats": len(mine),
                    **{name: _median(mine, name) for name in (*_TOLD_APART, *counted, "peak_running", "peak_pool")},
                    **{f"{name}_ratio": _ratio(mine, stock, name) for name in _TOLD_APART},
                }
            )
    return table


def _told_apart_lines(table: Sequence[Record]) -> list[str]:
    columns = (
        "model", "load", "server", "requests/s", "first round", "later rounds", "TTFT, median", "TTFT, p90",
        "later TTFT, median", "later TTFT, p90", "tokens computed", "for a second look", "hits", "evictions", "lost",
        "preemptions", "running at peak",
    )  # fmt: skip
    lines = [
        "## Texts that come again", "",
        "Ratios to stock vLLM of the same run, with the smallest and the largest of the runs, and in brackets the",
        "median itself: requests a second over the whole run, until as many were answered as the first round has, and",
        "from there on; time to the first token, in seconds. Tokens computed: of those of the documents (of chats: of",
        "the prompts), each as often as it was asked about. Hits: requests that began with a packing of an earlier",
        "one. Lost: packings whose memory others needed, those of the run before among them.", "",
        f"| {' | '.join(columns)} |", "| --- | --- | --- |" + " ---: |" * (len(columns) - 3),
    ]  # fmt: skip
    for cell in table:
        speeds = [_with_value(cell, f"{of}_throughput", 1) for of in ("request", "first", "later")]
        waits = [_with_value(cell, f"{of}_ttft_ms", 1000) for of in ("median", "p90", "later_median", "later_p90")]
        computed = cell["computed_tokens"]
        counts = [
            _or_dash(cell[name], ",.0f") for name in ("echo_tokens", "adoptions", "evicted", "lost", "preemptions")
        ]
        lines.append(
            f"| {cell['model']} | {cell['scenario']} | `{cell['row']}` | {' | '.join([*speeds, *waits])} "
            f"| {computed:,.0f} ({computed / cell['asked_tokens']:.0%}) | {' | '.join(counts)} "
            f"| {cell['peak_running']:.0f} |"
        )
    return [*lines, ""]


def _with_value(cell: Record, name: str, per: float) -> str:
    value = cell[name]
    return "-" if value is None else f"{_spread(cell[f'{name}_ratio'])} ({value / per:.3g})"


def markdown(table: Sequence[Record], commands: Sequence[str], again: Sequence[Record] = ()) -> str:
    """The report's text. again: of `told_apart`."""
    columns = (
        "model", "load", "pool", "server", "output tokens/s, ratio", "bound", "decode phase, ratio", "TTFT, ratio",
        "TPOT, ratio", "running at peak", "running, mean", "planned", "pool in use at peak", "preemptions",
        "blocks freed", "eviction's share of the time",
    )  # fmt: skip
    lines = [
        "# Serving: stock vLLM and vLLM with eviction, side by side", "",
        "Medians of rounds in which the servers took turns; ratios are to stock vLLM of the same round, with the",
        "smallest and the largest. Absolute times mean nothing on a shared machine and are in `results.json` only.",
        "Pool: KV cache in multiples of one request. Planned: requests at once by `vllm_defensive.planner`, at their",
        "end and half-way. Bound: the ratio if answers took no time, given what the prompts alone take (measured by",
        "asking for one or two tokens each). Decode phase: the ratio of the time beyond that.", "",
        f"| {' | '.join(columns)} |", "| --- | --- | ---: | --- |" + " ---: |" * (len(columns) - 4),
    ]  # fmt: skip
    for cell in table:
        load = f"{cell['scenario']}: {cell['requests']} x ({cell['prompt']:,} + {cell['output']})"
        ratios = [_spread(cell[name]) for name in ("throughput_ratio", "decode_ratio", "ttft_ratio", "tpot_ratio")]
        ratios.insert(1, f"{cell['bound'][0]:.2f}" if cell["bound"] and cell["row"] != STOCK else "-")
        lines.append(
            f"| {cell['model']} | {load} | {cell['pool']:g} | `{cell['row']}` | {' | '.join(ratios)} "
            f"| {cell['peak_running']:.0f} | {_or_dash(cell['mean_running'], '.1f')} | {_planned(cell)} "
            f"| {cell['peak_pool']:.0%} "
            f"| {_or_dash(cell['preemptions'], '.0f')} | {_or_dash(cell['freed_blocks'], '.0f')} "
            f"| {_or_dash(cell['eviction_share'], '.1%')} |"
        )
    if again:
        lines += ["", *_told_apart_lines(again)[:-1]]
    return "\n".join([*lines, "", "Made by:", "", *(f"- `{c}`" for c in commands), ""])


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _planned(cell: Record) -> str:
    planned = cell["planned"]
    return f"{planned[0]} to {planned[1]}" if planned else "-"


def planned(record: Record) -> list[int]:
    """Requests at once that the planner predicts for a record's pool: at their end, and half-way through their output.

    At most those that are offered; empty where prompts share a prefix, the cache is quantised or a request is evicted
    to a budget, which it leaves out.
    """
    row = record["row"]
    if record["shares"] or "fp8" in row or "budget" in row:
        return []
    model = read_model(load_config(str(model_folder(record["model"]))))
    eviction = None
    if row != STOCK:
        policy, keep = row.split()[:2]
        eviction = EvictionConfig.model_validate({"policy": policy, "keep": float(keep)})
    memory = model.bytes(record["pool_tokens"], record["pool_tokens"])
    answer = plan(model, memory, record["prompt"], record["output"], eviction, BLOCK_SIZE)
    return [min(record["offered"], n) for n in (answer.at_once, answer.at_once_mean)]


def _spread(ratio: Sequence[float]) -> str:
    return f"{ratio[0]:.2f} [{ratio[1]:.2f}, {ratio[2]:.2f}]" if ratio else "-"


def write(folder: Path) -> Path:
    """`report.md`, `results.json` and the plots of the folder's records."""
    records = read(folder / "records.jsonl")
    again = told_apart([r for r in records if r.get("rounds")])
    records = [r for r in records if not r.get("rounds")]
    table = cells(records)
    (folder / "results.json").write_text(json.dumps([*table, *again], indent=1) + "\n")
    commands = (folder / "commands.txt").read_text().splitlines() if (folder / "commands.txt").exists() else []
    (folder / "report.md").write_text(markdown(table, list(dict.fromkeys(commands)), again))
    try:
        import matplotlib
    except ImportError:
        return folder / "report.md"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def plot(name: str, x: str, y: str, draw: Callable[[Any], None]) -> None:
        figure, axes = plt.subplots(figsize=(6, 4))
        draw(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.set_xlabel(x)
            axes.set_ylabel(y)
            axes.legend(fontsize=8)
            figure.tight_layout()
            figure.savefig(folder / name, dpi=90)
        plt.close(figure)

    def pressure(axes: Any) -> None:
        for model in dict.fromkeys(c["model"] for c in table):
            points = sorted(
                (c["pool"], c["throughput_ratio"][0])
                for c in table
                if c["model"] == model and c["row"] != STOCK and "pool of" in c["scenario"] and c["output"] == 256
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=f"halokv, keep 0.2, {model}")
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set_xscale("log", base=2)

    def running(axes: Any) -> None:
        for record in records:
            if record["scenario"] == "balanced, long prompts and answers" and record["repeat"] == 0:
                axes.plot([s[0] for s in record["samples"]], [s[1] for s in record["samples"]], label=record["row"])

    def per_token(axes: Any) -> None:
        for row in dict.fromkeys(c["row"] for c in table):
            points = sorted(
                (c["prompt"], 1000 / c["output_throughput"])
                for c in table
                if c["row"] == row and c["scenario"].startswith("prompts of")
            )
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=row)

    plot("throughput_against_pressure.png", "pool, in requests", "output tokens/s, ratio to stock vLLM", pressure)
    plot("running_over_time.png", "seconds", "requests that run", running)
    plot("time_against_prompt.png", "prompt tokens", "ms an answer's token, pool of 4 (this machine)", per_token)
    return folder / "report.md"
