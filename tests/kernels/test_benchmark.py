"""The kernels' benchmark: runs small, refuses without a GPU, reports nothing that failed its check."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kernels.machine import Limits, Machine
from benchmarks.kernels.report import Report, Row

ROOT = Path(__file__).parents[2]
OPS = {
    "window_scores", "value_norm L1", "value_norm L2", "select", "compact", "reconstruction_scores",
    "learned_scores", "learned_page_scores", "ragged_paged_decode",
}  # fmt: skip
LAUNCHES = "vllm_defensive/worker/cuda/launches.py"
MACHINE = Machine("a GPU", "1", "13", "2", "3", "3.12", "python -m benchmarks.kernels")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.kernels", *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    result = run()
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert "no CUDA GPU here; --smoke runs" in result.stderr


@pytest.mark.slow
def test_smoke_checks_every_op_and_writes_both_reports(tmp_path: Path) -> None:
    result = run("--smoke", "--out", str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    data = json.loads((tmp_path / "kernels.json").read_text())
    assert {row["op"] for row in data["rows"]} == OPS
    assert all(row["failure"] is None and row["bytes"] > 0 for row in data["rows"])
    assert data["smoke"] is True
    assert "the times say nothing" in (tmp_path / "kernels.md").read_text()


def test_an_op_that_failed_its_check_has_no_figures(tmp_path: Path) -> None:
    from benchmarks.kernels.cases import Case
    from benchmarks.kernels.report import measure

    def wrong() -> None:
        raise AssertionError("off by 1")

    row = measure(Case("compact", "8 tokens", lambda: None, wrong, 10, 0), "cpu")
    assert row.seconds is None
    report = Report(MACHINE, Limits(4e12, 8e14), False, [row])
    assert (
        "| compact | 8 tokens | - | 0.0 | 0.0 | - | - | check failed: AssertionError: off by 1 |" in report.markdown()
    )


def test_shares_and_the_whole_eviction_follow_from_the_rows(tmp_path: Path) -> None:
    ops = {"window_scores": 1e-3, "value_norm L2": 1e-4, "select": 1e-3, "compact": 5e-4}
    rows = [Row(op, "32768 tokens, x", 2 * 10**9, 10**9, seconds) for op, seconds in ops.items()]
    report = Report(MACHINE, Limits(4e12, 8e14), False, rows)
    assert rows[0].shares(report.limits)["copy bandwidth"] == pytest.approx(0.5)
    (summary,) = report.evictions()
    assert summary["norm"] == "L2"
    assert summary["seconds"] == pytest.approx(1e-3 + 32 * 1e-4 + 1e-3 + 5e-4)
    prefill = (2 * 7.5e9 * 32768 + 2 * 32768**2 * 4096 * 32) / 8e14
    assert summary["share_of_prefill"] == pytest.approx(summary["seconds"] / prefill)
    report.write(tmp_path)
    assert "| 32768 | L2 | 5.70 |" in (tmp_path / "kernels.md").read_text()


def test_what_is_timed_is_what_an_engine_calls() -> None:
    """Both reach the kernels through one module, which needs no vLLM: a call that changes there changes in both."""
    scores = {"window_scores", "reconstruction_scores", "learned_scores", "learned_page_scores", "value_norm"}
    calls = {*scores, "list_kept", "compact", "ragged_paged_decode"}
    files = [path for folder in ("vllm_defensive", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in files if imported_names(path) & calls} == {LAUNCHES}
    assert imported_names(ROOT / LAUNCHES) >= calls
    code = "import sys, vllm_defensive.worker.cuda.launches; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def imported_names(path: Path) -> set[str]:
    """Of the kernels' package."""
    nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom))
    ours = (node for node in nodes if (node.module or "").startswith("vllm_defensive_kernels"))
    return {alias.name for node in ours for alias in node.names}


def test_zipf_budgets_are_uneven_and_sum_to_the_total() -> None:
    from benchmarks.kernels.cases import zipf_pages

    pages = zipf_pages(heads=64, total=640, most=100)
    assert pages.sum() == 640
    assert pages.min() >= 1
    assert pages.max() > 5 * pages.median()
    assert zipf_pages(4, 40, 10).tolist() == [10, 10, 10, 10]
