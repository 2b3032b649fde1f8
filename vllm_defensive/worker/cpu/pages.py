"""Every head page of a KV cache group under one number, and how tokens lie inside a page.

vLLM allocates all layers of a group in one buffer, so a page can be read by any layer. `PageView` numbers them and
never assumes a memory layout: offsets and strides come from the tensors that vLLM made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_defensive_kernels.pages import PageAddresses
from vllm_defensive_kernels.widths import PageShape

# Of pages on their way through a core's cache.
FETCHED_ELEMENTS = 2**18


@dataclass(frozen=True, kw_only=True)
class PageView(PageAddresses):
    """The KV cache of `L` layers as `data[page]`: rows of `2*N*D` elements, one head page each, K before V."""

    data: Tensor

    @classmethod
    def from_layers(cls, caches: Sequence[Tensor], pages_per_block: int = 1) -> PageView:
        """caches: per layer `[blocks*Z, H, N, 2*D]`, views of one buffer with contiguous pages; else ValueError.
        pages_per_block: `Z`, parts that vLLM has split each block into."""
        first = caches[0]
        _, heads, page_tokens, width = first.shape
        size = page_tokens * width
        for cache in caches:
            if cache.shape != first.shape or cache.stride() != first.stride() or cache.dtype != first.dtype:
                raise ValueError("kv_eviction: the layers' KV caches differ in shape, stride or dtype")
            if cache.stride()[2:] != (width, 1) or any(x % size for x in (cache.storage_offset(), *cache.stride()[:2])):
                raise ValueError(f"kv_eviction: KV cache strides {cache.stride()} do not keep head pages contiguous")
            if cache.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
                raise ValueError("kv_eviction: the layers' KV caches are not one buffer")
        num_pages = first.untyped_storage().nbytes() // first.element_size() // size
        return cls(
            layer_page_L=torch.tensor([cache.storage_offset() // size for cache in caches], device=first.device),
            block_pages=pages_per_block * first.stride(0) // size,
            head_pages=first.stride(1) // size,
            num_kv_heads=heads,
            page_tokens=page_tokens,
            pages_per_block=pages_per_block,
            part_pages=first.stride(0) // size,
            data=first.as_strided((num_pages, size), (size, 1), 0),
        )

    @property
    def head_size(self) -> int:
        return self.data.shape[1] // (2 * self.page_tokens)

    @property
    def page_shape(self) -> PageShape:
        return PageShape(self.page_tokens, self.head_size, self.data.element_size())

    def attention_view(self) -> tuple[Tensor, Tensor]:
        """(K, V), each `[pages, 1, N, D]`: the whole buffer as the cache of a layer with one head."""
        half = self.page_tokens * self.head_size
        shape = (self.data.shape[0], 1, self.page_tokens, self.head_size)
        stride = (2 * half, 2 * half, self.head_size, 1)
        return self.data.as_strided(shape, stride, 0), self.data.as_strided(shape, stride, half)


class PageCodec:
    """Where token `n`, dimension `d` lies in each half of a page.

    CPU attention kernels store keys and values in the order that their vector instructions like. Instead of knowing
    every order, we push coded tokens through vLLM's own cache write once and read where they went.
    """

    def __init__(self, order_key_ND: Tensor, order_value_ND: Tensor) -> None:
        """order_*: int64 `[N, D]`, position inside the half page of each element."""
        self.page_tokens, self.head_size = order_key_ND.shape
        self.orders = order_key_ND, order_value_ND
        self._halves = tuple(_Reorder(order.flatten()) for order in (order_key_ND, order_value_ND))

    @classmethod
    def discover(cls, write, page_tokens: int, head_size: int, dtype: torch.dtype) -> PageCodec:  # type: ignore[no-untyped-def]
        """write(key_NHD, value_NHD, page `[1, 1, N, 2*D]`): vLLM's cache write of `N` tokens of one head into one page.

        Codes are digits to base 8, because small integers survive every cache dtype exactly, fp8 included.
        """
        token, dim = torch.meshgrid(torch.arange(page_tokens), torch.arange(head_size), indexing="ij")
        position = torch.zeros(2, page_tokens * head_size, dtype=torch.int64)
        for index, weight in ((token, head_size), (dim, 1)):
            for shift in range(0, 12, 3):
                digit = (index >> shift) & 7
                if not bool(digit.any()):
                    continue
                coded = digit.to(dtype)[:, None, :].contiguous()
                page = write(coded, coded.clone())
                position += page.view(2, -1).to(torch.float32).long() * (weight << shift)
        halves = [torch.empty_like(p).scatter_(0, p, torch.arange(p.numel())) for p in position]
        if any(not torch.equal(p.sort().values, torch.arange(p.numel())) for p in position):
            raise RuntimeError("kv_eviction: the order of tokens inside a KV cache page could not be determined")
        return cls(*(h.view(page_tokens, head_size) for h in halves))

    def read_keys(self, data: Tensor, pages_P: Tensor, out_PX: Tensor | None = None) -> Tensor:
        """K of pages (int64 `[P]`) of a buffer like `PageView.data` -> `[P, N, D]`, same dtype. out_PX: contiguous
        memory to read them into, `[P, N*D]`."""
        return self._read(0, data, pages_P, out_PX)

    def read_values(self, data: Tensor, pages_P: Tensor, out_PX: Tensor | None = None) -> Tensor:
        """V, as `read_keys`."""
        return self._read(1, data, pages_P, out_PX)

    def _read(self, half: int, data: Tensor, pages_P: Tensor, out_PX: Tensor | None) -> Tensor:
        if out_PX is None:
            out_PX = data.new_empty(len(pages_P), data.shape[1] // 2)
        self._halves[half].gather(data.chunk(2, dim=1)[half], pages_P, out_PX)
        return out_PX.view(-1, self.page_tokens, self.head_size)

    def pack(self, key_PND: Tensor, value_PND: Tensor) -> Tensor:
        """(K, V), each `[P, N, D]` -> raw pages `[P, 2*N*D]`, same dtype."""
        pages_P = key_PND.new_empty(key_PND.shape[0], 2 * self.page_tokens * self.head_size)
        for reorder, half, source in zip(self._halves, pages_P.chunk(2, dim=1), (key_PND, value_PND), strict=True):
            reorder.scatter(source.flatten(1), half)
        return pages_P


class _Reorder:
    """A permutation of a row's elements. Orders that a strided view can express (all that kernels use so far) are
    copied as such, several times faster than by index; pairs that stay together are moved as one wider element."""

    def __init__(self, order: Tensor) -> None:
        self._order = order
        self._dims = _strided(order.tolist())
        self._plain = torch.equal(order, torch.arange(order.numel()))

    def _view(self, half_P: Tensor) -> Tensor | None:
        """`half_P` (rows of a page buffer) with its elements in logical order, or None if no view does that."""
        if self._dims is None:
            return None
        sizes, strides = self._dims
        return half_P.as_strided((half_P.shape[0], *sizes), (half_P.stride(0), *strides), half_P.storage_offset())

    def gather(self, half: Tensor, rows_P: Tensor, out_PX: Tensor) -> None:
        """Rows of `half` in logical order -> contiguous `out_PX`. What must be reordered is fetched in portions that
        stay in a core's cache until it is."""
        if self._plain:
            torch.index_select(half, 0, rows_P, out=out_PX)
            return
        step = max(1, FETCHED_ELEMENTS // half.shape[1])
        for rows, out in zip(rows_P.split(step), out_PX.split(step), strict=True):
            fetched = half.index_select(0, rows)
            if (view := self._view(fetched)) is None:
                torch.index_select(fetched, 1, self._order, out=out)
            else:
                wide = _widen(view)
                out.view(wide.dtype).view(wide.shape).copy_(wide)

    def scatter(self, source_P: Tensor, half_P: Tensor) -> None:
        if (view := self._view(half_P)) is None:
            half_P[:, self._order] = source_P
        else:
            wide = _widen(view)
            wide.copy_(source_P.view(wide.dtype).view(wide.shape))


def _widen(view: Tensor) -> Tensor:
    """The same memory with contiguous pairs of 16-bit elements as 32-bit ones, where all strides allow it."""
    pairs = view.shape[-1] == 2 and view.stride(-1) == 1 and view.element_size() == 2
    if not pairs or any(x % 2 for x in (view.storage_offset(), *view.stride()[:-1])):
        return view
    return view.view(torch.int32)


def _strided(order: list[int]) -> tuple[list[int], list[int]] | None:
    """(sizes, strides) such that walking them in row-major order visits `order`, or None if there are none."""
    sizes: list[int] = []
    strides: list[int] = []
    while len(order) > 1:
        stride = order[1] - order[0]
        size = next((i for i, x in enumerate(order) if x != order[0] + i * stride), len(order))
        inner = [i * stride for i in range(size)]
        outer = order[::size]
        if len(order) % size or stride <= 0 or [o + i for o in outer for i in inner] != order:
            return None
        sizes.insert(0, size)
        strides.insert(0, stride)
        order = outer
    return sizes, strides
