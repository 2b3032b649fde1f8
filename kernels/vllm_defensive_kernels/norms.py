"""How much each cached value can move the layer's output: the norm of `v_t Wo`, mean over the group's query heads.

One kernel for both norms. L2 needs only `||v Wo||^2 = v (Wo Wo^T) v^T`; with a factor `C C^T = Wo Wo^T` of D columns
this is `||v C||^2`: the same loop over columns, hidden/D times shorter, without the cancellation of `v (Wo Wo^T) v^T`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_defensive_kernels import reference
from vllm_defensive_kernels.addressing import positional_page, power_of_two, product, runs_triton, width
from vllm_defensive_kernels.checks import (
    refuse,
    require_choice,
    require_device,
    require_dtype,
    require_int,
    require_shape,
)
from vllm_defensive_kernels.pages import PagedKV, RaggedTokens

BLOCK_T = 128
BLOCK_C = 128
FP32_BLOCK = 32  # without tensor cores a thread holds whole rows of both factors; larger tiles spill
WARPS = 8
STAGES = 3


def tiling(head_size: int, dtype: torch.dtype) -> tuple[int, int]:
    """Tokens and columns of a tile: at most 161 KiB of shared memory."""
    wide = width(head_size)
    if dtype == torch.float32:
        return (max(FP32_BLOCK // wide, 16),) * 2  # 16 is the least that tl.dot takes
    return BLOCK_T // max(1, wide // 2), BLOCK_C // wide


# out_ptr: where a layer's part of a larger tensor begins must not make a variant of its own.
@triton.jit(do_not_specialize=["out_ptr", "layer", "out_head_stride"])
def _value_norm_kernel(
    out_ptr, value_ptr, weight_ptr, table_ptr, count_ptr, start_ptr, layer_page_ptr,
    factor, layer, columns, out_head_stride, value_page_stride, value_token_stride,
    weight_head_stride, weight_row_stride, weight_column_stride, table_stride, block_pages, head_pages,
    G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2)
    head = tl.program_id(1)
    count = tl.load(count_ptr + row)
    if tl.program_id(0) * BLOCK_T >= count:
        return
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    first_page = tl.load(layer_page_ptr + layer) + head.to(tl.int64) * head_pages
    page = positional_page(t, t < count, table_ptr + row.to(tl.int64) * table_stride, first_page, block_pages, N)
    where = page * value_page_stride + (t % N) * value_token_stride
    value = tl.load(
        value_ptr + where[:, None] + d[None, :], mask=(t < count)[:, None] & (d[None, :] < D), other=0.0
    ).to(weight_ptr.dtype.element_ty)
    norm = tl.zeros([BLOCK_T], tl.float32)
    for group in range(G):
        total = tl.zeros([BLOCK_T], tl.float32)
        weights = weight_ptr + (head * G + group).to(tl.int64) * weight_head_stride
        for begin in range(0, columns, BLOCK_C):
            c = begin + tl.arange(0, BLOCK_C)
            where_weight = d[:, None].to(tl.int64) * weight_row_stride + c[None, :].to(tl.int64) * weight_column_stride
            weight = tl.load(weights + where_weight, mask=(d[:, None] < D) & (c[None, :] < columns), other=0.0)
            projected = product(value, weight)
            total += tl.sum(tl.abs(projected) if ORDER == 1 else projected * projected, 1)
        norm += total if ORDER == 1 else tl.sqrt(total)
    out = out_ptr + head.to(tl.int64) * out_head_stride + tl.load(start_ptr + row) + t
    tl.store(out, norm * (factor / G), mask=t < count)


def value_norm(
    pages: PagedKV,
    layer: int,
    table_RB: Tensor,
    tokens: RaggedTokens,
    output_QDC: Tensor,
    *,
    order: int = 1,
    value_scale: float = 1.0,
    out_HT: Tensor | None = None,
) -> Tensor:
    """`mean_g || v_t Wo_{h,g} ||` of every token of one layer (CriticalKV, arXiv 2502.03805). Returns fp32 out_HT.

    table_RB: int32 `[R, blocks]`. tokens: row r covers its first `counts[r]` prompt tokens.
    output_QDC: fp32, fp16 or bf16 `[Q, D, C]`, any strides: the slices of the output projection (`C` = hidden size), or
        for order=2 `formulas.gram_factor` of them. Values are converted to its dtype; products accumulate in fp32.
    order: 1 or 2. value_scale: what fp8 pages are multiplied with. out_HT: fp32 `[H, total tokens]`, stride 1 in T.

    Raises ValueError for arguments that do not fit. `2*H*G*D*C` flops a token.
    """
    require_int("layer", layer, 0, pages.num_layers - 1)
    require_dtype("output_QDC", output_QDC, (torch.float32, torch.float16, torch.bfloat16))
    require_shape("output_QDC", output_QDC, (None, pages.head_size, None))
    require_device("output_QDC", output_QDC, pages.value_PND.device)
    require_dtype("table_RB", table_RB, (torch.int32,))
    require_choice("order", order, (1, 2))
    rows, heads = table_RB.shape[0], pages.num_kv_heads
    if output_QDC.shape[0] % heads:
        refuse("output_QDC.shape[0]", output_QDC.shape[0], f"a multiple of the {heads} KV heads")
    if len(tokens.counts) != rows:
        refuse("tokens.counts", tokens.counts, f"{rows} counts, one a row")
    require_int("tokens.longest", tokens.longest, 0, table_RB.shape[1] * pages.page_tokens)
    if out_HT is None:
        out_HT = torch.empty(heads, tokens.total, dtype=torch.float32, device=output_QDC.device)
    require_shape("out_HT", out_HT, (heads, tokens.total))
    require_dtype("out_HT", out_HT, (torch.float32,))
    if not runs_triton(output_QDC):
        return reference.value_norm(
            pages, layer, table_RB, tokens, output_QDC, order=order, value_scale=value_scale, out_HT=out_HT
        )
    if tokens.longest == 0:
        return out_HT
    block_t, block_c = tiling(pages.head_size, output_QDC.dtype)
    _value_norm_kernel[(-(-tokens.longest // block_t), heads, rows)](
        out_HT, pages.value_PND, output_QDC, table_RB, tokens.count_R, tokens.start_R, pages.layer_page_L,
        value_scale, layer, output_QDC.shape[2], out_HT.stride(0),
        pages.value_PND.stride(0), pages.value_PND.stride(1), *output_QDC.stride(),
        table_RB.stride(0), pages.block_pages, pages.head_pages,
        G=output_QDC.shape[0] // heads, N=pages.page_tokens, D=pages.head_size,
        BLOCK_D=power_of_two(pages.head_size, 16), BLOCK_T=block_t, BLOCK_C=block_c, ORDER=order,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out_HT
