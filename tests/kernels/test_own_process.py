"""Collected only in runs of more than this folder: starts its interpreted tests in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", ["not slow and not nightly", pytest.param("nightly", marks=pytest.mark.nightly)])
def test_kernels_in_the_interpreter(which: str) -> None:
    folder = Path(__file__).parent
    elsewhere = [f"--ignore={folder / name}" for name in ("test_compile.py", "test_benchmark.py", "test_imports.py")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", which, *elsewhere, str(folder)]
    run = subprocess.run(command, env=environment, cwd=folder.parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
