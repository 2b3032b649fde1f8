"""Packs the kept tokens of all heads, head after head, into the whole pages of fresh blocks: of a prompt's, or of those
that are packed already and some behind them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_defensive_kernels import reference
from vllm_defensive_kernels.addressing import power_of_two, runs_triton, width
from vllm_defensive_kernels.checks import refuse, require_device, require_dtype, require_int, require_shape
from vllm_defensive_kernels.pages import PackedSource, PagedKV

ROW_BYTES = 128  # tokens a program times bytes a number: K and V of a 128-wide head are 32 KiB in flight
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


@triton.jit
def _converted(value, scale, target_ptr, LIMIT: tl.constexpr):
    value = value.to(tl.float32) * scale
    if LIMIT > 0:  # fp8: saturate instead of overflowing to NaN
        value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
    return value.to(target_ptr.dtype.element_ty)


# A number that changes from call to call must not make a variant of its own when it happens to be 1 or 16.
@triton.jit(do_not_specialize=["tokens", "packed_pages"])
def _compact_kernel(
    key_to_ptr, value_to_ptr, key_ptr, value_ptr, table_ptr, owner_ptr, token_ptr, fresh_ptr,
    layer_page_ptr, layer_page_to_ptr, packed_fresh_ptr, packed_offset_ptr, packed_pages, tokens,
    key_scale, value_scale,
    key_page_stride, key_token_stride, value_page_stride, value_token_stride, block_pages, head_pages,
    key_to_page_stride, key_to_token_stride, value_to_page_stride, value_to_token_stride, block_pages_to, head_pages_to,
    LH: tl.constexpr, H: tl.constexpr, N_FROM: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, BITS: tl.constexpr, LIMIT: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = slot < tokens
    flat = slot // N
    owner = tl.load(owner_ptr + flat, mask=exists, other=0)
    token = tl.load(token_ptr + slot, mask=exists, other=0)
    listed = table_ptr + token // N_FROM
    inner = owner
    if PACKED:
        exists &= token >= 0  # nobody was chosen for the others
        nth = token // N_FROM
        was_packed = nth < packed_pages
        flat_from = tl.load(packed_offset_ptr + owner, mask=exists, other=0) + nth
        listed = tl.where(was_packed, packed_fresh_ptr + flat_from // LH, table_ptr + nth - packed_pages)
        inner = tl.where(was_packed, flat_from % LH, owner)
    block = tl.load(listed, mask=exists, other=0).to(tl.int64)
    page = tl.load(layer_page_ptr + inner // H, mask=exists, other=0)
    page += block * block_pages + (inner % H).to(tl.int64) * head_pages
    inner = flat % LH
    fresh = tl.load(fresh_ptr + flat // LH, mask=exists, other=0).to(tl.int64)
    page_to = tl.load(layer_page_to_ptr + inner // H, mask=exists, other=0)
    page_to += fresh * block_pages_to + (inner % H).to(tl.int64) * head_pages_to

    d = tl.arange(0, BLOCK_D)[None, :]
    mask = exists[:, None] & (d < D)
    where_key = (page * key_page_stride + (token % N_FROM) * key_token_stride)[:, None] + d
    where_value = (page * value_page_stride + (token % N_FROM) * value_token_stride)[:, None] + d
    key = tl.load(key_ptr + where_key, mask=mask)
    value = tl.load(value_ptr + where_value, mask=mask)
    if not BITS:
        key = _converted(key, key_scale, key_to_ptr, LIMIT)
        value = _converted(value, value_scale, value_to_ptr, LIMIT)
    where_key = (page_to * key_to_page_stride + (slot % N) * key_to_token_stride)[:, None] + d
    where_value = (page_to * value_to_page_stride + (slot % N) * value_to_token_stride)[:, None] + d
    tl.store(key_to_ptr + where_key, key, mask=mask)
    tl.store(value_to_ptr + where_value, value, mask=mask)


def compact(
    source: PagedKV,
    table_B: Tensor,
    offset_O: Tensor,
    token_T: Tensor,
    target: PagedKV,
    fresh_K: Tensor,
    *,
    packed: PackedSource | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Copy the kept tokens of one request from its prompt's blocks into its fresh blocks, all layers and heads at once.

    table_B: int32, block of each run of prompt tokens in source. offset_O: int32 `[L*H + 1]`, first page of each head.
        token_T: int32 `[K*L*H*N]`, as `selection.list_kept` lists them. fresh_K: int32, blocks of target that nobody
        else uses.
    packed: where source holds tokens of the request that are packed already, and table_B has the blocks behind them.
        token_T then has places, not positions: the first `packed.most_pages * N` are those of the head's packed pages,
        one after the other, which need not be as many; the others those of table_B. For -1 nothing is copied, so that
        the last pages may stay as they are.
    source, target: any layouts and dtypes, also pages of different length; usually the same cache.
    key_scale, value_scale: factors applied on the way (for fp8, the source's scale over the target's). The bits are
        copied unchanged where dtypes are equal and the factors 1; fp8 targets saturate.

    Fills whole pages and touches no others. Raises ValueError for arguments that do not fit. No host sync.
    """
    layers, heads, page_tokens = target.num_layers, target.num_kv_heads, target.page_tokens
    if (source.num_layers, source.num_kv_heads, source.head_size) != (layers, heads, target.head_size):
        found = (source.num_layers, source.num_kv_heads, source.head_size)
        refuse("source (L, H, D)", found, f"{(layers, heads, target.head_size)}, as target has")
    require_device("target.key_PND", target.key_PND, source.key_PND.device)
    require_shape("offset_O", offset_O, (layers * heads + 1,))
    require_shape("token_T", token_T, (fresh_K.shape[0] * layers * heads * page_tokens,))
    vectors = {"table_B": table_B, "offset_O": offset_O, "token_T": token_T, "fresh_K": fresh_K}
    if packed is not None:
        require_shape("packed.offset_O", packed.offset_O, (layers * heads + 1,))
        require_int("packed.most_pages", packed.most_pages, 0)
        vectors |= {"packed.fresh_K": packed.fresh_K, "packed.offset_O": packed.offset_O}
    for name, tensor in vectors.items():
        require_dtype(name, tensor, (torch.int32,))
        if tensor.dim() != 1 or not tensor.is_contiguous():
            refuse(name, tuple(tensor.shape), "one contiguous axis")
    if not runs_triton(source.key_PND):
        reference.compact(
            source, table_B, offset_O, token_T, target, fresh_K,
            packed=packed, key_scale=key_scale, value_scale=value_scale,
        )  # fmt: skip
        return
    if token_T.numel() == 0:
        return
    flat = torch.arange(token_T.shape[0] // page_tokens, dtype=torch.int32, device=token_T.device)
    owner = torch.searchsorted(offset_O[1:], flat, right=True, out_int32=True)
    views = [target.key_PND, target.value_PND, source.key_PND, source.value_PND]
    same = views[0].dtype == views[2].dtype and key_scale == value_scale == 1.0
    fp8 = views[0].dtype in (torch.float8_e4m3fn, torch.float8_e5m2)
    limit = torch.finfo(views[0].dtype).max if fp8 else 0.0
    if same:
        views = [view.view(_BITS[view.element_size()]) for view in views]
    # Without any, some tensor that the kernel does not read.
    before = (fresh_K, offset_O, 0) if packed is None else (packed.fresh_K, packed.offset_O, packed.most_pages)
    rows = ROW_BYTES // source.key_PND.element_size() // width(target.head_size)
    _compact_kernel[(-(-token_T.shape[0] // rows),)](
        *views, table_B, owner, token_T, fresh_K, source.layer_page_L, target.layer_page_L, *before,
        token_T.shape[0], key_scale, value_scale,
        source.key_PND.stride(0), source.key_PND.stride(1), source.value_PND.stride(0), source.value_PND.stride(1),
        source.block_pages, source.head_pages,
        target.key_PND.stride(0), target.key_PND.stride(1), target.value_PND.stride(0), target.value_PND.stride(1),
        target.block_pages, target.head_pages,
        LH=layers * heads, H=heads, N_FROM=source.page_tokens, N=page_tokens,
        D=target.head_size, BLOCK_D=power_of_two(target.head_size), ROWS=rows, BITS=same, LIMIT=limit,
        PACKED=packed is not None,
        num_warps=4,
    )  # fmt: skip
