"""How much the last W queries of a prompt attend to every earlier token, aggregated to one score a (head, token)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_defensive_kernels import reference
from vllm_defensive_kernels.addressing import power_of_two, runs_triton, width
from vllm_defensive_kernels.checks import (
    refuse,
    require_choice,
    require_device,
    require_dtype,
    require_int,
    require_shape,
)
from vllm_defensive_kernels.logits import check_void, factors
from vllm_defensive_kernels.pages import PagedKV, RaggedTokens
from vllm_defensive_kernels.window_kernels import (
    clamp_kernel,
    combine_kernel,
    merge_statistics_kernel,
    pool_kernel,
    row_statistics_kernel,
    score_kernel,
)

BLOCK_M = 128  # query rows a tile: the 4 x 32 of a Llama-3 head at once
BLOCK_T = 64  # keys a step of pass 1
LINES = 64  # lines of pass 2's tile, unless their keys would take more than
STEP_BYTES = 2**15
STAGES = 5  # a key's page is read first: three steps of keys in shared memory, two of them in flight
SCORE_WARPS = 8
MERGE_SPANS = 8
BLOCK = 1024  # tokens a program of the kernels that touch only scores


class WindowScores(NamedTuple):
    """score_LHT: aggregated scores. mean_LHT: mean attention of the window, not pooled. fp32 `[L, H, total tokens]`."""

    score_LHT: Tensor
    mean_LHT: Tensor


def tile(head_size: int, key_bytes: int, query_bytes: int) -> tuple[int, int, int]:
    """Query rows of a tile, at most; keys of a step of pass 1; lines of pass 2. The sizes are those of one number.

    Widening fp8 keys takes registers of its own, and so do the longer rows of wide heads: they get half the rows.
    """
    wide = width(head_size)
    rows = BLOCK_M if wide == 1 and key_bytes > 1 else BLOCK_M // 2
    return rows, BLOCK_T // wide, min(LINES, STEP_BYTES // (128 * wide * query_bytes))


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
    cap: float = 0.0,
    void_LQ: Tensor | None = None,
) -> WindowScores:
    """Score the prompt tokens before the observation window by the attention that the window pays them, in all layers.

    query_LRWQD: fp16 or bf16 `[L, R, W, Q, D]`, the last W queries of each prompt (after RoPE), stride 1 in D; fp32
        works too, but without tensor cores the kernels spill registers: for tests.
    table_RB: int32 `[R, blocks]`, block of each N prompt tokens. tokens: row r scores `counts[r]` tokens and its window
        follows them: the prompt has `counts[r] + W` tokens, all of which take part in the softmax. 0 skips a row.
    aggregate: "defensive": maximum over group and window of the mass-preservingly pooled attention, then, with clamp,
        no token below its head's mean (DefensiveKV, arXiv 2510.13334). "mean": pooled mean (SnapKV, arXiv 2404.14469).
    pool: neighbours averaged, 1, 3 or 5. scale: of the logits, default `D ** -0.5`. key_scale: of fp8 pages.
    cap, void_LQ: see `logits`; kernels are compiled for each cap. void_LQ: fp32, fp16 or bf16.

    Returns fp32 scores; formulas in `formulas.py`. Stores nothing of size [G, W, S] and reads K twice; a head with more
    than 128 query rows (fp8 or D > 128: 64) reads it again for each further 128, from the L2 cache, and needs scratch
    space of the result's size for each. `pages` may be cut down to some layers. Raises ValueError for arguments that do
    not fit.
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
    check_void("void_LQ", void_LQ, (layers, num_heads), query_LRWQD.device)
    if not runs_triton(query_LRWQD):
        return WindowScores(*reference.window_scores(
            query_LRWQD, pages, table_RB, tokens,
            aggregate=aggregate, pool=pool, clamp=clamp, scale=scale, key_scale=key_scale, cap=cap, void_LQ=void_LQ,
        ))  # fmt: skip

    group, device = num_heads // heads, query_LRWQD.device
    score_LHT = torch.empty(layers, heads, tokens.total, dtype=torch.float32, device=device)
    mean_LHT = torch.empty_like(score_LHT)
    if tokens.longest == 0:
        return WindowScores(score_LHT, mean_LHT)
    peak = aggregate == "defensive"
    span, run = tiling(tokens.longest)
    most, block_t, lines = tile(head_size, pages.key_PND.element_size(), query_LRWQD.element_size())
    block_m = min(most, power_of_two(group * window, 16))
    chunks = -(-group * window // block_m)
    spans = -(-(tokens.longest + window) // span)
    stats = torch.empty(4, rows, layers * heads, chunks, spans, block_m, dtype=torch.float32, device=device)
    lse, gain = torch.empty(2, rows, layers * heads, chunks, block_m, dtype=torch.float32, device=device)
    slabs: Sequence[Tensor] = (score_LHT, mean_LHT)
    if chunks > 1:
        slabs = torch.empty(2, chunks, *score_LHT.shape, dtype=torch.float32, device=device).unbind()
    scale_log2, bend = factors(scale * key_scale, cap)
    strides = (
        *query_LRWQD.stride()[:4], pages.key_PND.stride(0), pages.key_PND.stride(1),
        table_RB.stride(0), pages.block_pages, pages.head_pages,
    )  # fmt: skip
    shape = {"H": heads, "G": group, "W": window, "N": page_tokens, "D": head_size, "POOL": pool, "BLOCK_M": block_m}
    shape["BLOCK_D"] = power_of_two(head_size, 16)
    row_statistics_kernel[(spans, layers * heads, rows * chunks)](
        stats, query_LRWQD, pages.key_PND, table_RB, tokens.count_R, pages.layer_page_L,
        scale_log2, chunks, spans, stats.stride(0), *strides,
        **shape, BLOCK_T=block_t, SPAN=span, CAP=bend, num_warps=4, num_stages=STAGES,
    )  # fmt: skip
    merge_statistics_kernel[(layers * heads * chunks, rows)](
        lse, gain, stats, tokens.count_R, void_LQ, chunks, spans, stats.stride(0),
        G=group, W=window, BLOCK_M=block_m, SPAN=span, MERGE_SPANS=MERGE_SPANS, num_warps=4,
    )  # fmt: skip
    score_kernel[(-(-tokens.longest // (lines * run)) * chunks, layers * heads, rows)](
        *slabs, lse, gain, query_LRWQD, pages.key_PND, table_RB, tokens.count_R, tokens.start_R, pages.layer_page_L,
        scale_log2, chunks, score_LHT.numel(), tokens.total, *strides,
        **shape, LINES=lines, RUN=run, PEAK=peak, PARTS=2 if block_m > 64 else 1, CAP=bend,
        num_warps=SCORE_WARPS, num_stages=STAGES,
    )  # fmt: skip
    grid = (-(-tokens.longest // BLOCK), layers * heads, rows)
    partial = torch.empty(rows, layers * heads, grid[0], dtype=torch.float32, device=device)
    ragged = (tokens.count_R, tokens.start_R)
    if chunks > 1 or (peak and clamp):
        combine_kernel[grid](
            score_LHT, mean_LHT, partial, *slabs, *ragged, chunks, score_LHT.numel(), tokens.total,
            PEAK=peak, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    if peak and clamp:
        clamp_kernel[grid](
            score_LHT, partial, *ragged, tokens.total, TILES_P2=power_of_two(grid[0]), BLOCK=BLOCK, num_warps=4
        )
    elif not peak:
        pool_kernel[grid](score_LHT, mean_LHT, *ragged, tokens.total, POOL=pool, BLOCK=BLOCK, num_warps=4)
    return WindowScores(score_LHT, mean_LHT)
