"""The benchmark for machines with a GPU: its report, and that it runs, on a small model without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.engine.__main__ import parse
from benchmarks.engine.measure import kernel_table
from benchmarks.engine.report import report


def record(row: str, seconds: float, **changes: Any) -> dict[str, Any]:
    load = {"seconds": seconds, "output_throughput": 1000 / seconds, "peak_running": 4, "eviction_seconds": 0.5}
    alone = {"tokens": 512, "ttft_ms": 200.0, "step_ms": 5.0, "eviction_ms": 4.0, "eviction_mib": 80.2}
    sizes = {"prompt": 512, "output": 64, "requests": 8, "pool": 2.0, "graphs": "none", "chunk": 512, "block": 16}
    named = {"row": row, "keep": 0.2, "model": "a shape", "machine": {"device": "a GPU"}}
    loads = [load | {"preemptions": 1.0}]
    return named | sizes | {"prefill": {"seconds": 2.0}, "alone": {row: alone}, "loads": loads} | changes


def test_rows_of_one_load_are_put_beside_stock_vllm() -> None:
    text = report([record("stock", 10.0), record("halokv", 4.0)])
    assert "| stock | 100 | 1.00 | 1.00 | 4 |" in text
    assert "| halokv 0.2 | 250 | 2.50 | 4.00 | 4 | 0.50 | 1 |" in text  # beyond prefill 8 s and 2 s
    assert "| halokv 0.2: halokv, 512 tokens | 200.0 | 4.00 | 2.0% | 80 | 5.00 |" in text


@pytest.mark.parametrize("other", [{"requests": 9}, {"machine": {"device": "another GPU"}}], ids=["load", "machine"])
def test_what_has_no_stock_vllm_beside_it_has_no_ratios(other: dict[str, Any]) -> None:
    text = report([record("stock", 10.0), record("halokv", 4.0, **other)])
    assert text.count("\n## ") == 2
    assert "| halokv 0.2 | 250 | - | - | 4 |" in text


def test_a_row_whose_load_was_cut_off_keeps_its_single_requests() -> None:
    text = report([record("stock", 10.0, loads=[]), record("halokv", 4.0)])
    assert "| stock: stock, 512 tokens | 200.0 |" in text
    assert "| stock | " not in text
    assert "| halokv 0.2 | 250 | - | - | 4 |" in text


def test_a_row_that_was_measured_again_counts_once() -> None:
    text = report([record("stock", 10.0), record("halokv", 4.0), record("stock", 8.0)])
    assert "| halokv 0.2 | 250 | 2.00 |" in text
    assert text.count("| stock | ") == 1


@pytest.mark.parametrize("option", ["--rows", "--policies"])
def test_unknown_policies_are_refused_before_anything_starts(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse([option, "stock,nonsense" if option == "--rows" else "nonsense"])
    assert f"{option} nonsense: choose from" in capsys.readouterr().err


def test_a_profile_lists_kernels_alone_the_longest_first() -> None:
    from torch.autograd import DeviceType

    def average(name: str, spent: float, device: DeviceType = DeviceType.CUDA, ours: bool = False) -> SimpleNamespace:
        times = {"self_device_time_total": spent, "count": 4, "device_type": device, "is_user_annotation": ours}
        return SimpleNamespace(key=name, **times)

    averages = [average("short", 1e3), average("long", 3e3), average("aten::mm", 9e3, DeviceType.CPU)]
    lines = kernel_table([*averages, average("eviction", 9e3, ours=True)]).splitlines()
    assert [line.split() for line in lines[1:]] == [["3.00", "4", "750.0", "long"], ["1.00", "4", "250.0", "short"]]


@pytest.mark.slow
@pytest.mark.nightly
def test_it_runs(tiny_model: Path, tmp_path: Path) -> None:
    sizes = {"chunk": 512, "prompt": 512, "output": 24, "requests": 5, "pool": 2, "graphs": "none"}
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "benchmarks.engine", "--model", str(tiny_model), "--out", str(tmp_path), *options]
    run = subprocess.run([*command, "--profile"], capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    stock, ours = (json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines())
    assert (stock["row"], ours["row"]) == ("stock", "halokv")
    assert stock["loads"][0]["peak_running"] == 2 < ours["loads"][0]["peak_running"]
    assert ours["alone"]["none"]["eviction_ms"] == 0 < ours["alone"]["layer-defensivekv"]["eviction_ms"]
    assert "| halokv 0.2 |" in (tmp_path / "report.md").read_text()
    assert "layer-defensivekv, 512 tokens\n" in (tmp_path / "profile-halokv.txt").read_text()
