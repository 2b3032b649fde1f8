"""The kernels run in Triton's interpreter on the CPU, or compiled where KERNELS_DEVICE=cuda.

Triton decides at import whether it interprets. When other tests of the same process have imported it already, this
folder's tests are run by `test_own_process.py` in a process of their own instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

DEVICE = os.environ.get("KERNELS_DEVICE", "cpu")
if DEVICE == "cpu":
    taken = "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"
    if taken:
        collect_ignore_glob = ["test_*_op.py", "test_addresses.py", "test_pages.py"]
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        collect_ignore_glob = ["test_own_process.py"]
else:
    collect_ignore_glob = ["test_own_process.py"]


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
