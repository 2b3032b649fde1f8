"""The Triton kernels of `reconstruction`.

Two passes, because a query's attention must be normalised before queries can be compared:

1. each query row's log-sum-exp, over spans of the keys that take part, then merged over the spans;
2. a program owns a tile of scored keys and walks over query rows. As exp grows with its argument, the largest
   attention is `exp(max(logit - lse))`: one exp a key. Every echo sees every document token: nothing is masked.

A head's query rows are its T*G queries, echo by echo. Key `y` of those that take part is one of the leading tokens,
of the document's part, or an echo's, in this order, which is that of their positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_defensive_kernels.addressing import positional_page, product
from vllm_defensive_kernels.logits import before_any_key, bent


@triton.jit
def _query_tile(query_ptr, head, tile, rows, token_stride, head_stride,
                G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Query rows of a tile [BLOCK_M, BLOCK_D], zeros beyond the last, and their numbers."""
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    where = (m // G).to(tl.int64) * token_stride + (head * G + m % G) * head_stride
    query = tl.load(query_ptr + where[:, None] + d[None, :], mask=(m < rows)[:, None] & (d[None, :] < D), other=0.0)
    return query, m


@triton.jit
def _key_tile(key_ptr, t, exists, table_ptr, first_page, block_pages, page_stride, token_stride,
              N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """Keys [., BLOCK_D] of these positions, zeros where there is none."""
    d = tl.arange(0, BLOCK_D)
    page = positional_page(t, exists, table_ptr, first_page, block_pages, N)
    where = page * page_stride + (t % N) * token_stride
    return tl.load(key_ptr + where[:, None] + d[None, :], mask=exists[:, None] & (d[None, :] < D), other=0.0)


# Numbers that follow the batch, and where a request's table begins, must not make variants of their own.
@triton.jit(do_not_specialize=[
    "table_ptr", "layer", "rows", "leading", "begin", "document_part", "document", "seen", "span", "plane",
])  # fmt: skip
def row_lse_kernel(
    lse_ptr, void_ptr, query_ptr, key_ptr, table_ptr, layer_page_ptr,
    scale_log2, layer, rows, leading, begin, document_part, document, seen, span, plane,
    query_token_stride, query_head_stride, key_page_stride, key_token_stride, block_pages, head_pages,
    G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp (base 2) of a tile of query rows over one span. The first `document_part` keys are the document's,
    of which `leading` come first and the others from position `begin` on; the first echo sees `seen` keys."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    query, m = _query_tile(query_ptr, head, tile, rows, query_token_stride, query_head_stride, G, D, BLOCK_D, BLOCK_M)
    sees = seen + m // G
    first_page = tl.load(layer_page_ptr + layer) + head.to(tl.int64) * head_pages
    from_y = tl.program_id(2) * span
    keys = seen + (tl.minimum(tile * BLOCK_M + BLOCK_M, rows) - 1) // G  # what the tile's last row sees
    best, total = before_any_key(void_ptr, head * G + m % G, m < rows, tl.program_id(2), BLOCK_M)
    for start in range(from_y, tl.minimum(from_y + span, keys), BLOCK_T):
        y = start + tl.arange(0, BLOCK_T)
        t = tl.where(y < document_part, y - leading + begin, y - document_part + document)
        t = tl.where(y < leading, y, t)
        key = _key_tile(
            key_ptr, t, y < keys, table_ptr, first_page, block_pages, key_page_stride, key_token_stride, N, D, BLOCK_D
        )
        logit = bent(product(query, tl.trans(key.to(query.dtype))) * scale_log2, CAP)
        logit = tl.where(y[None, :] < sees[:, None], logit, float("-inf"))
        new_best = tl.maximum(best, tl.max(logit, 1))
        base = tl.where(new_best == float("-inf"), 0.0, new_best)  # a span of echoes may hide all its keys
        total = total * tl.exp2(best - base) + tl.sum(tl.exp2(logit - base[:, None]), 1)
        best = new_best
    where = tl.program_id(2).to(tl.int64) * plane + head.to(tl.int64) * rows + m
    tl.store(lse_ptr + where, best + tl.log2(total), mask=m < rows)


@triton.jit(do_not_specialize=["rows", "spans", "plane"])
def merge_lse_kernel(lse_ptr, rows, spans, plane, BLOCK: tl.constexpr):
    """The log-sum-exp of all spans, in the place of the first one's."""
    m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    where = lse_ptr + tl.program_id(1).to(tl.int64) * rows + m
    best = tl.load(where, mask=m < rows, other=0.0)  # every row sees the first key, so this is finite
    total = tl.full([BLOCK], 1.0, tl.float32)
    from_span = where
    for _ in range(1, spans):
        from_span += plane
        part = tl.load(from_span, mask=m < rows, other=0.0)
        new_best = tl.maximum(best, part)
        total = total * tl.exp2(best - new_best) + tl.exp2(part - new_best)
        best = new_best
    tl.store(where, best + tl.log2(total), mask=m < rows)


@triton.jit(do_not_specialize=[
    "peak_ptr", "table_ptr", "layer", "rows", "first", "last", "share", "peak_head_stride",
])  # fmt: skip
def peak_kernel(
    peak_ptr, lse_ptr, query_ptr, key_ptr, table_ptr, layer_page_ptr,
    scale_log2, layer, rows, first, last, share, peak_head_stride,
    query_token_stride, query_head_stride, key_page_stride, key_token_stride, block_pages, head_pages,
    G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Raise the scores of a tile of the tokens `[first, last)` to the attention of `share` tiles of query rows."""
    head = tl.program_id(1)
    t = first + tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = t < last
    first_page = tl.load(layer_page_ptr + layer) + head.to(tl.int64) * head_pages
    key = _key_tile(
        key_ptr, t, exists, table_ptr, first_page, block_pages, key_page_stride, key_token_stride, N, D, BLOCK_D
    ).to(query_ptr.dtype.element_ty)
    peak = tl.full([BLOCK_T], float("-inf"), tl.float32)
    from_tile = tl.program_id(2) * share
    for tile in range(from_tile, tl.minimum(from_tile + share, tl.cdiv(rows, BLOCK_M))):
        query, m = _query_tile(
            query_ptr, head, tile, rows, query_token_stride, query_head_stride, G, D, BLOCK_D, BLOCK_M
        )
        lse = tl.load(lse_ptr + head.to(tl.int64) * rows + m, mask=m < rows, other=float("inf"))  # absent: exp2(-inf)
        logit = bent(product(key, tl.trans(query)) * scale_log2, CAP)
        peak = tl.maximum(peak, tl.max(logit - lse[None, :], 1))
    # Bits of numbers that are not negative are in the order of the numbers, and a maximum depends on no order: whoever
    # comes first, the result is the same.
    bits = tl.exp2(peak).to(tl.int32, bitcast=True)
    tl.atomic_max(peak_ptr + head.to(tl.int64) * peak_head_stride + t, bits, mask=exists, sem="relaxed")
