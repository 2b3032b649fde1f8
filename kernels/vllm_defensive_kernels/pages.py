"""The records that every op shares: where pages are, what a request keeps, and which tokens a ragged batch covers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from vllm_defensive_kernels.checks import refuse, require_int, require_shape
from vllm_defensive_kernels.widths import CLASSES, PageShape

MAX_HEAD_SIZE = 512  # tiles for wider heads are not made: registers would spill
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, kw_only=True)
class PageAddresses:
    """The address book: which page belongs to a (layer, head, block), and in which order packed pages are filled.

    layer_page_L: int64, first page of each layer. block_pages, head_pages: distance, in pages, of neighbouring blocks
    and heads. page_tokens: rows of a page. pages_per_block: pages of one head in a block, `part_pages` apart: the first
    holds the block's first `page_tokens` tokens, and so on.

    Axes: B blocks, X any pages, Z pages of a head and block.
    """

    layer_page_L: Tensor
    block_pages: int
    head_pages: int
    num_kv_heads: int
    page_tokens: int
    pages_per_block: int = 1
    part_pages: int = 1

    def __post_init__(self) -> None:
        if self.layer_page_L.dtype != torch.int64 or self.layer_page_L.dim() != 1:
            refuse("layer_page_L", (self.layer_page_L.dtype, tuple(self.layer_page_L.shape)), "int64 of shape [L]")
        for name in ("block_pages", "head_pages", "num_kv_heads", "page_tokens", "pages_per_block", "part_pages"):
            require_int(name, getattr(self, name), 1)

    @property
    def num_layers(self) -> int:
        return self.layer_page_L.shape[0]

    @property
    def block_tokens(self) -> int:
        return self.page_tokens * self.pages_per_block

    def page_of(self, layer: int | Tensor, head: int | Tensor, block: int | Tensor, part: int | Tensor = 0) -> Tensor:
        """int64 page of a (layer, head, block) and the part of the block; each may be a tensor that broadcasts."""
        block = torch.as_tensor(block, device=self.layer_page_L.device).long()
        return self.layer_page_L[layer] + block * self.block_pages + head * self.head_pages + part * self.part_pages

    def of_blocks(self, blocks_B: Tensor) -> Tensor:
        """int64 `[L, H, B*Z]`: the pages of every layer and head in these blocks (int64), in the order of tokens."""
        return (self._inner_LHZ[:, :, None] + (blocks_B * self.block_pages)[:, None]).flatten(2)

    def of_packed(self, blocks_K: Tensor) -> Tensor:
        """int64 `[K*L*H*Z]`: the pages of packed blocks (any integers) in the order in which they are filled: block by
        block, in a block layer by layer, in a layer head by head."""
        return (blocks_K.long()[:, None] * self.block_pages + self._inner_LHZ.flatten()).flatten()

    def place_of(self, flat_X: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The inverse: (which of the blocks, layer, head, part) of packed pages, by their place in that order."""
        row_X, part_X = flat_X // self.pages_per_block, flat_X % self.pages_per_block
        layer_X, head_X = row_X // self.num_kv_heads, row_X % self.num_kv_heads
        return layer_X // self.num_layers, layer_X % self.num_layers, head_X, part_X

    @cached_property
    def _inner_LHZ(self) -> Tensor:
        """Pages of block 0."""
        layers, heads, parts = (
            torch.arange(count, device=self.layer_page_L.device)
            for count in (self.num_layers, self.num_kv_heads, self.pages_per_block)
        )
        return self.page_of(layers[:, None, None], heads[:, None], 0, parts)


@dataclass(frozen=True, kw_only=True)
class PagedKV(PageAddresses):
    """A KV cache seen as head pages; see the package's docstring for the address of a page.

    key_PND, value_PND: views `[pages, N, D]` of fp32, fp16, bf16 or fp8, of one dtype, shape and device, any strides
        but the last, which is 1. The views may overlap (heads inside tokens). D is at most MAX_HEAD_SIZE.
    layer_page_L: on the same device. pages_per_block: 1, more are not supported by the kernels.
    layer_pages: distance of neighbouring layers where it is the same for all (it then saves a load a key), else None.
    """

    key_PND: Tensor
    value_PND: Tensor
    layer_pages: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        key, value = self.key_PND, self.value_PND
        if key.dim() != 3 or key.stride(-1) != 1:
            refuse("key_PND", (tuple(key.shape), key.stride()), "a view [pages, N, D] with stride 1 in D")
        require_shape("value_PND", value, tuple(key.shape))
        if value.stride(-1) != 1:
            refuse("value_PND.stride()", value.stride(), "stride 1 in D")
        if key.shape[2] > MAX_HEAD_SIZE:
            refuse("head_size", key.shape[2], f"at most {MAX_HEAD_SIZE}, or no KV eviction for this model on GPUs")
        if key.dtype not in FLOATS or value.dtype != key.dtype:
            refuse("key_PND.dtype, value_PND.dtype", (key.dtype, value.dtype), f"one dtype of {FLOATS}")
        if not (key.device == value.device == self.layer_page_L.device):
            refuse("layer_page_L.device", self.layer_page_L.device, f"{key.device}, where the pages are")
        if self.page_tokens != key.shape[1]:
            refuse("page_tokens", self.page_tokens, f"{key.shape[1]}, as key_PND has")
        require_int("pages_per_block", self.pages_per_block, 1, 1)

    @property
    def head_size(self) -> int:
        return self.key_PND.shape[2]

    @property
    def page_shape(self) -> PageShape:
        return PageShape(self.page_tokens, self.head_size, self.key_PND.element_size())

    @cached_property
    def row_PNY(self) -> Tensor:
        """uint8 `[pages, N, 2*D*bytes of a number]`: the rows of a page, key and value beside each other, as bytes.

        Quantised pages are written and read through it. Raises ValueError where a row is not one run of memory, or
        where numbers are of a byte already.
        """
        key, value, size = self.key_PND, self.value_PND, self.head_size
        if key.element_size() < 2:
            refuse("key_PND.dtype", key.dtype, "fp32, fp16 or bf16 for quantised pages, or 16 for their widths")
        if size % 2:
            refuse("head_size", size, "an even one for quantised pages, or 16 for their widths")
        beside = value.data_ptr() - key.data_ptr() == size * key.element_size()
        if not beside or value.stride() != key.stride() or key.stride(1) < 2 * size:
            refuse("value_PND", value.stride(), "values right behind their keys for quantised pages")
        row_PNX = key.as_strided((*key.shape[:2], 2 * size), key.stride())
        return row_PNX.view(torch.uint8)

    @cached_property
    def half_PNX(self) -> Tensor:
        """The same as fp16 numbers, which the steps and minima are."""
        return self.row_PNY.view(torch.float16)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, for `addressing.in_page`: 0 where a page's rows follow one another."""
        return 0 if self.row_PNY.stride(1) == self.row_PNY.shape[2] else self.row_PNY.shape[2]

    @classmethod
    def from_layers(cls, layer_BHNC: Sequence[Tensor]) -> PagedKV:
        """Page view of the caches of all layers of one KV cache group.

        layer_BHNC: one tensor `[blocks, H, N, 2*D]` a layer, K in the first D columns; permute to this order whatever
            the order in memory is. They are views of one storage, of one shape and strides.
        """
        first = layer_BHNC[0]
        require_shape("layer_BHNC[0]", first, (None, None, None, None))
        blocks, heads, page_tokens, columns = first.shape
        block_stride, head_stride, token_stride, column_stride = first.stride()
        if columns % 2 or column_stride != 1:
            refuse("layer_BHNC[0]", (columns, column_stride), "2*D contiguous columns, K then V")
        for index, layer in enumerate(layer_BHNC):
            same_storage = layer.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            if not same_storage or layer.shape != first.shape or layer.stride() != first.stride():
                refuse(f"layer_BHNC[{index}]", tuple(layer.shape), "a view of one storage, same shape and strides")
        starts = [layer.storage_offset() for layer in layer_BHNC]
        origin = min(starts)
        # The largest step from which every page is a whole number of steps away: views then need no other arithmetic.
        unit = math.gcd(head_stride, block_stride, *(start - origin for start in starts))
        last = max(starts) - origin + (blocks - 1) * block_stride + (heads - 1) * head_stride
        head_size = columns // 2
        steps = {(after - before) // unit for before, after in pairwise(starts)} or {0}
        shape, stride = (last // unit + 1, page_tokens, head_size), (unit, token_stride, 1)
        return cls(
            key_PND=first.as_strided(shape, stride, origin),
            value_PND=first.as_strided(shape, stride, origin + head_size),
            layer_page_L=torch.tensor([(s - origin) // unit for s in starts], dtype=torch.int64, device=first.device),
            block_pages=block_stride // unit,
            head_pages=head_stride // unit,
            num_kv_heads=heads,
            page_tokens=page_tokens,
            layer_pages=steps.pop() if len(steps) == 1 else None,
        )


@dataclass(frozen=True)
class PackedState:
    """What evicted requests keep, one slot a request; persistent buffers, so that a captured graph can read them.

    fresh_SK: int32 `[slots, K_max]`, ids of the fresh blocks. shared_S, growth_S: int32 `[slots]`, `s` and `g` in
    blocks. classes: of the pages that a slot may have, in the order of `widths.CLASSES`, "16" first.
    offset_SO: int32 `[slots, C*L*H + 1]`, first page of each head and class in the packed region, in the order of
    `PageAddresses.of_packed`: the heads of the first class, then those of the next. A slot that has no pages of a class
    has as many there as any head that keeps none.
    """

    fresh_SK: Tensor
    offset_SO: Tensor
    shared_S: Tensor
    growth_S: Tensor
    classes: tuple[str, ...] = ("16",)

    def __post_init__(self) -> None:
        if self.classes != ("16", *(name for name in CLASSES if name != "16" and name in self.classes)):
            refuse("classes", self.classes, f"16 and any others of {', '.join(CLASSES)}, in this order")
        slots = self.fresh_SK.shape[0]
        require_shape("fresh_SK", self.fresh_SK, (slots, None))
        require_shape("offset_SO", self.offset_SO, (slots, None))
        require_shape("shared_S", self.shared_S, (slots,))
        require_shape("growth_S", self.growth_S, (slots,))
        for name in ("fresh_SK", "offset_SO", "shared_S", "growth_S"):
            if getattr(self, name).dtype != torch.int32:
                refuse(f"{name}.dtype", getattr(self, name).dtype, "torch.int32")
        if self.fresh_SK.stride(1) != 1 or self.offset_SO.stride(1) != 1:
            refuse("fresh_SK, offset_SO strides", (self.fresh_SK.stride(), self.offset_SO.stride()), "contiguous rows")

    @property
    def coded(self) -> tuple[str, ...]:
        """The classes whose pages hold codes."""
        return self.classes[1:]

    @classmethod
    def empty(
        cls, slots: int, max_blocks: int, num_layers: int, num_kv_heads: int, device: torch.device | str,
        classes: tuple[str, ...] = ("16",),
    ) -> PackedState:  # fmt: skip
        """Zeroed state: every slot is a request with nothing packed."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        offsets = len(classes) * num_layers * num_kv_heads + 1
        return cls(zeros(slots, max_blocks), zeros(slots, offsets), zeros(slots), zeros(slots), classes)


@dataclass(frozen=True)
class PackedSource:
    """Pages of one request that are packed as the cache has them, where they are to be packed from again.

    fresh_K: int32, ids of their blocks. offset_O: int32 `[L*H + 1]`, first page of each head, and where the last one's
    end. Both on the device. most_pages: no head has more of them.
    """

    fresh_K: Tensor
    offset_O: Tensor
    most_pages: int


@dataclass(frozen=True)
class RaggedTokens:
    """Row r of a batch covers prompt tokens `[0, counts[r])`; they lie at `start_R[r] + t` of a ragged token axis.

    counts are known on the host (grids are made from them); count_R int32 and start_R int64 are copies on the device.
    """

    counts: tuple[int, ...]
    count_R: Tensor
    start_R: Tensor

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device | str) -> RaggedTokens:
        """Copy counts to the device without waiting for it."""
        for row, count in enumerate(counts):
            require_int(f"counts[{row}]", count, 0)
        starts = list(accumulate(counts, initial=0))[:-1]
        pin = torch.device(device).type == "cuda"  # an unpinned copy would wait for the device
        count_R = torch.tensor(counts, dtype=torch.int32, pin_memory=pin).to(device, non_blocking=True)
        start_R = torch.tensor(starts, dtype=torch.int64, pin_memory=pin).to(device, non_blocking=True)
        return cls(tuple(counts), count_R, start_R)

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def longest(self) -> int:
        return max(self.counts, default=0)

    def spans(self) -> list[slice]:
        """Slices of the ragged axis, one a row."""
        ends = list(accumulate(self.counts))
        return [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]
