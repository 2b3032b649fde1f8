"""Head pages: their numbers in any layout of the buffer, and the order of elements inside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_defensive.worker.cpu.pages import PageCodec, PageView

L, B, H, N, D = 3, 5, 2, 4, 6


def buffer_of(order: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Per layer `[B, H, N, 2*D]`, views of one buffer whose axes lie in memory as `order` says."""
    sizes = {"L": L, "B": B, "H": H}
    data = torch.arange(L * B * H * N * 2 * D).to(dtype)
    axes = data.view(*(sizes[axis] for axis in order), N, 2 * D).permute(*(order.index(a) for a in "LBH"), 3, 4)
    return list(axes)


@pytest.mark.parametrize("order", ["LBH", "BLH", "BHL", "HLB"])
def test_a_page_number_finds_its_block_layer_and_head(order: str) -> None:
    caches = buffer_of(order)
    view = PageView.from_layers(caches)
    blocks = torch.tensor([4, 0, 3])
    pages_LHB = view.of_blocks(blocks)
    for layer in range(L):
        for head in range(H):
            for i, block in enumerate(blocks.tolist()):
                expected = caches[layer][block, head].flatten()
                assert torch.equal(view.data[pages_LHB[layer, head, i]], expected)


@pytest.mark.parametrize("order", ["LBH", "BLH", "BHL"])
def test_packed_pages_fill_block_by_block_layer_by_layer(order: str) -> None:
    caches = buffer_of(order)
    view = PageView.from_layers(caches)
    blocks = torch.tensor([2, 1])
    expected = [caches[layer][b, head].flatten() for b in (2, 1) for layer in range(L) for head in range(H)]
    assert torch.equal(view.data[view.of_packed(blocks)], torch.stack(expected))
    assert view.of_packed(blocks).unique().numel() == 2 * L * H, "no page twice"


@pytest.mark.parametrize("order", ["LBH", "BLH", "BHL"])
def test_a_block_that_vllm_has_split_has_a_page_of_each_head_in_each_part(order: str) -> None:
    caches = [cache[:4] for cache in buffer_of(order)]  # two blocks
    view = PageView.from_layers(caches, pages_per_block=2)
    assert view.block_tokens == 2 * N
    pages_LHB = view.of_blocks(torch.tensor([1, 0]))
    packed = view.of_packed(torch.tensor([1])).view(L, H, 2)
    for layer in range(L):
        for head in range(H):
            expected = [caches[layer][part, head].flatten() for part in (2, 3, 0, 1)]
            assert torch.equal(view.data[pages_LHB[layer, head]], torch.stack(expected))
            assert torch.equal(view.data[packed[layer, head]], torch.stack(expected[:2]))


def test_the_attention_view_halves_each_page() -> None:
    view = PageView.from_layers(buffer_of("LBH"))
    keys, values = view.attention_view()
    assert keys.shape == values.shape == (L * B * H, 1, N, D)
    assert torch.equal(torch.cat([keys[7].flatten(), values[7].flatten()]), view.data[7])
    keys[7, 0, 1, 2] = -1
    assert view.data[7, D + 2] == -1, "a view, not a copy"


def test_caches_that_are_not_pages_of_one_buffer_are_refused() -> None:
    caches = buffer_of("LBH")
    with pytest.raises(ValueError, match="not one buffer"):
        PageView.from_layers([caches[0], caches[1].clone()])
    with pytest.raises(ValueError, match="differ in shape"):
        PageView.from_layers([caches[0], caches[1][:, :, :2]])
    with pytest.raises(ValueError, match="do not keep head pages contiguous"):
        PageView.from_layers([cache.transpose(1, 2) for cache in caches])


ORDERS = {
    "as it is": torch.arange(N * D),
    "key columns": torch.arange(N * D).view(D, N).T.flatten(),
    "pairs": torch.arange(N * D).view(N // 2, D, 2).permute(0, 2, 1).flatten(),
    "shuffled": torch.randperm(N * D, generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_order", ORDERS)
@pytest.mark.parametrize("key_order", ORDERS)
def test_any_order_inside_a_page_is_discovered_and_undone(key_order: str, value_order: str, dtype: torch.dtype) -> None:
    key_at, value_at = ORDERS[key_order], ORDERS[value_order]

    def write(key_N1D: Tensor, value_N1D: Tensor) -> Tensor:
        page = torch.empty(2 * N * D, dtype=key_N1D.dtype)
        page[key_at] = key_N1D.flatten()
        page[N * D + value_at] = value_N1D.flatten()
        return page.view(1, 1, N, 2 * D)

    codec = PageCodec.discover(write, N, D, dtype)
    key_PND, value_PND = torch.randn(2, 7, N, D).to(dtype)
    pages = codec.pack(key_PND, value_PND)
    for p in range(7):
        assert torch.equal(pages[p], write(key_PND[p, :, None], value_PND[p, :, None]).flatten())
    some = torch.tensor([5, 0, 6, 2])
    assert torch.equal(codec.read_keys(pages, some), key_PND[some])
    assert torch.equal(codec.read_values(pages, some), value_PND[some])


def test_an_order_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="could not be determined"):
        PageCodec.discover(lambda key, value: torch.zeros(1, 1, N, 2 * D), N, D, torch.float32)


@pytest.mark.parametrize("page_tokens", [32, 128])
@pytest.mark.parametrize("head_size", [32, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_of_this_machines_kernels_round_trip(page_tokens: int, head_size: int, dtype: torch.dtype) -> None:
    """What vLLM writes, the codec reads; what the codec packs is what vLLM would have written."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from vllm_defensive.worker.cpu.backend import discover_codec

    isa = _get_attn_isa(dtype, page_tokens, head_size)
    cache = torch.zeros(3, 2, page_tokens, 2 * head_size, dtype=dtype)
    codec = discover_codec(cache, isa, dtype, "auto")
    key_THD, value_THD = torch.randn(2, 3 * page_tokens, 2, head_size).to(dtype)
    key_cache, value_cache = cache.view(3, 2, 2 * page_tokens, head_size).chunk(2, dim=2)
    slots = torch.arange(3 * page_tokens)
    ops.cpu_attn_reshape_and_cache(key_THD, value_THD, key_cache, value_cache, slots, isa, kv_cache_dtype="auto")
    raw = cache.view(6, -1)
    key_PND, value_PND = (read(raw, torch.arange(6)) for read in (codec.read_keys, codec.read_values))
    expected = key_THD.view(3, page_tokens, 2, head_size).transpose(1, 2).reshape(6, page_tokens, head_size)
    assert torch.equal(key_PND, expected)
    assert torch.equal(codec.pack(key_PND, value_PND), raw)
