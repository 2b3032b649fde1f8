"""How much attention the echoes of a document, tokens that repeat it, pay to its tokens, while their steps pass."""

from __future__ import annotations

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
from vllm_defensive_kernels.echo import NORMALISED, taking_part
from vllm_defensive_kernels.logits import check_void, factors
from vllm_defensive_kernels.pages import PagedKV
from vllm_defensive_kernels.reconstruction_kernels import merge_lse_kernel, peak_kernel, row_lse_kernel

BLOCK_M, BLOCK_T = 128, 64  # pass 1: query rows of a program, and keys of a step
PEAK_T, PEAK_M = 128, 128  # pass 2: keys of a program, and query rows of a step
FP32_BLOCK = 32  # without tensor cores a thread holds whole rows of both factors
STAGES, WARPS = 5, 4  # a key's page is read first: three steps of keys in shared memory, two of them in flight
PEAK_STAGES, PEAK_WARPS = 2, 8  # of queries, which lie where they are: with two steps two programs share a processor
MERGE_BLOCK = 1024
TARGET_PROGRAMS = 1024  # about four rounds on the 132 multiprocessors of an H100, two programs on each
MIN_STEPS, MIN_TILES = 16, 4  # what a program does at least, in pass 1 and 2: less does not pay for its own tile


def tiles(head_size: int, key_bytes: int, query_bytes: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_T, PEAK_T, PEAK_M of heads of this size: at most 129 KiB of shared memory.

    Never of the number of echoes, which changes from step to step. Widening fp8 keys takes registers of its own, and so
    do the longer rows of wide heads.
    """
    wide = width(head_size)
    if query_bytes == 4:
        return (max(FP32_BLOCK // wide, 16),) * 4  # 16 is the least that tl.dot takes
    narrow = wide == 1 and key_bytes > 1
    block_m, peak_m = (BLOCK_M, PEAK_M) if narrow else (BLOCK_M // 2, PEAK_M // max(wide, 2))
    return block_m, BLOCK_T // wide, PEAK_T // min(wide, 2), peak_m


def shared_out(work: int, programs: int, least: int) -> int:
    """Of `work` steps, how many each program takes, where there are so many programs already."""
    return max(least, -(-work * programs // TARGET_PROGRAMS))


def spans_of(keys: int, q_tiles: int, heads: int, block_t: int) -> tuple[int, int]:
    """(keys of a span, spans) of pass 1, where so many keys are seen."""
    span = shared_out(-(-keys // block_t), q_tiles * heads, MIN_STEPS) * block_t
    return span, -(-keys // span)


def bytes_at_most(echoes: int, num_query_heads: int) -> int:
    """What a call of up to so many echoes takes beside its arguments, of a document of any length: the log-sum-exp of
    each row and span. Spans are fewer than 1 + TARGET_PROGRAMS / (q_tiles * H); a tile has at most BLOCK_M rows."""
    return 4 * (echoes * num_query_heads + TARGET_PROGRAMS * BLOCK_M)


def check(
    query_TQD: Tensor, pages: PagedKV, layer: int, table_1B: Tensor, peak_HS: Tensor, scored: tuple[int, int],
    first: int, normalised: str, sink: int,
) -> None:  # fmt: skip
    """Raise ValueError for arguments of `reconstruction_scores` that do not fit."""
    heads, device = pages.num_kv_heads, pages.key_PND.device
    require_shape("query_TQD", query_TQD, (None, None, pages.head_size))
    require_dtype("query_TQD", query_TQD, (torch.float32, torch.float16, torch.bfloat16))
    if query_TQD.shape[1] % heads:
        refuse("query_TQD.shape[1]", query_TQD.shape[1], f"a multiple of the {heads} KV heads")
    require_shape("table_1B", table_1B, (1, None))
    require_dtype("table_1B", table_1B, (torch.int32,))
    require_shape("peak_HS", peak_HS, (heads, None))
    require_dtype("peak_HS", peak_HS, (torch.float32,))
    for name, tensor in {"query_TQD": query_TQD, "table_1B": table_1B, "peak_HS": peak_HS}.items():
        require_device(name, tensor, device)
        if tensor.stride(-1) != 1:
            refuse(f"{name}.stride()", tensor.stride(), "stride 1 in the last axis")
    require_int("layer", layer, 0, pages.num_layers - 1)
    require_int("scored[1]", scored[1], 1, peak_HS.shape[1])
    require_int("scored[0]", scored[0], 0, scored[1] - 1)
    require_int("first", first, peak_HS.shape[1])
    require_int("first + T", first + len(query_TQD), 0, table_1B.shape[1] * pages.page_tokens)
    require_choice("normalised", normalised, NORMALISED)
    require_int("sink", sink, 0)


def reconstruction_scores(
    query_TQD: Tensor,
    pages: PagedKV,
    layer: int,
    table_1B: Tensor,
    *,
    peak_HS: Tensor,
    scored: tuple[int, int],
    first: int,
    normalised: str,
    sink: int = 0,
    scale: float | None = None,
    key_scale: float = 1.0,
    cap: float = 0.0,
    void_Q: Tensor | None = None,
) -> None:
    """Raise the scores of document tokens to the largest attention that these echoes pay them, in one layer. In place.

    query_TQD: fp16 or bf16 `[T, Q, D]`, of the echoes at positions `first` to `first + T - 1` (after RoPE), stride 1 in
        D; fp32 works too, slowly: for tests.
    table_1B: int32 `[1, blocks]`, the request's own: its document of S tokens, then its echoes, these included, whose
        keys are in the cache already.
    peak_HS: fp32 `[H, S]`, running maxima, none below zero: zeros before the first echo.
    scored, normalised, sink: as in `echo.reconstruct_attention`, which has the formula.
    scale: of the logits, default `D ** -0.5`. key_scale: of fp8 pages. cap, void_Q: see `logits`; kernels are compiled
    for each cap. void_Q: fp32, fp16 or bf16.

    Of Y keys that take part, A of them scored: `2*Q*D*(Y + A)` flops and Q*Y exponentials an echo. From memory come
    `H*D*(Y + A)` numbers of keys, `2*Q*D` of queries an echo; each further 128 query rows of a head (fp8 or D > 128:
    64) read its keys again, and each further 128 (D > 128: 64) scored keys its queries, from the L2 cache. Stores
    nothing of size T*S, but 4 bytes an echo and query head, times the spans where echoes are so few that their keys are
    shared out. No host sync, and no T or S has a kernel of its own; programs in any order give the same bits. Raises
    ValueError for arguments that do not fit.
    """
    check(query_TQD, pages, layer, table_1B, peak_HS, scored, first, normalised, sink)
    check_void("void_Q", void_Q, (query_TQD.shape[1],), query_TQD.device)
    scale = pages.head_size**-0.5 if scale is None else scale
    if not runs_triton(query_TQD):
        reference.reconstruction_scores(
            query_TQD, pages, layer, table_1B, peak_HS=peak_HS, scored=scored, first=first,
            normalised=normalised, sink=sink, scale=scale, key_scale=key_scale, cap=cap, void_Q=void_Q,
        )  # fmt: skip
    elif len(query_TQD):
        part = taking_part(peak_HS.shape[1], scored, normalised, sink)
        softmax = *factors(scale * key_scale, cap), void_Q
        _launch(query_TQD, pages, layer, table_1B, peak_HS, scored, first, part, *softmax)


def _launch(
    query_TQD: Tensor, pages: PagedKV, layer: int, table_1B: Tensor, peak_HS: Tensor, scored: tuple[int, int],
    first: int, part: tuple[int, int, int], scale_log2: float, bend: float, void_Q: Tensor | None,
) -> None:  # fmt: skip
    (echoes, num_heads, head_size), (heads, document) = query_TQD.shape, peak_HS.shape
    leading, begin, end = part
    document_part = leading + end - begin
    seen = document_part + first - document + 1  # by the first of the echoes
    rows = echoes * (num_heads // heads)
    block_m, block_t, peak_t, peak_m = tiles(head_size, pages.key_PND.element_size(), query_TQD.element_size())
    q_tiles = -(-rows // block_m)
    span, spans = spans_of(seen + echoes - 1, q_tiles, heads, block_t)
    lse = torch.empty(spans, heads, rows, dtype=torch.float32, device=query_TQD.device)
    where = table_1B, pages.layer_page_L, scale_log2, layer, rows
    strides = (
        *query_TQD.stride()[:2], pages.key_PND.stride(0), pages.key_PND.stride(1), pages.block_pages, pages.head_pages,
    )  # fmt: skip
    shape = {"G": num_heads // heads, "N": pages.page_tokens, "D": head_size, "BLOCK_D": power_of_two(head_size, 16)}
    row_lse_kernel[(q_tiles, heads, spans)](
        lse, void_Q, query_TQD, pages.key_PND, *where, leading, begin, document_part, document, seen, span,
        lse.stride(0), *strides, **shape, CAP=bend, BLOCK_M=block_m, BLOCK_T=block_t,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    if spans > 1:
        merge_lse_kernel[(-(-rows // MERGE_BLOCK), heads)](lse, rows, spans, lse.stride(0), BLOCK=MERGE_BLOCK)
    key_tiles, query_tiles = -(-(scored[1] - scored[0]) // peak_t), -(-rows // peak_m)
    share = shared_out(query_tiles, key_tiles * heads, MIN_TILES)
    peak_kernel[(key_tiles, heads, -(-query_tiles // share))](
        peak_HS.view(torch.int32), lse, query_TQD, pages.key_PND, *where, *scored, share, peak_HS.stride(0),
        *strides, **shape, CAP=bend, BLOCK_M=peak_m, BLOCK_T=peak_t, num_warps=PEAK_WARPS, num_stages=PEAK_STAGES,
    )  # fmt: skip
