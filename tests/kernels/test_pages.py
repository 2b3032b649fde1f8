"""Page numbers of every layout of vLLM's cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kernels.cases import LAYOUTS, int32, make_pages
from tests.kernels.conftest import DEVICE
from vllm_defensive_kernels import PackedState, PagedKV, RaggedTokens


@pytest.mark.parametrize("layout", [*LAYOUTS, "NLBHC", "HBLNC"])
def test_every_layout_is_seen_as_pages(layout: str) -> None:
    sizes = {"L": 2, "B": 5, "H": 3, "N": 4, "C": 6}
    cache = torch.arange(2 * 5 * 3 * 4 * 6, device=DEVICE, dtype=torch.float32).view([sizes[axis] for axis in layout])
    LBHNC = cache.permute([layout.index(axis) for axis in "LBHNC"])
    pages = PagedKV.from_layers(list(LBHNC))
    for layer in range(2):
        for block in range(5):
            for head in range(3):
                page = pages.page_of(layer, head, block)
                assert torch.equal(pages.key_PND[page], LBHNC[layer, block, head, :, :3])
                assert torch.equal(pages.value_PND[page], LBHNC[layer, block, head, :, 3:])
    assert pages.layer_pages == int(pages.layer_page_L[1] - pages.layer_page_L[0])


def test_layers_at_uneven_distances() -> None:
    cache = torch.zeros(4, 5, 1, 4, 6, device=DEVICE)
    pages = PagedKV.from_layers([cache[0], cache[1], cache[3]])
    assert pages.layer_page_L.tolist() == [0, 5, 15]
    assert pages.layer_pages is None
    assert PagedKV.from_layers([cache[2]]).layer_pages == 0


def test_caches_of_several_storages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer_BHNC\[1\]=\(5, 1, 4, 6\): choose a view of one storage"):
        PagedKV.from_layers([torch.zeros(5, 1, 4, 6), torch.zeros(5, 1, 4, 6)])


@pytest.mark.parametrize(("change", "message"), [
    ({"block_pages": 0}, "block_pages=0: choose 1 or more"),
    ({"value_PND": torch.zeros(1, 4, 3, device=DEVICE)}, r"value_PND.shape=\(1, 4, 3\): choose \[30, 4, 32\]"),
    ({"layer_page_L": int32(0, 1)}, r"layer_page_L=.*choose int64"),
])  # fmt: skip
def test_wrong_pages_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(make_pages(2, 5, 3, 4, 32), **change)


def test_state_of_the_wrong_dtype_is_refused() -> None:
    empty = PackedState.empty(2, 3, 4, 5, DEVICE)
    assert empty.offset_SO.shape == (2, 21)
    with pytest.raises(ValueError, match=r"offset_SO.dtype=torch.int64: choose torch.int32"):
        dataclasses.replace(empty, offset_SO=empty.offset_SO.long())


def test_ragged_tokens_start_where_the_row_before_ends() -> None:
    tokens = RaggedTokens.of([3, 0, 4], DEVICE)
    assert tokens.start_R.tolist() == [0, 3, 3]
    assert tokens.spans() == [slice(0, 3), slice(3, 3), slice(3, 7)]
    assert (tokens.total, tokens.longest, RaggedTokens.of([], DEVICE).longest) == (7, 4, 0)
