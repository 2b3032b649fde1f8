"""Page numbers of every layout of vLLM's cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.kernels.cases import LAYOUTS, int32, make_pages
from tests.kernels.conftest import DEVICE
from vllm_defensive_kernels import MAX_HEAD_SIZE, PackedState, PageAddresses, PagedKV, RaggedTokens


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


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("order", ["LBHZ", "BLHZ", "BZLH", "BHLZ"])
def test_one_address_book_knows_every_page_and_the_order_of_packed_ones(order: str, parts: int) -> None:
    """Against a buffer in which each page is its number."""
    sizes = {"L": 2, "B": 5, "H": 3, "Z": parts}
    count = 2 * 5 * 3 * parts
    numbers = torch.arange(count, device=DEVICE).view([sizes[axis] for axis in order])
    LBHZ = numbers.permute([order.index(axis) for axis in "LBHZ"])
    book = PageAddresses(
        layer_page_L=LBHZ[:, 0, 0, 0], block_pages=LBHZ.stride(1), head_pages=LBHZ.stride(2), num_kv_heads=3,
        page_tokens=4, pages_per_block=parts, part_pages=LBHZ.stride(3),
    )  # fmt: skip
    assert (book.num_layers, book.block_tokens) == (2, 4 * parts)
    blocks = torch.tensor([4, 0, 3], device=DEVICE)
    assert torch.equal(book.of_blocks(blocks), LBHZ[:, blocks].transpose(1, 2).flatten(2))
    packed = book.of_packed(blocks.int())
    assert torch.equal(packed, LBHZ[:, blocks].transpose(0, 1).flatten())
    index, layer, head, part = book.place_of(torch.arange(len(packed), device=DEVICE))
    assert torch.equal(LBHZ[layer, blocks[index], head, part], packed)
    assert torch.equal(book.page_of(layer, head, blocks[index], part), packed)


def test_layers_at_uneven_distances() -> None:
    cache = torch.zeros(4, 5, 1, 4, 6, device=DEVICE)
    pages = PagedKV.from_layers([cache[0], cache[1], cache[3]])
    assert pages.layer_page_L.tolist() == [0, 5, 15]
    assert pages.layer_pages is None
    assert PagedKV.from_layers([cache[2]]).layer_pages == 0


def test_heads_wider_than_any_tile_are_refused() -> None:
    make_pages(1, 2, 1, 4, MAX_HEAD_SIZE)
    with pytest.raises(ValueError, match="head_size=576: choose at most 512, or no KV eviction for this model on GPUs"):
        make_pages(1, 2, 1, 4, 576)


def test_caches_of_several_storages_are_refused() -> None:
    with pytest.raises(ValueError, match=r"layer_BHNC\[1\]=\(5, 1, 4, 6\): choose a view of one storage"):
        PagedKV.from_layers([torch.zeros(5, 1, 4, 6), torch.zeros(5, 1, 4, 6)])


@pytest.mark.parametrize(("change", "message"), [
    ({"block_pages": 0}, "block_pages=0: choose 1 or more"),
    ({"value_PND": torch.zeros(1, 4, 3, device=DEVICE)}, r"value_PND.shape=\(1, 4, 3\): choose \[30, 4, 32\]"),
    ({"page_tokens": 2}, "page_tokens=2: choose 4, as key_PND has"),
    ({"pages_per_block": 2}, "pages_per_block=2: choose 1 to 1"),
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


def test_state_has_room_for_every_class_in_the_order_of_all() -> None:
    state = PackedState.empty(2, 3, 4, 5, DEVICE, ("16", "8", "4"))
    assert state.offset_SO.shape == (2, 3 * 20 + 1) and state.coded == ("8", "4")
    for classes in (("16", "4", "8"), ("8",), ("16", "5")):
        with pytest.raises(ValueError, match="choose 16 and any others of 16, 8, k8v4, 4, in this order"):
            dataclasses.replace(state, classes=classes)


def test_ragged_tokens_start_where_the_row_before_ends() -> None:
    tokens = RaggedTokens.of([3, 0, 4], DEVICE)
    assert tokens.start_R.tolist() == [0, 3, 3]
    assert tokens.spans() == [slice(0, 3), slice(3, 3), slice(3, 7)]
    assert (tokens.total, tokens.longest, RaggedTokens.of([], DEVICE).longest) == (7, 4, 0)
