"""The Triton kernels of `window`.

Two passes over K, because a softmax row must be normalised before rows can be compared:

1. statistics of each query row over a span of keys: maximum, sum, the sum before the window, and that sum as pooling
   would leave it (pooling is a symmetric operator, so the pooled row's sum needs no pooled row);
2. attention itself, pooled along tokens, its maximum and mean over the rows of a head.

Pooling needs neighbours along the token axis, which is spread over a tile's threads. Therefore each line of the tile in
pass 2 walks along its own run of tokens, one token an iteration: neighbours are then *earlier iterations of the same
thread*, kept as running sums in registers, and nothing is exchanged and no [G, W, S] is stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_defensive_kernels.addressing import positional_page, product
from vllm_defensive_kernels.logits import before_any_key, bent


@triton.jit
def _query_tile(query_ptr, layer, row, head, chunk, layer_stride, row_stride, window_stride, head_stride,
                G: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                BLOCK_M: tl.constexpr):  # fmt: skip
    """One chunk of a head's G*W query rows [BLOCK_M, BLOCK_D], their place in the window, and which of them exist."""
    m = chunk * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    group, place = m // W, m % W
    live = m < G * W
    where = layer.to(tl.int64) * layer_stride + row.to(tl.int64) * row_stride
    where += (place.to(tl.int64) * window_stride + (head * G + group) * head_stride)[:, None] + d[None, :]
    query = tl.load(query_ptr + where, mask=live[:, None] & (d[None, :] < D), other=0.0)
    return query, place, live


# Numbers that follow the batch must not make a variant of their own when they happen to be 1 or a multiple of 16.
@triton.jit(do_not_specialize=["chunks", "spans", "stats_plane"])
def row_statistics_kernel(
    stats_ptr, query_ptr, key_ptr, table_ptr, count_ptr, layer_page_ptr,
    scale_log2, chunks, spans, stats_plane,
    query_layer_stride, query_row_stride, query_window_stride, query_head_stride,
    key_page_stride, key_token_stride, table_stride, block_pages, head_pages,
    H: tl.constexpr, G: tl.constexpr, W: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, SPAN: tl.constexpr, POOL: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    span = tl.program_id(0)
    layer = tl.program_id(1) // H
    head = tl.program_id(1) % H
    row = tl.program_id(2) // chunks
    chunk = tl.program_id(2) % chunks
    scored = tl.load(count_ptr + row)
    if (scored == 0) | (span * SPAN >= scored + W):
        return
    query, place, _ = _query_tile(
        query_ptr, layer, row, head, chunk, query_layer_stride, query_row_stride, query_window_stride,
        query_head_stride, G, W, D, BLOCK_D, BLOCK_M,
    )  # fmt: skip
    last_seen = scored + place
    first_page = tl.load(layer_page_ptr + layer) + head.to(tl.int64) * head_pages
    table_row = table_ptr + row.to(tl.int64) * table_stride
    d = tl.arange(0, BLOCK_D)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    full = tl.zeros([BLOCK_M], tl.float32)
    before = tl.zeros([BLOCK_M], tl.float32)
    pooled = tl.zeros([BLOCK_M], tl.float32)
    for begin in range(span * SPAN, tl.minimum(span * SPAN + SPAN, scored + W), BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        exists = t < scored + W
        page = positional_page(t, exists, table_row, first_page, block_pages, N)
        where = page * key_page_stride + (t % N) * key_token_stride
        key = tl.load(key_ptr + where[:, None] + d[None, :], mask=exists[:, None] & (d[None, :] < D), other=0.0)
        logit = bent(product(query, tl.trans(key.to(query.dtype))) * scale_log2, CAP)
        logit = tl.where(t[None, :] <= last_seen[:, None], logit, float("-inf"))
        new_best = tl.maximum(best, tl.max(logit, 1))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)  # a span inside the window may hide all its keys
        weight = tl.exp2(logit - base[:, None])
        decay = tl.exp2(best - base)
        # In how many of the pooled row's entries this token is counted: fewer than POOL at the two ends.
        cover = tl.minimum(t + POOL // 2, scored - 1) - tl.maximum(t - POOL // 2, 0) + 1
        cover = tl.where(t < scored, cover, 0).to(tl.float32)
        full = full * decay + tl.sum(weight, 1)
        before = before * decay + tl.sum(tl.where((t < scored)[None, :], weight, 0.0), 1)
        pooled = pooled * decay + tl.sum(weight * cover[None, :], 1)
        best = new_best
    m = tl.arange(0, BLOCK_M)
    tile = (row * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * chunks + chunk  # of [R, L*H, chunks]
    out = stats_ptr + (tile * spans + span) * BLOCK_M
    tl.store(out + m, best)
    tl.store(out + stats_plane + m, full)
    tl.store(out + 2 * stats_plane + m, before)
    tl.store(out + 3 * stats_plane + m, pooled)


@triton.jit(do_not_specialize=["chunks", "spans", "stats_plane"])
def merge_statistics_kernel(
    lse_ptr, gain_ptr, stats_ptr, count_ptr, void_ptr, chunks, spans, stats_plane,
    G: tl.constexpr, W: tl.constexpr, BLOCK_M: tl.constexpr, SPAN: tl.constexpr, MERGE_SPANS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    scored = tl.load(count_ptr + row)
    if scored == 0:
        return
    used = tl.cdiv(scored + W, SPAN)
    m = tl.arange(0, BLOCK_M)
    tile = row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)  # of [R, L*H, chunks]
    place = tl.program_id(0) % chunks * BLOCK_M + m  # among the head's G*W query rows
    q_head = tl.program_id(0) // chunks * G + place // W
    best, full = before_any_key(void_ptr, q_head, place < G * W, 0, BLOCK_M)
    before = tl.zeros([BLOCK_M], tl.float32)
    pooled = tl.zeros([BLOCK_M], tl.float32)
    for begin in range(0, used, MERGE_SPANS):
        span = begin + tl.arange(0, MERGE_SPANS)
        known = (span < used)[:, None]
        where = stats_ptr + (tile * spans + span)[:, None] * BLOCK_M + m[None, :]
        part_best = tl.load(where, mask=known, other=float("-inf"))
        new_best = tl.maximum(best, tl.max(part_best, 0))
        weight = tl.exp2(part_best - new_best[None, :])  # every row sees key 0, so new_best is finite
        decay = tl.exp2(best - new_best)
        full = full * decay + tl.sum(weight * tl.load(where + stats_plane, mask=known, other=0.0), 0)
        before = before * decay + tl.sum(weight * tl.load(where + 2 * stats_plane, mask=known, other=0.0), 0)
        pooled = pooled * decay + tl.sum(weight * tl.load(where + 3 * stats_plane, mask=known, other=0.0), 0)
        best = new_best
    tl.store(lse_ptr + tile * BLOCK_M + m, best + tl.log2(full))
    # A row whose mass lies in the window altogether underflows to zeros: it stays zero instead of 0 / 0.
    tl.store(gain_ptr + tile * BLOCK_M + m, tl.where(pooled > 0.0, before / tl.where(pooled > 0.0, pooled, 1.0), 0.0))


@triton.jit
def _attend(key, exists, query, lse, scale_log2, CAP: tl.constexpr):
    """Attention of each query row to each line's key [LINES, rows]; 0 where there is no key."""
    weight = tl.exp2(bent(product(key.to(query.dtype), tl.trans(query)) * scale_log2, CAP) - lse[None, :])
    return tl.where(exists[:, None], weight, 0.0)


@triton.jit
def _slide(weight, sum_1, sum_2, sum_3, sum_4, POOL: tl.constexpr):
    """Sum of each line's last POOL weights, and sum_k, the sum of its last k, for the next step."""
    if POOL == 5:
        return sum_4 + weight, weight, sum_1 + weight, sum_2 + weight, sum_3 + weight
    elif POOL == 3:
        return sum_2 + weight, weight, sum_1 + weight, sum_3, sum_4
    else:
        return weight, sum_1, sum_2, sum_3, sum_4


@triton.jit(do_not_specialize=["chunks", "slab", "total_tokens"])
def score_kernel(
    peak_ptr, mean_ptr, lse_ptr, gain_ptr, query_ptr, key_ptr, table_ptr, count_ptr, start_ptr, layer_page_ptr,
    scale_log2, chunks, slab, total_tokens,
    query_layer_stride, query_row_stride, query_window_stride, query_head_stride,
    key_page_stride, key_token_stride, table_stride, block_pages, head_pages,
    H: tl.constexpr, G: tl.constexpr, W: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, LINES: tl.constexpr, RUN: tl.constexpr, POOL: tl.constexpr, PEAK: tl.constexpr,
    PARTS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    # Neighbouring programs read the same keys for other query rows: all but the first find them in the L2 cache.
    tile = tl.program_id(0) // chunks
    chunk = tl.program_id(0) % chunks
    layer = tl.program_id(1) // H
    head = tl.program_id(1) % H
    row = tl.program_id(2)
    REACH: tl.constexpr = POOL // 2 if PEAK else 0
    PART: tl.constexpr = BLOCK_M // PARTS
    scored = tl.load(count_ptr + row)
    if tile * (LINES * RUN) >= scored:
        return
    first_page = tl.load(layer_page_ptr + layer) + head.to(tl.int64) * head_pages
    table_row = table_ptr + row.to(tl.int64) * table_stride
    out_row = chunk.to(tl.int64) * slab + tl.program_id(1).to(tl.int64) * total_tokens + tl.load(start_ptr + row)
    d = tl.arange(0, BLOCK_D)
    m = tl.arange(0, PART)
    # A program's BLOCK_M query rows share each key that is read. They are computed in one or two parts, one after the
    # other: the attention of 128 rows at once, beside the running sums, is more than the registers hold.
    rows = ((row * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * chunks + chunk) * BLOCK_M + m
    query_a, _, live = _query_tile(
        query_ptr, layer, row, head, chunk * PARTS, query_layer_stride, query_row_stride, query_window_stride,
        query_head_stride, G, W, D, BLOCK_D, PART,
    )  # fmt: skip
    lse_a = tl.load(lse_ptr + rows, mask=live, other=float("inf"))  # exp2(x - inf) = 0: absent rows weigh nothing
    gain_a = tl.load(gain_ptr + rows, mask=live, other=0.0)
    zero = tl.zeros([LINES, PART], tl.float32)
    a_1, a_2, a_3, a_4 = zero, zero, zero, zero
    if PARTS == 2:
        query_b, _, live = _query_tile(
            query_ptr, layer, row, head, chunk * PARTS + 1, query_layer_stride, query_row_stride,
            query_window_stride, query_head_stride, G, W, D, BLOCK_D, PART,
        )  # fmt: skip
        lse_b = tl.load(lse_ptr + rows + PART, mask=live, other=float("inf"))
        gain_b = tl.load(gain_ptr + rows + PART, mask=live, other=0.0)
        b_1, b_2, b_3, b_4 = zero, zero, zero, zero
    for step in range(-REACH, RUN + REACH):
        t = tile * (LINES * RUN) + tl.arange(0, LINES) * RUN + step
        exists = (t >= 0) & (t < scored)
        page = positional_page(t, exists, table_row, first_page, block_pages, N)
        where = page * key_page_stride + (t % N) * key_token_stride
        key = tl.load(key_ptr + where[:, None] + d[None, :], mask=exists[:, None] & (d[None, :] < D), other=0.0)

        weight = _attend(key, exists, query_a, lse_a, scale_log2, CAP)
        mean = tl.sum(weight, 1)
        pooled, a_1, a_2, a_3, a_4 = _slide(weight, a_1, a_2, a_3, a_4, POOL)
        peak = tl.max(pooled * gain_a[None, :], 1)
        if PARTS == 2:
            weight = _attend(key, exists, query_b, lse_b, scale_log2, CAP)
            mean += tl.sum(weight, 1)
            pooled, b_1, b_2, b_3, b_4 = _slide(weight, b_1, b_2, b_3, b_4, POOL)
            peak = tl.maximum(peak, tl.max(pooled * gain_b[None, :], 1))

        tl.store(mean_ptr + out_row + t, mean / (G * W), mask=exists & (step >= 0) & (step < RUN))
        if PEAK:  # the pooled value belongs to the token in the middle of the last POOL ones
            centre = t - REACH
            tl.store(peak_ptr + out_row + centre, peak, mask=(step >= REACH) & (centre < scored))


@triton.jit(do_not_specialize=["chunks", "slab", "total_tokens"])
def combine_kernel(
    score_ptr, mean_ptr, partial_ptr, peak_slab_ptr, mean_slab_ptr, count_ptr, start_ptr, chunks, slab, total_tokens,
    PEAK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Maximum and sum over the chunks of query rows, and the sum of each tile's maxima."""
    row = tl.program_id(2)
    scored = tl.load(count_ptr + row)
    if tl.program_id(0) * BLOCK >= scored:
        return
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = tl.program_id(1).to(tl.int64) * total_tokens + tl.load(start_ptr + row) + t
    mean = tl.zeros([BLOCK], tl.float32)
    peak = tl.zeros([BLOCK], tl.float32)  # attention is never negative
    from_chunk = where
    for _ in range(chunks):
        mean += tl.load(mean_slab_ptr + from_chunk, mask=t < scored, other=0.0)
        if PEAK:
            peak = tl.maximum(peak, tl.load(peak_slab_ptr + from_chunk, mask=t < scored, other=0.0))
        from_chunk += slab
    if chunks > 1:  # the only slab is the output itself
        tl.store(mean_ptr + where, mean, mask=t < scored)
        if PEAK:
            tl.store(score_ptr + where, peak, mask=t < scored)
    part = (row * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial_ptr + part, tl.sum(peak, 0))


@triton.jit(do_not_specialize=["total_tokens"])
def clamp_kernel(score_ptr, partial_ptr, count_ptr, start_ptr, total_tokens,
                  TILES_P2: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Raise every score to its head's mean, whose tiles' sums are in partial."""
    row = tl.program_id(2)
    scored = tl.load(count_ptr + row)
    if tl.program_id(0) * BLOCK >= scored:
        return
    tile = tl.arange(0, TILES_P2)
    part = partial_ptr + (row * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * tl.num_programs(0)
    mean = tl.sum(tl.load(part + tile, mask=tile < tl.cdiv(scored, BLOCK), other=0.0), 0) / scored
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = score_ptr + tl.program_id(1).to(tl.int64) * total_tokens + tl.load(start_ptr + row) + t
    tl.store(where, tl.maximum(tl.load(where, mask=t < scored, other=0.0), mean), mask=t < scored)


@triton.jit(do_not_specialize=["total_tokens"])
def pool_kernel(score_ptr, mean_ptr, count_ptr, start_ptr, total_tokens,
                 POOL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Average of POOL neighbours, zeros beyond the ends."""
    row = tl.program_id(2)
    scored = tl.load(count_ptr + row)
    if tl.program_id(0) * BLOCK >= scored:
        return
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    base = tl.program_id(1).to(tl.int64) * total_tokens + tl.load(start_ptr + row)
    total = tl.zeros([BLOCK], tl.float32)
    for shift in tl.static_range(-(POOL // 2), POOL // 2 + 1):
        near = t + shift
        total += tl.load(mean_ptr + base + near, mask=(near >= 0) & (near < scored), other=0.0)
    tl.store(score_ptr + base + t, total / POOL, mask=t < scored)
