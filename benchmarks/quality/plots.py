"""The report's plots. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.quality.engine import FP8
from benchmarks.quality.plan import AFTER, WINDOW, YARDSTICK

Row = dict[str, Any]
_FLOOR = 1e-4  # where a KL of zero is drawn on a logarithmic axis


def draw(table: Sequence[Row], folder: Path) -> list[Path]:
    """All plots that the cells suffice for."""
    table = [c for c in table if c["policy"] != FP8 and "@" not in c["policy"]]
    paths = []
    for protocol in (WINDOW, AFTER):
        for context in sorted({c["context"] for c in table}):
            cells = [
                c
                for c in table
                if (c["suite"], c["task"], c["context"], c["protocol"]) == ("forced", YARDSTICK, context, protocol)
                and c["policy"] != "none"
            ]
            if cells:
                paths.append(_memory(cells, folder / f"kl_against_memory_{context}_{protocol}.png", context, protocol))
    for context in sorted({c["context"] for c in table if c["suite"] == "forced"}):
        cells = [c for c in table if c["suite"] == "forced" and c["context"] == context and c["policy"] != "none"]
        for keep in sorted({c["keep"] for c in cells}):
            some = [c for c in cells if c["keep"] == keep and c["protocol"] == WINDOW]
            if len({c["task"] for c in some}) > 1:
                paths.append(_bars(some, folder / f"kl_by_task_{context}_keep{keep:g}.png", context, keep))
    return paths


def _memory(cells: Sequence[Row], path: Path, context: int, protocol: str) -> Path:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for policy in dict.fromkeys(c["policy"] for c in cells):
        points = sorted((c["retention"], c["kl"], *c["kl_interval"]) for c in cells if c["policy"] == policy)
        kept, mean, low, high = (list(x) for x in zip(*points, strict=True))
        below = [max(m - lo, 0) for m, lo in zip(mean, low, strict=True)]
        above = [max(hi - m, 0) for m, hi in zip(mean, high, strict=True)]
        axes.errorbar(kept, [max(m, _FLOOR) for m in mean], yerr=[below, above], marker="o", capsize=3, label=policy)
    axes.set(yscale="log", xlabel="share of the KV cache held", ylabel="KL(full || evicted), nats a token")
    axes.set_title(f"{YARDSTICK}, {context} tokens, question {'in the window' if protocol == WINDOW else 'after'}")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def _bars(cells: Sequence[Row], path: Path, context: int, keep: float) -> Path:
    tasks = list(dict.fromkeys(c["task"] for c in cells))
    policies = list(dict.fromkeys(c["policy"] for c in cells))
    figure, axes = plt.subplots(figsize=(9, 4.5))
    width = 0.8 / len(policies)
    for index, policy in enumerate(policies):
        values = {c["task"]: c["kl"] for c in cells if c["policy"] == policy}
        at = [x + index * width for x in range(len(tasks))]
        axes.bar(at, [values.get(task, 0.0) for task in tasks], width, label=policy)
    axes.set_xticks([x + 0.4 for x in range(len(tasks))], tasks)
    axes.set(
        ylabel="KL(full || evicted), nats a token", title=f"{context} tokens, keep {keep:g}, question in the window"
    )
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return _save(figure, path)


def heat_map(counts_LH: Any, tokens: int, path: Path, title: str) -> Path:
    """Share of the prompt that each head of each layer kept, from an audit's `kept_counts`."""
    figure, axes = plt.subplots(figsize=(3 + 0.3 * counts_LH.shape[1], 6))
    image = axes.imshow(counts_LH / tokens, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    axes.set(xlabel="KV head", ylabel="layer", title=title)
    figure.colorbar(image, label="share of the prompt kept")
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=80, bbox_inches="tight")
    plt.close(figure)
    return path
