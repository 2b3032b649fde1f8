"""vLLM's CUDA wheels keep the contract, as they are written, whatever this process can import of them."""

from __future__ import annotations

import pytest

from tests.cuda.wheel import cuda_vllm
from tests.releases import RELEASES
from vllm_defensive.compat import contract
from vllm_defensive.compat.names import BY_SIDE


@pytest.mark.slow  # the first time it downloads what `test_own_process.py` needs, too
@pytest.mark.parametrize("release", RELEASES)
def test_a_wheel_keeps_the_contract(release: str) -> None:
    assert contract.check(BY_SIDE, cuda_vllm(release) / "vllm") == []
