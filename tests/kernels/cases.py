"""Small awkward inputs for the kernels, and the comparison that all their tests use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.conftest import DEVICE
from vllm_defensive.policy import PRESETS, LayerScores, Policy, Selection, select
from vllm_defensive_kernels import list_kept
from vllm_defensive_kernels.pages import PackedState, PagedKV

LAYOUTS = ("LBHNC", "BLHNC", "LBNHC", "BNLHC")
# Head sizes whose tiles take fewer tokens, and the pages' dtypes.
WIDE = ((192, torch.bfloat16), (256, torch.float8_e4m3fn), (512, torch.bfloat16))
# Caps of logits, and logits of nothing on average: see `vllm_defensive_kernels.logits`.
BENT = ((3.0, None), (0.0, 9.0), (2.0, 1.0))
TOLERANCE = {
    torch.float32: 1e-5,  # of a float64 reference: a few roundings of 6e-8, relative to the largest entry
    torch.float16: 1e-3,  # one rounding step of the inputs of the second product, 2 ** -10
    torch.bfloat16: 8e-3,  # one rounding step, 2 ** -7
}


def make_pages(
    layers: int, blocks: int, heads: int, page_tokens: int, head_size: int, *,
    layout: str = "BLHNC", dtype: torch.dtype = torch.float32, seed: int = 0,
) -> PagedKV:  # fmt: skip
    """A cache of random K and V whose axes lie in memory in the order of `layout`; C is K beside V."""
    sizes = {"L": layers, "B": blocks, "H": heads, "N": page_tokens, "C": 2 * head_size}
    generator = torch.Generator().manual_seed(seed)
    cache = torch.randn([sizes[axis] for axis in layout], generator=generator).to(dtype).to(DEVICE)
    return PagedKV.from_layers(list(cache.permute([layout.index(axis) for axis in "LBHNC"])))


def make_table(rows: int, blocks: int, pool: int, seed: int = 1) -> Tensor:
    """int32 [rows, blocks]: distinct shuffled block ids; block 0 is vLLM's null block and is never used."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(pool - 1, generator=generator)[: rows * blocks] + 1
    return ids.view(rows, blocks).to(torch.int32).to(DEVICE)


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    """Standard normal numbers on the test device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def int32(*values: int) -> Tensor:
    """int32 vector on the test device."""
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def make_state(
    page_counts: list[list[int]], fresh: list[list[int]], shared: list[int], growth: list[int]
) -> PackedState:
    """State of one slot a row: pages of each (layer, head), fresh block ids, s and g."""
    width = max(len(row) for row in fresh)
    offsets = torch.tensor(page_counts, dtype=torch.int32).cumsum(1, dtype=torch.int32)
    return PackedState(
        torch.tensor([row + [0] * (width - len(row)) for row in fresh], dtype=torch.int32, device=DEVICE),
        torch.nn.functional.pad(offsets, (1, 0)).to(DEVICE),
        int32(*shared),
        int32(*growth),
    )


def select_pages(score_LHE: Tensor, packed_blocks: int, page_tokens: int, policy: Policy | None = None) -> Selection:
    """What the engine keeps of scores of tokens from position 0 on; by default heads of all layers compete."""
    return select(
        policy or PRESETS["halokv"], [LayerScores(score_HE) for score_HE in score_LHE], page_size=page_tokens,
        packed_blocks=packed_blocks, evictable=(0, score_LHE.shape[2]), list_kept=list_kept,
    )  # fmt: skip


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Run a reference in float64: it widens by `.float()`, and that is turned into `.double()`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        yield


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "result") -> None:
    """Compare to the tolerance of `dtype`, relative to the largest entry of `expected`; NaN anywhere fails."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    assert not actual.isnan().any(), f"{what}: an entry was not written"
    if actual.numel():
        error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
        assert error <= TOLERANCE[dtype], f"{what}: off by {error:.2e} of the largest entry, {dtype}"
