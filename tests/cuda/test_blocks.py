"""Blocks that vLLM splits for its own kernels are refused, with a way out that leads out."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_defensive.worker.cuda.backend import EvictionImpl
from vllm_defensive.worker.cuda.worker import _check


def layer(kernel_block: int) -> Any:
    """One whose cache vLLM has cut into blocks of so many tokens."""
    impl = EvictionImpl.__new__(type("Impl", (EvictionImpl,), {"__abstractmethods__": frozenset()}))
    return SimpleNamespace(impl=impl, kv_cache=torch.empty(4, 2, kernel_block, 8))


@pytest.mark.parametrize("times", [1, 2, 4])
def test_whole_blocks_are_taken_however_long_vllm_makes_them(times: int) -> None:
    """Gemma 4's are 32 tokens where the block size is 16: its other layers have twice as many bytes a token."""
    _check("attn", layer(16 * times), 16 * times, 16)


@pytest.mark.parametrize("times", [1, 2, 4])
@pytest.mark.parametrize(("block_size", "kernel_block"), [(128, 64), (256, 64), (64, 32), (64, 16), (48, 16)])
def test_the_way_out_leads_out(times: int, block_size: int, kernel_block: int) -> None:
    with pytest.raises(
        ValueError, match=rf"block_size={block_size}: .* {block_size * times} .* {kernel_block}; "
    ) as seen:
        _check("attn", layer(kernel_block), block_size * times, block_size)
    advice = re.search(r"choose (block_size|attention_backend)=(\w+) with --kv-eviction", str(seen.value))
    assert advice is not None
    if advice[1] == "attention_backend":  # whose kernels take blocks of any multiple of 16
        assert kernel_block < 16 * times
    else:
        chosen = int(advice[2])
        assert chosen % 16 == 0
        _check("attn", layer(kernel_block), chosen * times, chosen)
