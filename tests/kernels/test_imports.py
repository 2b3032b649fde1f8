"""What importing and calling the package brings in; each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

CPU_CALL = """
import sys, torch
from vllm_defensive_kernels import PagedKV, RaggedTokens, window_scores
pages = PagedKV.from_layers([torch.randn(5, 1, 16, 64)])
table = torch.tensor([[3, 1, 2, 4]], dtype=torch.int32)
score, mean = window_scores(torch.randn(1, 1, 8, 2, 32), pages, table, RaggedTokens.of([50], "cpu"))
assert score.shape == mean.shape == (1, 1, 50) and bool(score.isfinite().all())
assert "vllm" not in sys.modules, "the kernels need torch and Triton only"
"""


def run(code: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_package_and_its_references_load_without_triton() -> None:
    run("import sys, vllm_defensive_kernels; assert 'torch' not in sys.modules")
    imports = "from vllm_defensive_kernels import formulas, pages, reference"
    run(f"import sys; {imports}; assert 'triton' not in sys.modules")


def test_on_the_cpu_the_reference_runs() -> None:
    run(CPU_CALL)
