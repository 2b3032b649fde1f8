"""Packs the kept tokens of all heads, as codes of a few bits, into pages of fresh blocks: one program a page."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_defensive_kernels import reference
from vllm_defensive_kernels.addressing import in_page, power_of_two, runs_triton
from vllm_defensive_kernels.checks import (
    refuse,
    require_choice,
    require_device,
    require_dtype,
    require_int,
    require_shape,
)
from vllm_defensive_kernels.pages import PagedKV
from vllm_defensive_kernels.widths import CLASSES, header_bytes

TILE = 32  # tokens at a time: K or V of a 128-wide head take 32 registers of each thread
WARPS = 4
_FP16_MAX = tl.constexpr(65504.0)
_ROUNDED = tl.constexpr(1.5 * 2**23)  # added to a number below 2^22 and taken off again: what is left is whole


@triton.jit
def _minimum(low):
    """fp16 minimum, saturating, of the lowest number: 0 where there is none."""
    low = tl.where(low == float("inf"), 0.0, low)
    return tl.minimum(tl.maximum(low, -_FP16_MAX), _FP16_MAX).to(tl.float16)


@triton.jit
def _step(high, minimum, LEVELS: tl.constexpr):
    """fp16 step, saturating, from the minimum that is stored to the highest number: 1 where that is none."""
    high = tl.where(high == float("-inf"), 0.0, high)
    step = tl.div_rn(high - minimum.to(tl.float32), tl.full(high.shape, LEVELS, tl.float32))
    step = tl.minimum(tl.maximum(step, 0.0), _FP16_MAX).to(tl.float16)
    return tl.where(step == 0.0, 1.0, step.to(tl.float32)).to(tl.float16)


@triton.jit
def _codes(number, step, minimum, exists, LEVELS: tl.constexpr):
    """uint8 codes, ties to even; 0 of what does not exist."""
    code = tl.div_rn(number - minimum.to(tl.float32), step.to(tl.float32) + tl.zeros_like(number))
    code = tl.minimum(tl.maximum(code, 0.0), LEVELS)
    return tl.where(exists, (code + _ROUNDED) - _ROUNDED, 0.0).to(tl.int32).to(tl.uint8)


@triton.jit
def _store_codes(page_ptr, begin, low, high, c, mask, row_stride, HALF: tl.constexpr, BITS: tl.constexpr,
                 ROW: tl.constexpr):  # fmt: skip
    """Codes of tokens whose bytes begin at `begin`: both halves in a byte, or one half behind the other."""
    where = begin[:, None] + c
    if BITS == 4:
        tl.store(page_ptr + in_page(where, row_stride, ROW), low | (high << 4), mask=mask)
    else:
        tl.store(page_ptr + in_page(where, row_stride, ROW), low, mask=mask)
        tl.store(page_ptr + in_page(where + HALF, row_stride, ROW), high, mask=mask)


@triton.jit(do_not_specialize=["first_page"])
def _compact_quantised_kernel(
    byte_to_ptr, half_to_ptr, key_ptr, value_ptr, table_ptr, owner_ptr, token_ptr, fresh_ptr,
    layer_page_ptr, layer_page_to_ptr, first_page,
    key_page_stride, key_token_stride, value_page_stride, value_token_stride, block_pages, head_pages,
    page_to_stride, row_to_stride, block_pages_to, head_pages_to,
    LH: tl.constexpr, H: tl.constexpr, N_FROM: tl.constexpr, n: tl.constexpr, D: tl.constexpr,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, HEADER: tl.constexpr, PAGE_BYTES: tl.constexpr,
    ROW: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = D // 2
    KEY_LEVELS: tl.constexpr = 2**KEY_BITS - 1
    VALUE_LEVELS: tl.constexpr = 2**VALUE_BITS - 1
    KEY_BYTES: tl.constexpr = D * KEY_BITS // 8
    VALUE_BYTES: tl.constexpr = D * VALUE_BITS // 8
    place = tl.program_id(0)
    owner = tl.load(owner_ptr + place)
    first_from = tl.load(layer_page_ptr + owner // H) + (owner % H).to(tl.int64) * head_pages
    flat = first_page + place
    inner = flat % LH
    page_to = tl.load(layer_page_to_ptr + inner // H) + (inner % H).to(tl.int64) * head_pages_to
    page_to += tl.load(fresh_ptr + flat // LH).to(tl.int64) * block_pages_to
    bytes_to = byte_to_ptr + page_to * page_to_stride
    halves_to = half_to_ptr + page_to * (page_to_stride // 2)
    tokens = token_ptr + place.to(tl.int64) * n

    t = tl.arange(0, TILE)
    c = tl.arange(0, BLOCK_HALF)[None, :]
    lowest, highest = float("inf"), float("-inf")
    key_low, key_high = tl.full([1, BLOCK_HALF], lowest, tl.float32), tl.full([1, BLOCK_HALF], highest, tl.float32)
    key_low_2, key_high_2 = key_low, key_high  # of the second half
    for begin in range(0, n, TILE):
        token = tl.load(tokens + begin + t, mask=begin + t < n, other=-1)
        exists = token >= 0
        block = tl.load(table_ptr + token // N_FROM, mask=exists, other=0).to(tl.int64)
        row = (first_from + block * block_pages) * key_page_stride + (token % N_FROM) * key_token_stride
        mask = exists[:, None] & (c < HALF)
        key = tl.load(key_ptr + row[:, None] + c, mask=mask, other=0.0).to(tl.float32)
        key_2 = tl.load(key_ptr + row[:, None] + c + HALF, mask=mask, other=0.0).to(tl.float32)
        key_low = tl.minimum(key_low, tl.min(tl.where(mask, key, lowest), 0, keep_dims=True))
        key_high = tl.maximum(key_high, tl.max(tl.where(mask, key, highest), 0, keep_dims=True))
        key_low_2 = tl.minimum(key_low_2, tl.min(tl.where(mask, key_2, lowest), 0, keep_dims=True))
        key_high_2 = tl.maximum(key_high_2, tl.max(tl.where(mask, key_2, highest), 0, keep_dims=True))
    key_min, key_min_2 = _minimum(key_low), _minimum(key_low_2)
    key_step, key_step_2 = _step(key_high, key_min, KEY_LEVELS), _step(key_high_2, key_min_2, KEY_LEVELS)
    row_halves, ROW_HALVES = row_to_stride // 2, ROW // 2
    tl.store(halves_to + in_page(c, row_halves, ROW_HALVES), key_step, mask=c < HALF)
    tl.store(halves_to + in_page(c + HALF, row_halves, ROW_HALVES), key_step_2, mask=c < HALF)
    tl.store(halves_to + in_page(c + D, row_halves, ROW_HALVES), key_min, mask=c < HALF)
    tl.store(halves_to + in_page(c + D + HALF, row_halves, ROW_HALVES), key_min_2, mask=c < HALF)

    for begin in range(0, n, TILE):
        place_T = begin + t
        token = tl.load(tokens + place_T, mask=place_T < n, other=-1)
        exists = token >= 0
        block = tl.load(table_ptr + token // N_FROM, mask=exists, other=0).to(tl.int64)
        page = first_from + block * block_pages
        mask, stored = exists[:, None] & (c < HALF), (place_T < n)[:, None] & (c < HALF)
        row = page * key_page_stride + (token % N_FROM) * key_token_stride
        key = tl.load(key_ptr + row[:, None] + c, mask=mask, other=0.0).to(tl.float32)
        key_2 = tl.load(key_ptr + row[:, None] + c + HALF, mask=mask, other=0.0).to(tl.float32)
        key = _codes(key, key_step, key_min, mask, KEY_LEVELS)
        key_2 = _codes(key_2, key_step_2, key_min_2, mask, KEY_LEVELS)
        where = HEADER + place_T * KEY_BYTES
        _store_codes(bytes_to, where, key, key_2, c, stored, row_to_stride, HALF, KEY_BITS, ROW)

        row = page * value_page_stride + (token % N_FROM) * value_token_stride
        value = tl.load(value_ptr + row[:, None] + c, mask=mask, other=0.0).to(tl.float32)
        value_2 = tl.load(value_ptr + row[:, None] + c + HALF, mask=mask, other=0.0).to(tl.float32)
        low = tl.minimum(tl.where(mask, value, lowest), tl.where(mask, value_2, lowest))
        high = tl.maximum(tl.where(mask, value, highest), tl.where(mask, value_2, highest))
        value_min = _minimum(tl.min(low, 1, keep_dims=True))
        value_step = _step(tl.max(high, 1, keep_dims=True), value_min, VALUE_LEVELS)
        value = _codes(value, value_step, value_min, mask, VALUE_LEVELS)
        value_2 = _codes(value_2, value_step, value_min, mask, VALUE_LEVELS)
        where = HEADER + n * KEY_BYTES + place_T * VALUE_BYTES
        _store_codes(bytes_to, where, value, value_2, c, stored, row_to_stride, HALF, VALUE_BITS, ROW)
        where = (2 * D + place_T)[:, None]
        tl.store(halves_to + in_page(where, row_halves, ROW_HALVES), value_step, mask=(place_T < n)[:, None])
        tl.store(halves_to + in_page(where + n, row_halves, ROW_HALVES), value_min, mask=(place_T < n)[:, None])

    # What nobody has written so far: the header's last bytes, and those behind the codes.
    rest = tl.arange(0, BLOCK_REST)
    nothing = tl.zeros([BLOCK_REST], tl.uint8)
    where = 4 * (D + n) + rest
    tl.store(bytes_to + in_page(where, row_to_stride, ROW), nothing, mask=where < HEADER)
    where = HEADER + n * (KEY_BYTES + VALUE_BYTES) + rest
    tl.store(bytes_to + in_page(where, row_to_stride, ROW), nothing, mask=where < PAGE_BYTES)


def compact_quantised(
    source: PagedKV,
    table_B: Tensor,
    offset_O: Tensor,
    token_Pn: Tensor,
    target: PagedKV,
    fresh_K: Tensor,
    *,
    page_class: str,
    first_page: int,
) -> None:
    """`compaction.compact` into pages of a quantised class, whose bytes are those of `quantised.pack_pages`.

    token_Pn: int32 `[P, n]`, `target.page_shape.tokens(page_class)` a page, as `selection.list_kept` lists them: -1
        behind the last of a page that is not full. offset_O: int32 `[L*H + 1]`, first of these pages of each head.
    first_page: the place of the first of them among the pages of the fresh blocks: those of other classes lie around.
    source, target: of fp32, fp16 or bf16; in target a token's value lies right behind its key (`PagedKV.row_PNY`).

    Fills whole pages and touches no others. Raises ValueError for arguments that do not fit. No host sync.
    """
    layers, heads, shape = target.num_layers, target.num_kv_heads, target.page_shape
    if (source.num_layers, source.num_kv_heads, source.head_size) != (layers, heads, target.head_size):
        found = (source.num_layers, source.num_kv_heads, source.head_size)
        refuse("source (L, H, D)", found, f"{(layers, heads, target.head_size)}, as target has")
    require_choice("page_class", page_class, [name for name, each in CLASSES.items() if each.quantised])
    require_device("target.key_PND", target.key_PND, source.key_PND.device)
    require_dtype("source.key_PND", source.key_PND, (torch.float32, torch.float16, torch.bfloat16))
    pages, tokens = token_Pn.shape[0], shape.tokens(page_class)
    require_shape("token_Pn", token_Pn, (pages, tokens))
    require_shape("offset_O", offset_O, (layers * heads + 1,))
    require_int("first_page", first_page, 0, fresh_K.shape[0] * layers * heads - pages)
    for name, tensor in {"table_B": table_B, "offset_O": offset_O, "token_Pn": token_Pn, "fresh_K": fresh_K}.items():
        require_dtype(name, tensor, (torch.int32,))
        if not tensor.is_contiguous():
            refuse(f"{name}.stride()", tensor.stride(), "contiguous rows")
    row_PNY = target.row_PNY
    if not runs_triton(source.key_PND):
        reference.compact_quantised(
            source, table_B, offset_O, token_Pn, target, fresh_K, page_class=page_class, first_page=first_page
        )
        return
    if not pages:
        return
    flat = torch.arange(pages, dtype=torch.int32, device=token_Pn.device)
    owner = torch.searchsorted(offset_O[1:], flat, right=True, out_int32=True)
    bits, header = CLASSES[page_class], header_bytes(target.head_size, tokens)
    rest = shape.page_bytes - header - tokens * bits.token_bytes(target.head_size)
    _compact_quantised_kernel[(pages,)](
        row_PNY, target.half_PNX, source.key_PND, source.value_PND, table_B, owner, token_Pn, fresh_K,
        source.layer_page_L, target.layer_page_L, first_page,
        source.key_PND.stride(0), source.key_PND.stride(1), source.value_PND.stride(0), source.value_PND.stride(1),
        source.block_pages, source.head_pages,
        row_PNY.stride(0), row_PNY.stride(1), target.block_pages, target.head_pages,
        LH=layers * heads, H=heads, N_FROM=source.page_tokens, n=tokens, D=target.head_size,
        KEY_BITS=bits.key_bits, VALUE_BITS=bits.value_bits, HEADER=header, PAGE_BYTES=shape.page_bytes,
        ROW=target.row_bytes, BLOCK_HALF=power_of_two(target.head_size // 2, 16), BLOCK_REST=power_of_two(rest, 16),
        TILE=TILE, num_warps=WARPS,
    )  # fmt: skip
