"""Rows of the report: an op is checked first, and without a passed check no figure of it is reported."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.kernels.machine import Limits, Machine, median_seconds

if TYPE_CHECKING:
    from benchmarks.kernels.cases import Case

# Of Llama-3.1-8B, for the prefill that an eviction is compared to: 2 flops a weight and token (8.03e9 weights less the
# embedding's), and causal attention.
LLAMA_WEIGHTS = 7.5e9
LLAMA_QUERY_HEADS, LLAMA_HEAD_SIZE, LLAMA_LAYERS = 32, 128, 32


@dataclass
class Row:
    """One measured case, or why it was not measured. Times in seconds."""

    op: str
    size: str
    bytes: int
    flops: int
    seconds: float | None = None
    rivals: dict[str, float | str] = field(default_factory=dict)
    failure: str | None = None

    def shares(self, limits: Limits | None) -> dict[str, float]:
        """Shares of the machine's measured limits."""
        if limits is None or self.seconds is None:
            return {}
        rates = {"copy bandwidth": self.bytes / self.seconds / limits.copy}
        return rates | ({"matmul rate": self.flops / self.seconds / limits.matmul} if self.flops else {})

    def line(self, limits: Limits | None) -> str:
        """What is printed while the benchmark runs."""
        if self.seconds is None:
            return f"{self.op}, {self.size}: NOT MEASURED, {self.failure}"
        shares = ", ".join(f"{share:.0%} of the {name}" for name, share in self.shares(limits).items())
        return f"{self.op}, {self.size}: {self.seconds * 1e3:.3f} ms {shares}".rstrip()


def measure(case: Case, device: str) -> Row:
    """Check, then time a case and its rivals. A rival that fails says why; a failed check leaves no time."""
    row = Row(case.op, case.size, case.bytes, case.flops)
    try:
        case.check()
    except Exception as error:  # whatever is wrong, the other ops are still measured
        row.failure = f"check failed: {type(error).__name__}: {error}".split("\n")[0]
        return row
    row.seconds = median_seconds(case.run, device)
    for name, call in case.rivals.items():
        try:
            row.rivals[name] = median_seconds(call, device)
        except Exception as error:
            row.rivals[name] = f"{type(error).__name__}: {error}".split("\n")[0][:120]
    return row


@dataclass
class Report:
    """All rows of one run on one machine."""

    machine: Machine
    limits: Limits | None
    smoke: bool
    rows: list[Row] = field(default_factory=list)

    def evictions(self) -> list[dict[str, Any]]:
        """A whole prompt's eviction beside its prefill, for each length whose ops were all measured."""
        if self.limits is None:
            return []
        summaries = []
        for tokens in sorted({int(row.size.split()[0]) for row in self.rows if row.op == "window_scores"}):
            times = {row.op: row.seconds for row in self.rows if row.size.startswith(f"{tokens} tokens")}
            for norm in ("L1", "L2"):
                repeats = {"window_scores": 1, f"value_norm {norm}": LLAMA_LAYERS, "select": 1, "compact": 1}
                parts = [(times.get(op), count) for op, count in repeats.items()]  # norms are timed for one layer
                if any(part is None for part, _ in parts):
                    continue
                seconds = sum(part * count for part, count in parts if part is not None)
                attention = 2 * tokens**2 * LLAMA_QUERY_HEADS * LLAMA_HEAD_SIZE * LLAMA_LAYERS
                prefill = (2 * LLAMA_WEIGHTS * tokens + attention) / self.limits.matmul
                share = seconds / prefill
                summaries.append({"tokens": tokens, "norm": norm, "seconds": seconds, "share_of_prefill": share})
        return summaries

    def write(self, folder: Path) -> None:
        """kernels.json and kernels.md."""
        folder.mkdir(parents=True, exist_ok=True)
        data = {
            "machine": self.machine.rows(),
            "smoke": self.smoke,
            "limits": None if self.limits is None else asdict(self.limits),
            "rows": [asdict(row) | {"shares": row.shares(self.limits)} for row in self.rows],
            "evictions": self.evictions(),
        }
        (folder / "kernels.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (folder / "kernels.md").write_text(self.markdown(), encoding="utf-8")

    def markdown(self) -> str:
        lines = ["# Kernels", "", *(f"- {name}: {value}" for name, value in self.machine.rows().items())]
        if self.smoke:
            lines.append("- a smoke run in the interpreter: the times say nothing")
        if self.limits is not None:
            lines.append(f"- measured copy bandwidth (read + write): {self.limits.copy / 1e12:.2f} TB/s")
            lines.append(f"- measured bf16 matmul rate: {self.limits.matmul / 1e12:.0f} TFLOP/s")
        lines += ["", "| op | size | ms | MB | GFLOP | of copy bandwidth | of matmul rate | others |"]
        lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |"]
        for row in self.rows:
            shares = row.shares(self.limits)
            share = [f"{shares[name]:.0%}" if name in shares else "-" for name in ("copy bandwidth", "matmul rate")]
            others = "; ".join(
                f"{name}: {value if isinstance(value, str) else 'ran' if self.smoke else f'{value * 1e3:.3f} ms'}"
                for name, value in row.rivals.items()
            )
            milliseconds = "-" if row.seconds is None else "checked" if self.smoke else f"{row.seconds * 1e3:.3f}"
            counts = [f"{row.bytes / 1e6:.1f}", f"{row.flops / 1e9:.1f}"]
            cells = [row.op, row.size, milliseconds, *counts, *share, row.failure or others or "-"]
            lines.append(f"| {' | '.join(cells)} |")
        summaries = self.evictions()
        if summaries:
            lines += [
                "",
                "Eviction of one prompt, all 32 layers, beside the time that its prefill takes at the measured",
            ]
            lines += ["matmul rate (a lower bound of the prefill, so an upper bound of the share):", ""]
            lines += ["| tokens | norm | ms | share of prefill |", "| ---: | --- | ---: | ---: |"]
            for item in summaries:
                share_text = f"{item['share_of_prefill']:.2%}"
                lines.append(f"| {item['tokens']} | {item['norm']} | {item['seconds'] * 1e3:.2f} | {share_text} |")
        return "\n".join(lines) + "\n"
