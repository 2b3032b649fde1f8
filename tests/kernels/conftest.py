"""The kernels run in Triton's interpreter on the CPU, or compiled where KERNELS_DEVICE=cuda.

Triton decides at import whether it interprets, and vLLM is not to be interpreted. So these tests run where they are
asked for when they are all that is asked for; as part of a larger run, `test_own_process.py` starts them on their own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DEVICE = os.environ.get("KERNELS_DEVICE", "cpu")
FOLDER = Path(__file__).parent
ANYWHERE = {"test_compile.py", "test_benchmark.py", "test_imports.py"}  # they start processes of their own


def runs_here(config: pytest.Config) -> bool:
    """True where this process may interpret kernels (or run them on a GPU)."""
    if DEVICE != "cpu" or os.environ.get("TRITON_INTERPRET") == "1":
        return True
    asked_for = (Path(config.invocation_params.dir, argument.split("::")[0]).resolve() for argument in config.args)
    if "triton" in sys.modules or not all(path.is_relative_to(FOLDER) for path in asked_for):
        return False
    os.environ["TRITON_INTERPRET"] = "1"
    return True


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.parent != FOLDER or not collection_path.name.startswith("test_"):
        return None
    if collection_path.name == "test_own_process.py":
        return True if runs_here(config) else None
    return None if collection_path.name in ANYWHERE or runs_here(config) else True


@pytest.fixture(autouse=True)
def nan_filled_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every torch.empty holds NaN (or a huge integer), so that an entry that no kernel wrote is seen."""
    import torch

    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).min) if tensor.dtype != torch.bool else tensor

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))
    yield
