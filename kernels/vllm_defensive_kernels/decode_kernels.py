"""The Triton kernels of `decode`: one program a (query tile, KV head, split), then the merge of the splits.

Key `i` of head (l, h) lies in that head's page `i // N`: the first `s` are ordinary leading blocks, then come the
packed pages, then the ordinary blocks from `g` on. All but the last page are whole, so the head's length follows from
vLLM's own: `len(l, h) = (s + pages(l, h) - g) * N + seq_len`. An un-evicted row has s = g = pages = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_defensive_kernels.addressing import product


@triton.jit
def _head_length(row, head, layer, slot_ptr, seq_len_ptr, offset_ptr, shared_ptr, growth_ptr, offset_stride,
                 H: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """Slot, s, g, first packed page, packed pages and key count of one head of one row."""
    slot = tl.load(slot_ptr + row).to(tl.int64)
    evicted = slot >= 0
    shared = tl.load(shared_ptr + slot, mask=evicted, other=0)
    growth = tl.load(growth_ptr + slot, mask=evicted, other=0)
    own = offset_ptr + slot * offset_stride + layer * H + head
    first = tl.load(own, mask=evicted, other=0)
    packed = tl.load(own + 1, mask=evicted, other=0) - first
    length = (shared + packed - growth) * N + tl.load(seq_len_ptr + row)
    return slot, shared, growth, first, packed, length


@triton.jit
def _split_steps(keys, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, MIN_STEPS: tl.constexpr):
    """Steps in all, steps of each split, and splits that have work (at least one, which writes the output)."""
    steps = tl.cdiv(keys, BLOCK_T)
    each = tl.maximum(tl.cdiv(steps, SPLITS), MIN_STEPS)
    return steps, each, tl.maximum(tl.cdiv(steps, each), 1)


# A number whose value changes from call to call must not make a variant of its own when it happens to be 1 or 16.
@triton.jit(do_not_specialize=["layer", "q_tiles"])
def decode_kernel(
    out_ptr, part_ptr, lse_ptr, query_ptr, key_ptr, value_ptr,
    query_start_ptr, seq_len_ptr, table_ptr, slot_ptr, fresh_ptr, offset_ptr, shared_ptr, growth_ptr, layer_page_ptr,
    scale_log2, value_scale, layer, q_tiles,
    query_token_stride, query_head_stride, out_token_stride, out_head_stride,
    key_page_stride, key_token_stride, value_page_stride, value_token_stride,
    table_stride, fresh_stride, offset_stride, layer_pages, block_pages, head_pages,
    LH: tl.constexpr, H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, MIN_STEPS: tl.constexpr,
    EVEN_LAYERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // q_tiles
    tile = tl.program_id(0) % q_tiles
    head = tl.program_id(1)
    split = tl.program_id(2)
    TILE_Q: tl.constexpr = BLOCK_M // G  # query tokens a tile; their G query heads share each key that is read

    q_begin = tl.load(query_start_ptr + row)
    q_len = tl.load(query_start_ptr + row + 1) - q_begin
    q_first = tile * TILE_Q
    if q_first >= q_len:
        return
    slot, shared, growth, first, packed, length = _head_length(
        row, head, layer, slot_ptr, seq_len_ptr, offset_ptr, shared_ptr, growth_ptr, offset_stride, H, N
    )
    q_last = tl.minimum(q_first + TILE_Q, q_len) - 1
    keys = length - (q_len - 1 - q_last)  # what the tile's last query token sees
    steps, each, used = _split_steps(keys, BLOCK_T, SPLITS, MIN_STEPS)
    if split >= used:
        return

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    q_token = q_first + m // G
    q_head = head * G + m % G
    live = (q_token <= q_last) & (m < TILE_Q * G)
    sees = length - (q_len - 1 - q_token)  # causal among the row's own query tokens; all older keys are seen by all
    token = (q_begin + q_token).to(tl.int64)
    query = tl.load(
        query_ptr + token[:, None] * query_token_stride + q_head[:, None] * query_head_stride + d[None, :],
        mask=live[:, None] & (d[None, :] < D), other=0.0,
    )  # fmt: skip

    table_row = table_ptr + row.to(tl.int64) * table_stride
    fresh_row = fresh_ptr + slot * fresh_stride
    first_layer_page = tl.load(layer_page_ptr)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for step in range(split * each, tl.minimum(split * each + each, steps)):
        key_index = step * BLOCK_T + tl.arange(0, BLOCK_T)
        exists = key_index < keys
        nth = key_index // N
        flat = first + nth - shared
        in_packed = (nth >= shared) & (nth < shared + packed)
        position = tl.where(nth < shared, nth, nth - packed - shared + growth)
        # One load a key, whichever segment it is in: each thread makes these small loads for every key that it copies.
        block = tl.load(tl.where(in_packed, fresh_row + flat // LH, table_row + position), mask=exists, other=0)
        inner = tl.where(in_packed, flat % LH, layer * H + head)
        if EVEN_LAYERS:
            page = first_layer_page + (inner // H).to(tl.int64) * layer_pages
        else:
            page = tl.load(layer_page_ptr + inner // H, mask=exists, other=0)
        page += block.to(tl.int64) * block_pages + (inner % H).to(tl.int64) * head_pages
        in_page = key_index % N

        key = tl.load(
            key_ptr + (page * key_page_stride + in_page * key_token_stride)[:, None] + d[None, :],
            mask=exists[:, None] & (d[None, :] < D), other=0.0,
        )  # fmt: skip
        value = tl.load(
            value_ptr + (page * value_page_stride + in_page * value_token_stride)[:, None] + d[None, :],
            mask=exists[:, None] & (d[None, :] < D), other=0.0,
        )  # fmt: skip
        logit = product(query, tl.trans(key.to(query.dtype))) * scale_log2
        logit = tl.where(key_index[None, :] < sees[:, None], logit, float("-inf"))
        new_best = tl.maximum(best, tl.max(logit, 1))
        # A query token that sees nothing yet keeps -inf; -inf - -inf would be NaN.
        base = tl.where(new_best == float("-inf"), 0.0, new_best)
        weight = tl.exp2(logit - base[:, None])
        decay = tl.exp2(best - base)
        total = total * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None] + product(weight.to(query.dtype), value.to(query.dtype))
        best = new_best

    acc = acc * (value_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    stored = live[:, None] & (d[None, :] < D)
    if used == 1:
        where_out = token[:, None] * out_token_stride + q_head[:, None] * out_head_stride + d[None, :]
        tl.store(out_ptr + where_out, acc.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        where_part = (token * (H * G) + q_head) * SPLITS + split
        tl.store(part_ptr + where_part[:, None] * D + d[None, :], acc, mask=stored)
        tl.store(lse_ptr + where_part, tl.where(total == 0.0, float("-inf"), best + tl.log2(total)), mask=live)


@triton.jit(do_not_specialize=["layer", "max_query_len"])
def merge_kernel(
    out_ptr, part_ptr, lse_ptr,
    query_start_ptr, seq_len_ptr, slot_ptr, offset_ptr, shared_ptr, growth_ptr,
    layer, max_query_len, out_token_stride, out_head_stride, offset_stride,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, MIN_STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // max_query_len
    q_token = tl.program_id(0) % max_query_len
    q_head = tl.program_id(1)
    TILE_Q: tl.constexpr = BLOCK_M // G
    q_begin = tl.load(query_start_ptr + row)
    q_len = tl.load(query_start_ptr + row + 1) - q_begin
    if q_token >= q_len:
        return
    _, _, _, _, _, length = _head_length(
        row, q_head // G, layer, slot_ptr, seq_len_ptr, offset_ptr, shared_ptr, growth_ptr, offset_stride, H, N
    )
    q_last = tl.minimum((q_token // TILE_Q + 1) * TILE_Q, q_len) - 1
    _, _, used = _split_steps(length - (q_len - 1 - q_last), BLOCK_T, SPLITS, MIN_STEPS)
    if used == 1:
        return  # that split has written the output itself

    split = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    token = (q_begin + q_token).to(tl.int64)
    where = (token * (H * G) + q_head) * SPLITS + split
    lse = tl.load(lse_ptr + where, mask=split < used, other=float("-inf"))
    part = tl.load(
        part_ptr + where[:, None] * D + d[None, :], mask=(split < used)[:, None] & (d[None, :] < D), other=0.0
    )
    weight = tl.exp2(lse - tl.max(lse, 0))  # the first split is seen by every query token, so the maximum is finite
    out = tl.sum(weight[:, None] * part, 0) / tl.sum(weight, 0)
    where_out = token * out_token_stride + q_head * out_head_stride + d
    tl.store(out_ptr + where_out, out.to(out_ptr.dtype.element_ty), mask=d < D)
