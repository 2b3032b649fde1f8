"""How much the last W queries of a prompt attend to every earlier token, aggregated to one score a (head, token).

Two passes over K, because a softmax row must be normalised before rows can be compared:

1. statistics of each query row over a span of keys: maximum, sum, the sum before the window, and that sum as pooling
   would leave it (pooling is a symmetric operator, so the pooled row's sum needs no pooled row);
2. attention itself, pooled along tokens, its maximum and mean over the rows of a head.

Pooling needs neighbours along the token axis, which is spread over a tile's threads. Therefore each line of the tile in
pass 2 walks along its own run of tokens, one token an iteration: neighbours are then *earlier iterations of the same
thread*, kept as running sums in registers, and nothing is exchanged and no [G, W, S] is stored.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_defensive_kernels import reference
from vllm_defensive_kernels.addressing import positional_page, power_of_two, product, runs_triton
from vllm_defensive_kernels.checks import (
    refuse,
    require_choice,
    require_device,
    require_dtype,
    require_int,
    require_shape,
)
from vllm_defensive_kernels.pages import PagedKV, RaggedTokens

BLOCK_M = 128  # query rows a tile: the 4 x 32 of a Llama-3 head at once
BLOCK_T = 64  # keys a step of pass 1
LINES = 64  # lines of pass 2's tile
MERGE_SPANS = 8


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


@triton.jit
def _row_statistics_kernel(
    stats_ptr, query_ptr, key_ptr, table_ptr, count_ptr, layer_page_ptr,
    scale_log2, chunks, spans, stats_plane,
    query_layer_stride, query_row_stride, query_window_stride, query_head_stride,
    key_page_stride, key_token_stride, table_stride, block_pages, head_pages,
    H: tl.constexpr, G: tl.constexpr, W: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, SPAN: tl.constexpr, POOL: tl.constexpr,
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
        logit = product(query, tl.trans(key.to(query.dtype))) * scale_log2
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


@triton.jit
def _merge_statistics_kernel(
    lse_ptr, gain_ptr, stats_ptr, count_ptr, chunks, spans, stats_plane,
    W: tl.constexpr, BLOCK_M: tl.constexpr, SPAN: tl.constexpr, MERGE_SPANS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    scored = tl.load(count_ptr + row)
    if scored == 0:
        return
    used = tl.cdiv(scored + W, SPAN)
    m = tl.arange(0, BLOCK_M)
    tile = row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)  # of [R, L*H, chunks]
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    full = tl.zeros([BLOCK_M], tl.float32)
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
def _score_kernel(
    peak_ptr, mean_ptr, partial_ptr, lse_ptr, gain_ptr, query_ptr, key_ptr, table_ptr, count_ptr, start_ptr,
    layer_page_ptr, scale_log2, chunks, tiles, total_tokens,
    query_layer_stride, query_row_stride, query_window_stride, query_head_stride,
    key_page_stride, key_token_stride, table_stride, block_pages, head_pages,
    H: tl.constexpr, G: tl.constexpr, W: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, LINES: tl.constexpr, RUN: tl.constexpr, POOL: tl.constexpr, PEAK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    layer = tl.program_id(1) // H
    head = tl.program_id(1) % H
    row = tl.program_id(2)
    REACH: tl.constexpr = POOL // 2 if PEAK else 0
    scored = tl.load(count_ptr + row)
    if tile * (LINES * RUN) >= scored:
        return
    line_begin = tile * (LINES * RUN) + tl.arange(0, LINES) * RUN
    first_page = tl.load(layer_page_ptr + layer) + head.to(tl.int64) * head_pages
    table_row = table_ptr + row.to(tl.int64) * table_stride
    out_row = tl.program_id(1).to(tl.int64) * total_tokens + tl.load(start_ptr + row)
    d = tl.arange(0, BLOCK_D)
    m = tl.arange(0, BLOCK_M)
    peak_sum = tl.zeros([LINES], tl.float32)
    for chunk in range(chunks):
        query, _, live = _query_tile(
            query_ptr, layer, row, head, chunk, query_layer_stride, query_row_stride, query_window_stride,
            query_head_stride, G, W, D, BLOCK_D, BLOCK_M,
        )  # fmt: skip
        rows = ((row * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * chunks + chunk) * BLOCK_M + m
        lse = tl.load(lse_ptr + rows, mask=live, other=float("inf"))  # exp2(x - inf) = 0: absent rows weigh nothing
        gain = tl.load(gain_ptr + rows, mask=live, other=0.0)
        # sum_k: the last k attention values of each line, not counting the current one
        sum_1 = tl.zeros([LINES, BLOCK_M], tl.float32)
        sum_2 = tl.zeros([LINES, BLOCK_M], tl.float32)
        sum_3 = tl.zeros([LINES, BLOCK_M], tl.float32)
        sum_4 = tl.zeros([LINES, BLOCK_M], tl.float32)
        for step in range(-REACH, RUN + REACH):
            t = line_begin + step
            exists = (t >= 0) & (t < scored)
            page = positional_page(t, exists, table_row, first_page, block_pages, N)
            where = page * key_page_stride + (t % N) * key_token_stride
            key = tl.load(key_ptr + where[:, None] + d[None, :], mask=exists[:, None] & (d[None, :] < D), other=0.0)
            logit = product(key.to(query.dtype), tl.trans(query)) * scale_log2
            weight = tl.where(exists[:, None], tl.exp2(logit - lse[None, :]), 0.0)

            own = exists & (step >= 0) & (step < RUN)
            mean = tl.sum(weight, 1) / (G * W)
            mean += tl.load(mean_ptr + out_row + t, mask=own & (chunk > 0), other=0.0)
            tl.store(mean_ptr + out_row + t, mean, mask=own)
            if PEAK:
                if POOL == 5:
                    pooled = sum_4 + weight
                    sum_4 = sum_3 + weight
                    sum_3 = sum_2 + weight
                    sum_2 = sum_1 + weight
                    sum_1 = weight
                elif POOL == 3:
                    pooled = sum_2 + weight
                    sum_2 = sum_1 + weight
                    sum_1 = weight
                else:
                    pooled = weight
                # The pooled value belongs to the token in the middle of the last POOL ones.
                centre = t - REACH
                wanted = (step >= REACH) & (centre < scored)
                peak = tl.max(pooled * gain[None, :], 1)
                peak = tl.maximum(peak, tl.load(peak_ptr + out_row + centre, mask=wanted & (chunk > 0), other=0.0))
                tl.store(peak_ptr + out_row + centre, peak, mask=wanted)
                peak_sum += tl.where(wanted & (chunk == chunks - 1), peak, 0.0)
    if PEAK:
        part = partial_ptr + (row * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * tiles
        tl.store(part + tile, tl.sum(peak_sum, 0))


@triton.jit
def _clamp_kernel(score_ptr, partial_ptr, count_ptr, start_ptr, tiles, total_tokens,
                  TILE: tl.constexpr, TILES_P2: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Raise every score to its head's mean, whose tiles' sums are in partial."""
    row = tl.program_id(2)
    scored = tl.load(count_ptr + row)
    if tl.program_id(0) * BLOCK >= scored:
        return
    tile = tl.arange(0, TILES_P2)
    part = partial_ptr + (row * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * tiles
    mean = tl.sum(tl.load(part + tile, mask=tile < tl.cdiv(scored, TILE), other=0.0), 0) / scored
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = score_ptr + tl.program_id(1).to(tl.int64) * total_tokens + tl.load(start_ptr + row) + t
    tl.store(where, tl.maximum(tl.load(where, mask=t < scored, other=0.0), mean), mask=t < scored)


@triton.jit
def _pool_kernel(score_ptr, mean_ptr, count_ptr, start_ptr, total_tokens,
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


class WindowScores(NamedTuple):
    """score_LHT: aggregated scores. mean_LHT: mean attention of the window, not pooled. fp32 `[L, H, total tokens]`."""

    score_LHT: Tensor
    mean_LHT: Tensor


def tiling(longest: int) -> tuple[int, int]:
    """Keys of a program in pass 1, and tokens of a line in pass 2.

    Long prompts afford long spans and lines (fewer partial results, fewer keys read twice at the ends of a line); short
    ones need more programs than they have heads.
    """
    return (4096, 64) if longest >= 8192 else (1024, 16)


def window_scores(
    query_LRWQD: Tensor,
    pages: PagedKV,
    table_RB: Tensor,
    tokens: RaggedTokens,
    *,
    aggregate: str = "defensive",
    pool: int = 5,
    clamp: bool = True,
    scale: float | None = None,
    key_scale: float = 1.0,
) -> WindowScores:
    """Score the prompt tokens before the observation window by the attention that the window pays them, in all layers.

    query_LRWQD: fp32, fp16 or bf16 `[L, R, W, Q, D]`, the last W queries of each prompt (after RoPE), stride 1 in D.
    table_RB: int32 `[R, blocks]`, block of each N prompt tokens. tokens: row r scores `counts[r]` tokens and its window
        follows them: the prompt has `counts[r] + W` tokens, all of which take part in the softmax. 0 skips a row.
    aggregate: "defensive": maximum over group and window of the mass-preservingly pooled attention, then, with clamp,
        no token below its head's mean (DefensiveKV, arXiv 2510.13334). "mean": pooled mean (SnapKV, arXiv 2404.14469).
    pool: neighbours averaged, 1, 3 or 5. scale: of the logits, default `D ** -0.5`. key_scale: of fp8 pages.

    Returns fp32 scores; formulas in `formulas.py`. Reads K twice and stores nothing of size [G, W, S]; one head with
    G*W > 128 query rows reads it once more for each further 128. Raises ValueError for arguments that do not fit.
    """
    require_shape("query_LRWQD", query_LRWQD, (pages.num_layers, table_RB.shape[0], None, None, pages.head_size))
    require_dtype("query_LRWQD", query_LRWQD, (torch.float32, torch.float16, torch.bfloat16))
    require_device("query_LRWQD", query_LRWQD, pages.key_PND.device)
    require_dtype("table_RB", table_RB, (torch.int32,))
    require_choice("aggregate", aggregate, ("defensive", "mean"))
    require_choice("pool", pool, (1, 3, 5))
    layers, rows, window, num_heads, head_size = query_LRWQD.shape
    heads, page_tokens = pages.num_kv_heads, pages.page_tokens
    if num_heads % heads:
        refuse("query_LRWQD.shape[3]", num_heads, f"a multiple of the {heads} KV heads")
    if query_LRWQD.stride(4) != 1:
        refuse("query_LRWQD.stride()", query_LRWQD.stride(), "stride 1 in D")
    if len(tokens.counts) != rows:
        refuse("tokens.counts", tokens.counts, f"{rows} counts, one a row")
    require_int("tokens.longest + W", tokens.longest + window, 1, table_RB.shape[1] * page_tokens)
    scale = head_size**-0.5 if scale is None else scale
    if not runs_triton(query_LRWQD):
        return WindowScores(*reference.window_scores(
            query_LRWQD, pages, table_RB, tokens,
            aggregate=aggregate, pool=pool, clamp=clamp, scale=scale, key_scale=key_scale,
        ))  # fmt: skip

    group, device = num_heads // heads, query_LRWQD.device
    score_LHT = torch.empty(layers, heads, tokens.total, dtype=torch.float32, device=device)
    mean_LHT = torch.empty_like(score_LHT)
    if tokens.longest == 0:
        return WindowScores(score_LHT, mean_LHT)
    peak = aggregate == "defensive"
    span, run = tiling(tokens.longest)
    chunks = -(-group * window // BLOCK_M)
    spans, tiles = -(-(tokens.longest + window) // span), -(-tokens.longest // (LINES * run))
    stats = torch.empty(4, rows, layers * heads, chunks, spans, BLOCK_M, dtype=torch.float32, device=device)
    lse, gain = torch.empty(2, rows, layers * heads, chunks, BLOCK_M, dtype=torch.float32, device=device)
    partial = torch.empty(rows, layers * heads, tiles, dtype=torch.float32, device=device)
    scale_log2 = scale * key_scale * math.log2(math.e)
    strides = (
        *query_LRWQD.stride()[:4], pages.key_PND.stride(0), pages.key_PND.stride(1),
        table_RB.stride(0), pages.block_pages, pages.head_pages,
    )  # fmt: skip
    shape = {"H": heads, "G": group, "W": window, "N": page_tokens, "D": head_size, "POOL": pool, "BLOCK_M": BLOCK_M}
    shape["BLOCK_D"] = power_of_two(head_size, 16)
    _row_statistics_kernel[(spans, layers * heads, rows * chunks)](
        stats, query_LRWQD, pages.key_PND, table_RB, tokens.count_R, pages.layer_page_L,
        scale_log2, chunks, spans, stats.stride(0), *strides,
        **shape, BLOCK_T=BLOCK_T, SPAN=span, num_warps=4, num_stages=3,
    )  # fmt: skip
    _merge_statistics_kernel[(layers * heads * chunks, rows)](
        lse, gain, stats, tokens.count_R, chunks, spans, stats.stride(0),
        W=window, BLOCK_M=BLOCK_M, SPAN=span, MERGE_SPANS=MERGE_SPANS, num_warps=4,
    )  # fmt: skip
    _score_kernel[(tiles, layers * heads, rows)](
        score_LHT, mean_LHT, partial, lse, gain, query_LRWQD, pages.key_PND, table_RB, tokens.count_R, tokens.start_R,
        pages.layer_page_L, scale_log2, chunks, tiles, tokens.total, *strides,
        **shape, LINES=LINES, RUN=run, PEAK=peak, num_warps=8, num_stages=3,
    )  # fmt: skip
    grid = (-(-tokens.longest // 1024), layers * heads, rows)
    if peak and clamp:
        _clamp_kernel[grid](
            score_LHT, partial, tokens.count_R, tokens.start_R, tiles, tokens.total,
            TILE=LINES * run, TILES_P2=power_of_two(tiles), BLOCK=1024, num_warps=4,
        )  # fmt: skip
    elif not peak:
        _pool_kernel[grid](
            score_LHT, mean_LHT, tokens.count_R, tokens.start_R, tokens.total, POOL=pool, BLOCK=1024, num_warps=4
        )
    return WindowScores(score_LHT, mean_LHT)
