"""The Triton kernels of `decode`: one program a (query tile, KV head, split), then the merge of the splits.

Key `i` of head (l, h) lies in that head's page `i // N`: the first `s` are ordinary leading blocks, then come the
packed pages, then the ordinary blocks from `g` on. All but the last page are whole, so the head's length follows from
vLLM's own: `len(l, h) = (s + pages(l, h) - g) * N + seq_len`. An un-evicted row has s = g = pages = 0.

Packed pages of codes come after all of these, one class after the other, in steps of `BLOCK` tokens of one page. How
many tokens they hold follows as well: as many as there is room for, but in all no more than there were to choose from,
`(g - s) * N`. `CLASSES` has of each class the bits of keys and values, tokens of a page, of a step, and the header's
bytes. Where there are classes, columns of a tile are those of the first half of a head, padded to a power of two, then
those of the second: so that what two halves of a byte hold are the two halves of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_defensive_kernels.addressing import in_page, product
from vllm_defensive_kernels.logits import before_any_key, bent


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
def _coded_pages(slot, head, layer, offset_ptr, offset_stride, c, LH: tl.constexpr, H: tl.constexpr):
    """First packed page of the c-th class of codes (from 0 on), and how many there are, of one head of a slot."""
    own = offset_ptr + slot * offset_stride + (c + 1) * LH + layer * H + head
    first = tl.load(own, mask=slot >= 0, other=0)
    return first, tl.load(own + 1, mask=slot >= 0, other=0) - first


@triton.jit
def _coded_steps(slot, head, layer, offset_ptr, offset_stride, LH: tl.constexpr, H: tl.constexpr,
                 CLASSES: tl.constexpr):  # fmt: skip
    """Steps over all pages of codes of one head of a slot."""
    steps = 0
    for c in tl.static_range(len(CLASSES)):
        _, pages = _coded_pages(slot, head, layer, offset_ptr, offset_stride, c, LH, H)
        steps += pages * tl.cdiv(CLASSES[c][2], CLASSES[c][3])
    return steps


@triton.jit
def _split_steps(steps, SPLITS: tl.constexpr, MIN_STEPS: tl.constexpr):
    """Steps of each split, and splits that have work (at least one, which writes the output)."""
    each = tl.maximum(tl.cdiv(steps, SPLITS), MIN_STEPS)
    return each, tl.maximum(tl.cdiv(steps, each), 1)


@triton.jit
def _columns(D: tl.constexpr, BLOCK_D: tl.constexpr, HALVES: tl.constexpr):
    """Which number of a head each column of a tile is, and whether there is one."""
    column = tl.arange(0, BLOCK_D)
    if HALVES and D != BLOCK_D:
        c = column % (BLOCK_D // 2)
        return c + column // (BLOCK_D // 2) * (D // 2), c < D // 2
    return column, column < D


@triton.jit
def _weighed(best, total, query, key, seen, scale_log2, CAP: tl.constexpr):
    """One step of the online softmax. seen: bool `[M, T]`, or of all rows alike `[1, T]`. -> the highest logits and the
    sums so far, the weights of these keys, and what becomes of all that was added up before."""
    logit = bent(product(query, tl.trans(key)) * scale_log2, CAP)
    logit = tl.where(seen, logit, float("-inf"))
    new_best = tl.maximum(best, tl.max(logit, 1))
    # A query token that sees nothing yet keeps -inf; -inf - -inf would be NaN.
    base = tl.where(new_best == float("-inf"), 0.0, new_best)
    weight = tl.exp2(logit - base[:, None])
    decay = tl.exp2(best - base)
    return new_best, total * decay + tl.sum(weight, 1), weight.to(query.dtype), decay


@triton.jit
def _codes(page_ptr, begin, exists, row_stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BITS: tl.constexpr,
           ROW: tl.constexpr):  # fmt: skip
    """fp32 `[T, BLOCK_D]`: codes of tokens whose bytes begin at `begin` of their page."""
    if BITS == 8:
        d, real = _columns(D, BLOCK_D, True)
        where = in_page(begin[:, None] + d[None, :], row_stride, ROW)
        return tl.load(page_ptr + where, mask=exists[:, None] & real[None, :], other=0).to(tl.float32)
    c = tl.arange(0, BLOCK_D // 2)
    where = in_page(begin[:, None] + c[None, :], row_stride, ROW)
    byte = tl.load(page_ptr + where, mask=exists[:, None] & (c[None, :] < D // 2), other=0)
    halves = tl.permute(tl.join(byte & 15, byte >> 4), (0, 2, 1))
    return tl.reshape(halves, (byte.shape[0], BLOCK_D)).to(tl.float32)


@triton.jit
def _attend_codes(
    best, total, acc, query, scale_log2, byte_ptr, half_ptr, fresh_row, layer_page_ptr, first, held, begin, end,
    page_bytes, row_bytes, layer_pages, block_pages, head_pages,
    LH: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_LAYERS: tl.constexpr,
    ROW: tl.constexpr, CAP: tl.constexpr, CLASS: tl.constexpr,
):  # fmt: skip
    """The online softmax after steps `[begin, end)` over the pages of one class, which hold `held` tokens. page_bytes,
    row_bytes: distances in memory, of rows within a page only where ROW is not 0."""
    KEY_BITS: tl.constexpr = CLASS[0]
    VALUE_BITS: tl.constexpr = CLASS[1]
    TOKENS: tl.constexpr = CLASS[2]
    BLOCK: tl.constexpr = CLASS[3]
    HEADER: tl.constexpr = CLASS[4]
    KEY_BYTES: tl.constexpr = D * KEY_BITS // 8
    VALUE_BYTES: tl.constexpr = D * VALUE_BITS // 8
    PAGE_STEPS: tl.constexpr = (TOKENS + BLOCK - 1) // BLOCK
    d, real = _columns(D, BLOCK_D, True)
    first_layer_page = tl.load(layer_page_ptr)
    for step in range(begin, end):
        nth = step // PAGE_STEPS
        flat = first + nth
        inner = flat % LH
        if EVEN_LAYERS:
            page = first_layer_page + (inner // H).to(tl.int64) * layer_pages
        else:
            page = tl.load(layer_page_ptr + inner // H)
        page += tl.load(fresh_row + flat // LH).to(tl.int64) * block_pages + (inner % H).to(tl.int64) * head_pages
        bytes_from = byte_ptr + page * page_bytes
        halves_from = half_ptr + page * (page_bytes // 2)
        token = step % PAGE_STEPS * BLOCK + tl.arange(0, BLOCK)
        exists = (token < TOKENS) & (nth * TOKENS + token < held)

        key_where, value_where = in_page(d, row_bytes // 2, ROW // 2), in_page(d + D, row_bytes // 2, ROW // 2)
        key_step = tl.load(halves_from + key_where, mask=real, other=0.0).to(tl.float32)
        key_min = tl.load(halves_from + value_where, mask=real, other=0.0).to(tl.float32)
        step_where = in_page(2 * D + token, row_bytes // 2, ROW // 2)
        min_where = in_page(2 * D + TOKENS + token, row_bytes // 2, ROW // 2)
        value_step = tl.load(halves_from + step_where, mask=exists, other=0.0).to(tl.float32)
        value_min = tl.load(halves_from + min_where, mask=exists, other=0.0).to(tl.float32)
        key = _codes(bytes_from, HEADER + token * KEY_BYTES, exists, row_bytes, D, BLOCK_D, KEY_BITS, ROW)
        key = (key * key_step[None, :] + key_min[None, :]).to(query.dtype)
        best, total, weight, decay = _weighed(best, total, query, key, exists[None, :], scale_log2, CAP)
        where = HEADER + TOKENS * KEY_BYTES + token * VALUE_BYTES
        value = _codes(bytes_from, where, exists, row_bytes, D, BLOCK_D, VALUE_BITS, ROW)
        value = (value * value_step[:, None] + value_min[:, None]).to(query.dtype)
        acc = acc * decay[:, None] + product(weight, value)
    return best, total, acc


# A number whose value changes from call to call must not make a variant of its own when it happens to be 1 or 16.
@triton.jit(do_not_specialize=["layer", "q_tiles"])
def decode_kernel(
    out_ptr, part_ptr, lse_ptr, query_ptr, key_ptr, value_ptr, byte_ptr, half_ptr, void_ptr,
    query_start_ptr, seq_len_ptr, table_ptr, slot_ptr, fresh_ptr, offset_ptr, shared_ptr, growth_ptr, layer_page_ptr,
    scale_log2, value_scale, layer, q_tiles,
    query_token_stride, query_head_stride, out_token_stride, out_head_stride,
    key_page_stride, key_token_stride, value_page_stride, value_token_stride,
    table_stride, fresh_stride, offset_stride, layer_pages, block_pages, head_pages,
    LH: tl.constexpr, H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, MIN_STEPS: tl.constexpr,
    EVEN_LAYERS: tl.constexpr, CLASSES: tl.constexpr, ROW: tl.constexpr, CAP: tl.constexpr,
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
    steps = tl.cdiv(keys, BLOCK_T)
    coded = _coded_steps(slot, head, layer, offset_ptr, offset_stride, LH, H, CLASSES)
    each, used = _split_steps(steps + coded, SPLITS, MIN_STEPS)
    if split >= used:
        return

    m = tl.arange(0, BLOCK_M)
    d, real = _columns(D, BLOCK_D, len(CLASSES) > 0)
    q_token = q_first + m // G
    q_head = head * G + m % G
    live = (q_token <= q_last) & (m < TILE_Q * G)
    sees = length - (q_len - 1 - q_token)  # causal among the row's own query tokens; all older keys are seen by all
    token = (q_begin + q_token).to(tl.int64)
    query = tl.load(
        query_ptr + token[:, None] * query_token_stride + q_head[:, None] * query_head_stride + d[None, :],
        mask=live[:, None] & real[None, :], other=0.0,
    )  # fmt: skip

    table_row = table_ptr + row.to(tl.int64) * table_stride
    fresh_row = fresh_ptr + slot * fresh_stride
    first_layer_page = tl.load(layer_page_ptr)
    best, total = before_any_key(void_ptr, q_head, live, split, BLOCK_M)
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
            mask=exists[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        value = tl.load(
            value_ptr + (page * value_page_stride + in_page * value_token_stride)[:, None] + d[None, :],
            mask=exists[:, None] & real[None, :], other=0.0,
        )  # fmt: skip
        seen = key_index[None, :] < sees[:, None]
        best, total, weight, decay = _weighed(best, total, query, key.to(query.dtype), seen, scale_log2, CAP)
        acc = acc * decay[:, None] + product(weight, value.to(query.dtype))

    NUMBER_BYTES: tl.constexpr = key_ptr.dtype.element_ty.primitive_bitwidth // 8
    left = (growth - shared) * N - packed * N
    before = steps
    for c in tl.static_range(len(CLASSES)):
        coded_first, pages = _coded_pages(slot, head, layer, offset_ptr, offset_stride, c, LH, H)
        held = tl.minimum(pages * CLASSES[c][2], left)
        coded = pages * tl.cdiv(CLASSES[c][2], CLASSES[c][3])
        best, total, acc = _attend_codes(
            best, total, acc, query, scale_log2, byte_ptr, half_ptr, fresh_row, layer_page_ptr, coded_first, held,
            tl.maximum(split * each - before, 0), tl.minimum(split * each + each - before, coded),
            key_page_stride * NUMBER_BYTES, key_token_stride * NUMBER_BYTES, layer_pages, block_pages, head_pages,
            LH, H, D, BLOCK_D, EVEN_LAYERS, ROW, CAP, CLASSES[c],
        )  # fmt: skip
        left -= held
        before += coded

    total = tl.where(total == 0.0, 1.0, total)  # of queries that see nothing in this split, whose best is -inf
    acc = acc * (value_scale / total)[:, None]
    stored = live[:, None] & real[None, :]
    if used == 1:
        where_out = token[:, None] * out_token_stride + q_head[:, None] * out_head_stride + d[None, :]
        tl.store(out_ptr + where_out, acc.to(out_ptr.dtype.element_ty), mask=stored)
    else:
        where_part = (token * (H * G) + q_head) * SPLITS + split
        tl.store(part_ptr + where_part[:, None] * D + d[None, :], acc, mask=stored)
        tl.store(lse_ptr + where_part, best + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["layer", "max_query_len"])
def merge_kernel(
    out_ptr, part_ptr, lse_ptr,
    query_start_ptr, seq_len_ptr, slot_ptr, offset_ptr, shared_ptr, growth_ptr,
    layer, max_query_len, out_token_stride, out_head_stride, offset_stride,
    LH: tl.constexpr, H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, MIN_STEPS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // max_query_len
    q_token = tl.program_id(0) % max_query_len
    q_head = tl.program_id(1)
    TILE_Q: tl.constexpr = BLOCK_M // G
    q_begin = tl.load(query_start_ptr + row)
    q_len = tl.load(query_start_ptr + row + 1) - q_begin
    if q_token >= q_len:
        return
    slot, _, _, _, _, length = _head_length(
        row, q_head // G, layer, slot_ptr, seq_len_ptr, offset_ptr, shared_ptr, growth_ptr, offset_stride, H, N
    )
    q_last = tl.minimum((q_token // TILE_Q + 1) * TILE_Q, q_len) - 1
    steps = tl.cdiv(length - (q_len - 1 - q_last), BLOCK_T)
    steps += _coded_steps(slot, q_head // G, layer, offset_ptr, offset_stride, LH, H, CLASSES)
    _, used = _split_steps(steps, SPLITS, MIN_STEPS)
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
