"""Every kernel, as the wrappers launch it, compiled for Hopper: nothing spills, and pages are read in 16 bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Kernels that read rows of D numbers; the others read ragged vectors of scores, which start anywhere.
MULTIPLIES = {
    "decode_kernel", "row_statistics_kernel", "score_kernel", "row_lse_kernel", "peak_kernel", "value_norm_kernel",
}  # fmt: skip
LEARNED = {"learned_score_kernel", "learned_page_score_kernel"}
READS_PAGES = MULTIPLIES | LEARNED | {"compact_kernel", "compact_quantised_kernel"}
SHARED_MEMORY = 227 * 1024  # what one program may use on an H100 or H200
HEAD_SIZES = (64, 80, 96, 128, 192, 256, 512)
# Bytes that a thread may spill: 64 rows of queries take most registers, and widening fp8 keys takes some of its own.
SPILLED = {("decode_kernel", f"decode long queries D={head_size} fp8"): 32 for head_size in (80, 96, 128)}
SPILLED["decode_kernel", "decode bf16 long queries D=256 8+4"] = 40  # as do codes that become keys
SPILLED["score_kernel", "window bf16 D=128 G=4 cap and void"] = 24  # and the attention of 128 rows, where it is bent


def compile_for_hopper(folder: Path, *options: str) -> list[dict[str, Any]]:
    """Reports of tests.kernels.sm90, in a process without the interpreter and with an empty cache."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.sm90", *options]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(report: dict[str, Any]) -> None:
    label = f"{report['kernel']} of {report['variant']}: {report}"
    allowed = SPILLED.get((report["kernel"], report["variant"]), 0)
    assert report["stack"] <= allowed, f"spills: {label}"
    assert report["local"] == 0 == report["spills"] * (not allowed), f"spills: {label}"
    assert report["shared"] <= SHARED_MEMORY, f"too much shared memory: {label}"
    if report["kernel"] in READS_PAGES:
        assert report["wide_loads"] > 0, f"no 16-byte loads: {label}"
    if report["kernel"] == "compact_quantised_kernel":  # halves of a head at a time: of 64 numbers a thread has 8
        assert report["shared"] <= 4096, f"more than minima and maxima goes through shared memory: {label}"
    if report["kernel"] == "compact_kernel":
        assert report["wide_stores"] > 0, f"no 16-byte stores: {label}"
    if report["kernel"] in MULTIPLIES and "fp32" not in report["variant"]:
        assert report["hmma"] + report["hgmma"] > 0, f"no tensor cores: {label}"
    if report["kernel"] in LEARNED:  # keys, values and the table stay with the threads that loaded them
        assert report["shared"] <= 4 * max(HEAD_SIZES), f"more than weights goes through shared memory: {label}"


@pytest.mark.slow
def test_every_op_compiles_for_hopper_without_spills(tmp_path: Path) -> None:
    reports = compile_for_hopper(tmp_path)
    assert {report["kernel"] for report in reports} >= READS_PAGES | {
        "list_kept_kernel",
        "merge_kernel",
        "merge_lse_kernel",
    }
    for report in reports:
        check(report)


@pytest.mark.slow
def test_any_number_of_echoes_has_the_same_kernels(tmp_path: Path) -> None:
    """Also wherever they stand, and wherever their table and scores begin in a larger tensor."""
    reports = compile_for_hopper(tmp_path, "--all", "reconstruction of any number")
    assert sorted(report["kernel"] for report in reports) == ["merge_lse_kernel", "peak_kernel", "row_lse_kernel"]


@pytest.mark.slow
def test_learned_scores_of_any_number_of_tokens_have_the_same_kernels(tmp_path: Path) -> None:
    """Also wherever their weights, tables and pages begin in a larger tensor, and in every layer."""
    reports = compile_for_hopper(tmp_path, "--all", "learned of any number")
    assert {report["kernel"] for report in reports} == LEARNED
    assert len(reports) == 2


@pytest.mark.slow
def test_what_is_packed_anew_has_one_kernel_whatever_its_size(tmp_path: Path) -> None:
    (report,) = compile_for_hopper(tmp_path, "--all", "again of any number")
    assert report["kernel"] == "compact_kernel"
    check(report)


@pytest.mark.nightly
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_every_head_size_compiles_for_hopper(head_size: int, tmp_path: Path) -> None:
    reports = compile_for_hopper(tmp_path, "--sizes", f"D={head_size} ")
    assert {report["kernel"] for report in reports} >= READS_PAGES
    for report in reports:
        check(report)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_every_variant_compiles_for_hopper_without_spills(tmp_path: Path) -> None:
    for report in compile_for_hopper(tmp_path, "--all"):
        check(report)
