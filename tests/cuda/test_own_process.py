"""Runs this folder's engine tests in a process that pretends to have a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.wheel import cuda_vllm


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_engine_on_a_pretended_gpu(tmp_path: Path) -> None:
    folder = Path(__file__).parent
    root = folder.parents[1]
    environment = {
        **os.environ,
        "CUDA_TESTS": "pretend",
        "PYTHONPATH": os.pathsep.join([str(cuda_vllm()), str(root)]),
        "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "TRITON_INTERPRET": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "-p", "no:cacheprovider", str(folder)]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    print(run.stdout[-4000:])
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-5000:]
