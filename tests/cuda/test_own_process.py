"""Runs this folder's engine tests in processes that pretend to have a GPU, one for each supported release of vLLM.

The newest release runs those that need not wait for the night (the CPU build, which all other tests run on, is of an
earlier one); `make test-nightly` runs all of them on each.
VLLM_CUDA=0.33.0 has that release alone run, and all of them: `make test-release`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.wheel import cuda_vllm
from tests.releases import RELEASES

FOLDER = Path(__file__).parent
ALL = "all"


def runs() -> list[object]:
    """(release, "" for what need not wait for the night, ALL for all)."""
    if chosen := os.environ.get("VLLM_CUDA"):
        assert chosen in RELEASES, f"VLLM_CUDA={chosen}: choose one of {', '.join(RELEASES)}"
        return [pytest.param(chosen, ALL, id=chosen)]
    *_, newest = RELEASES
    return [
        pytest.param(newest, "", id=newest),
        *(pytest.param(release, ALL, id=f"{release}-all", marks=pytest.mark.nightly) for release in RELEASES),
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("release, part", runs())
def test_engine_on_a_pretended_gpu(release: str, part: str, tmp_path: Path) -> None:
    root = FOLDER.parents[1]
    environment = {
        **os.environ,
        "CUDA_TESTS": "pretend",
        "PYTHONPATH": os.pathsep.join([str(cuda_vllm(release)), str(root), str(root / "kernels")]),
        "VLLM_CACHE_ROOT": str(tmp_path / "vllm"),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "TRITON_INTERPRET": "1",
    }
    what = [*(["-m", "nightly or not nightly"] if part == ALL else []), str(FOLDER)]
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "-p", "no:cacheprovider", *what]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    print(run.stdout[-4000:])
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-5000:]
