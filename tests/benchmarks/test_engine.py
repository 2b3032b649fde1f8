"""The benchmark for machines with a GPU: its report, and that it runs, on a small model without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engine


def record(row: str, seconds: float, **changes: Any) -> dict[str, Any]:
    load = {"seconds": seconds, "output_throughput": 1000 / seconds, "peak_running": 4, "eviction_seconds": 0.5}
    alone = {"tokens": 512, "ttft_ms": 200.0, "step_ms": 5.0, "eviction_ms": 4.0}
    return {
        "row": row, "keep": 0.2, "prompt": 512, "output": 64, "requests": 8, "pool": 2.0, "graphs": "none",
        "chunk": 512, "machine": {"device": "a GPU"}, "prefill": {"seconds": 2.0}, "alone": {row: alone},
        "loads": [load | {"preemptions": 1.0}], **changes,
    }  # fmt: skip


def test_rows_of_one_load_are_put_beside_stock_vllm() -> None:
    text = engine.report([record("stock", 10.0), record("halokv", 4.0)])
    assert "| stock | 100 | 1.00 | 1.00 | 4 |" in text
    assert "| halokv 0.2 | 250 | 2.50 | 4.00 | 4 | 0.50 | 1 |" in text  # beyond prefill 8 s and 2 s
    assert "| halokv 0.2: halokv, 512 tokens | 200.0 | 4.00 | 2.0% | - | 5.00 |" in text


def test_a_load_without_stock_vllm_has_no_ratios() -> None:
    text = engine.report([record("stock", 10.0), record("halokv", 4.0, requests=9)])
    assert text.count("\n## ") == 2
    assert "| halokv 0.2 | 250 | - | - | 4 |" in text


@pytest.mark.slow
def test_it_runs(tiny_model: Path, tmp_path: Path) -> None:
    sizes = {"block": 32, "chunk": 512, "prompt": 512, "output": 24, "requests": 5, "pool": 2, "graphs": "none"}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.engine", "--model", str(tiny_model), "--out", str(tmp_path), *options]
    run = subprocess.run([*command, "--profile"], env=dict(os.environ), capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    stock, ours = (json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines())
    assert (stock["row"], ours["row"]) == ("stock", "halokv")
    assert stock["loads"][0]["peak_running"] == 2 < ours["loads"][0]["peak_running"]
    assert ours["alone"]["none"]["eviction_ms"] == 0 < ours["alone"]["layer-defensivekv"]["eviction_ms"]
    assert "| halokv 0.2 |" in (tmp_path / "report.md").read_text()
    assert "layer-defensivekv, 512 tokens" in (tmp_path / "profile-halokv.txt").read_text()
