"""The learned score of tokens in the cache, in one pass over their keys and values; the formula is in `learned`.

Keys stay as they are, and the weights are turned instead: `w . R(p)^-1 k = (R(p)^-T w) . k`. Every number of a key then
has a weight of its own at that position, made of two weights and the table's two numbers, whatever the style of pairs.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_defensive_kernels import reference
from vllm_defensive_kernels.addressing import positional_page, power_of_two, runs_triton
from vllm_defensive_kernels.checks import refuse, require_device, require_dtype, require_int, require_shape
from vllm_defensive_kernels.learned import SINKS, Rotation
from vllm_defensive_kernels.pages import PagedKV, RaggedTokens

TILE = 4096  # numbers of K in a program, and as many of V: 16 KiB of bf16, several such programs on a multiprocessor
WARP_NUMBERS = 1024  # of K a warp, 32 a thread: more take more registers than leave room for other programs

_SINKS = tl.constexpr(SINKS)
_LOG2_E = tl.constexpr(math.log2(math.e))


def tiling(head_size: int, tokens: int) -> tuple[int, int]:
    """Tokens of a tile, `tokens` at most (rounded up to a power of two), and warps of its program."""
    columns = power_of_two(head_size, 16)
    block_t = min(TILE // columns, power_of_two(tokens))
    return block_t, max(1, block_t * columns // WARP_NUMBERS)


@triton.jit
def _tile_scores(
    key_ptr, value_ptr, where_key, where_value, position, exists, weight_ptr, rotation_ptr, rotation_stride,
    key_scale, value_scale, R: tl.constexpr, INTERLEAVED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of a tile of one head's tokens [BLOCK_T]: where_key and where_value are their offsets, weight_ptr its
    row."""
    d = tl.arange(0, BLOCK_D)
    mask = exists[:, None] & (d < D)[None, :]
    key = tl.load(key_ptr + where_key[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + where_value[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    of_key = tl.load(weight_ptr + d, mask=d < D, other=0.0)[None, :]
    of_value = tl.load(weight_ptr + D + d, mask=d < D, other=0.0)[None, :]
    if R > 0:
        if INTERLEAVED:
            angle, partner, second = d // 2, d ^ 1, d % 2 == 1
        else:
            angle, partner, second = d % (R // 2), tl.where(d < R // 2, d + R // 2, d - R // 2), d >= R // 2
        turned = exists[:, None] & (d < R)[None, :]
        where = rotation_ptr + position[:, None].to(tl.int64) * rotation_stride + angle[None, :]
        cosine = tl.load(where, mask=turned, other=1.0).to(tl.float32)  # the numbers from R on: by nothing
        sine = tl.load(where + R // 2, mask=turned, other=0.0).to(tl.float32)
        of_partner = tl.load(weight_ptr + partner, mask=d < R, other=0.0)
        of_partner = tl.where(second, of_partner, -of_partner)[None, :]
        of_key = (of_key * cosine + of_partner * sine) / (cosine * cosine + sine * sine)
    log = tl.sum(key * of_key, 1) * key_scale + tl.sum(value * of_value, 1) * value_scale
    log += tl.load(weight_ptr + 2 * D)
    return tl.where(position < _SINKS, 1.0, tl.exp2(tl.minimum(log, 0.0) * _LOG2_E))


# Numbers that follow the batch or the layer, and where one's part of a larger tensor begins, must not make variants of
# their own. Rows of 2*D + 1 weights begin anywhere in any case.
@triton.jit(do_not_specialize=[
    "out_ptr", "weight_ptr", "table_ptr", "layer", "out_head_stride", "weight_stride", "table_stride",
])  # fmt: skip
def _learned_score_kernel(
    out_ptr, key_ptr, value_ptr, weight_ptr, rotation_ptr, table_ptr, count_ptr, start_ptr, layer_page_ptr,
    key_scale, value_scale, layer, out_head_stride, weight_stride, rotation_stride, table_stride,
    key_page_stride, key_token_stride, value_page_stride, value_token_stride, block_pages, head_pages,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(2)
    head = tl.program_id(1)
    count = tl.load(count_ptr + row)
    if tl.program_id(0) * BLOCK_T >= count:
        return
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = t < count
    first_page = tl.load(layer_page_ptr + layer) + head.to(tl.int64) * head_pages
    page = positional_page(t, exists, table_ptr + row.to(tl.int64) * table_stride, first_page, block_pages, N)
    score = _tile_scores(
        key_ptr, value_ptr, page * key_page_stride + (t % N) * key_token_stride,
        page * value_page_stride + (t % N) * value_token_stride, t, exists,
        weight_ptr + head.to(tl.int64) * weight_stride, rotation_ptr, rotation_stride,
        key_scale, value_scale, R, INTERLEAVED, D, BLOCK_D,
    )  # fmt: skip
    out = out_ptr + head.to(tl.int64) * out_head_stride + tl.load(start_ptr + row) + t
    tl.store(out, score, mask=exists)


@triton.jit(do_not_specialize=["page_ptr", "row_ptr", "position_ptr", "weight_ptr", "weight_stride"])
def _learned_page_score_kernel(
    out_ptr, key_ptr, value_ptr, weight_ptr, rotation_ptr, page_ptr, row_ptr, position_ptr,
    key_scale, value_scale, weight_stride, rotation_stride,
    key_page_stride, key_token_stride, value_page_stride, value_token_stride,
    R: tl.constexpr, INTERLEAVED: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    position = tl.load(position_ptr + place * N + n, mask=n < N, other=-1)
    page = tl.load(page_ptr + place)
    score = _tile_scores(
        key_ptr, value_ptr, page * key_page_stride + n * key_token_stride,
        page * value_page_stride + n * value_token_stride, position, position >= 0,
        weight_ptr + tl.load(row_ptr + place).to(tl.int64) * weight_stride, rotation_ptr, rotation_stride,
        key_scale, value_scale, R, INTERLEAVED, D, BLOCK_D,
    )  # fmt: skip
    tl.store(out_ptr + place * N + n, tl.where(position < 0, 0.0, score), mask=n < N)


def learned_scores(
    pages: PagedKV,
    layer: int,
    table_RB: Tensor,
    tokens: RaggedTokens,
    weight_HX: Tensor,
    rotation: Rotation | None,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    out_HT: Tensor | None = None,
) -> Tensor:
    """`learned.foretold_peaks` of every token of one layer. Returns fp32 out_HT, in [0, 1]; the first SINKS have 1.

    table_RB: int32 `[R, blocks]`, of whole requests: token t of a row stands at position t. tokens: row r covers its
        first `counts[r]` tokens.
    weight_HX: fp32 `[H, 2*D + 1]`, stride 1 in X. rotation: its table has a row for every position, of R <= D numbers
        of stride 1; None where the layer does not turn its keys.
    key_scale, value_scale: what fp8 pages are multiplied with. out_HT: fp32 `[H, total tokens]`, stride 1 in T.

    Raises ValueError for arguments that do not fit. Reads each key and value once, `2*D` numbers a token and head; no
    host sync.
    """
    require_int("layer", layer, 0, pages.num_layers - 1)
    require_dtype("table_RB", table_RB, (torch.int32,))
    require_shape("table_RB", table_RB, (len(tokens.counts), None))
    require_int("tokens.longest", tokens.longest, 0, table_RB.shape[1] * pages.page_tokens)
    _check_formula(pages, "weight_HX", weight_HX, pages.num_kv_heads, rotation)
    if rotation is not None:
        require_int("tokens.longest", tokens.longest, 0, len(rotation.table_PR))
    if out_HT is None:
        out_HT = torch.empty(pages.num_kv_heads, tokens.total, dtype=torch.float32, device=weight_HX.device)
    require_shape("out_HT", out_HT, (pages.num_kv_heads, tokens.total))
    require_dtype("out_HT", out_HT, (torch.float32,))
    for name, tensor in {"table_RB": table_RB, "out_HT": out_HT}.items():
        _check_place(pages, name, tensor)
    if not runs_triton(weight_HX):
        return reference.learned_scores(
            pages, layer, table_RB, tokens, weight_HX, rotation,
            key_scale=key_scale, value_scale=value_scale, out_HT=out_HT,
        )  # fmt: skip
    if tokens.longest == 0:
        return out_HT
    block_t, warps = tiling(pages.head_size, TILE)
    table_PR, style = _turned(pages, rotation)
    _learned_score_kernel[(-(-tokens.longest // block_t), pages.num_kv_heads, len(tokens.counts))](
        out_HT, pages.key_PND, pages.value_PND, weight_HX, table_PR, table_RB, tokens.count_R, tokens.start_R,
        pages.layer_page_L, key_scale, value_scale, layer, out_HT.stride(0), weight_HX.stride(0), table_PR.stride(0),
        table_RB.stride(0), *_strides(pages), pages.block_pages, pages.head_pages, **style, N=pages.page_tokens,
        D=pages.head_size, BLOCK_D=power_of_two(pages.head_size, 16), BLOCK_T=block_t, num_warps=warps,
    )  # fmt: skip
    return out_HT


def learned_page_scores(
    pages: PagedKV,
    page_P: Tensor,
    row_P: Tensor,
    position_PN: Tensor,
    weight_RX: Tensor,
    rotation: Rotation | None,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> Tensor:
    """`learned.foretold_peaks` of the tokens of any pages, as packed ones, by the positions that they had. Returns fp32
    `[P, N]`, in [0, 1].

    An empty slot scores 0: it adds nothing to what its page is worth, whatever the scores are multiplied with.

    page_P: int64, pages of the views. row_P: int32, row of the weights of each page's layer and head.
    position_PN: int32 `[P, N]`, contiguous: of each token in its sequence, below zero where a slot is empty. The caller
        sees to it that the rotation's table has them all: looking would be to wait for the device.
    weight_RX: fp32 `[rows, 2*D + 1]`, stride 1 in X: usually of all heads, row `layer*H + head`.
    rotation, key_scale, value_scale: as in `learned_scores`, the same for all these pages. So layers that turn their
        keys differently take a call each.

    Raises ValueError for arguments that do not fit. Each key and value is read once; no host sync.
    """
    require_shape("page_P", page_P, (None,))
    require_dtype("page_P", page_P, (torch.int64,))
    count, page_tokens = page_P.shape[0], pages.page_tokens
    require_shape("row_P", row_P, (count,))
    require_dtype("row_P", row_P, (torch.int32,))
    require_shape("position_PN", position_PN, (count, page_tokens))
    require_dtype("position_PN", position_PN, (torch.int32,))
    if not position_PN.is_contiguous():
        refuse("position_PN.stride()", position_PN.stride(), "contiguous rows")
    for name, tensor in {"page_P": page_P, "row_P": row_P, "position_PN": position_PN}.items():
        _check_place(pages, name, tensor)
    _check_formula(pages, "weight_RX", weight_RX, None, rotation)
    if not runs_triton(weight_RX):
        return reference.learned_page_scores(
            pages, page_P, row_P, position_PN, weight_RX, rotation, key_scale=key_scale, value_scale=value_scale
        )
    out_PN = torch.empty(count, page_tokens, dtype=torch.float32, device=weight_RX.device)
    if count == 0:
        return out_PN
    block_t, warps = tiling(pages.head_size, page_tokens)
    table_PR, style = _turned(pages, rotation)
    _learned_page_score_kernel[(count, -(-page_tokens // block_t))](
        out_PN, pages.key_PND, pages.value_PND, weight_RX, table_PR, page_P, row_P, position_PN,
        key_scale, value_scale, weight_RX.stride(0), table_PR.stride(0), *_strides(pages), **style, N=page_tokens,
        D=pages.head_size, BLOCK_D=power_of_two(pages.head_size, 16), BLOCK_T=block_t, num_warps=warps,
    )  # fmt: skip
    return out_PN


def _check_place(pages: PagedKV, name: str, tensor: Tensor) -> None:
    """On the pages' device, its last axis without gaps."""
    require_device(name, tensor, pages.key_PND.device)
    if tensor.stride(-1) != 1:
        refuse(f"{name}.stride()", tensor.stride(), "stride 1 in the last axis")


def _check_formula(pages: PagedKV, name: str, weight_RX: Tensor, rows: int | None, rotation: Rotation | None) -> None:
    require_shape(name, weight_RX, (rows, 2 * pages.head_size + 1))
    require_dtype(name, weight_RX, (torch.float32,))
    _check_place(pages, name, weight_RX)
    if rotation is None:
        return
    table_PR = rotation.table_PR
    require_shape("rotation.table_PR", table_PR, (None, None))
    require_dtype("rotation.table_PR", table_PR, (torch.float32, torch.float16, torch.bfloat16))
    _check_place(pages, "rotation.table_PR", table_PR)
    if table_PR.shape[1] not in range(2, pages.head_size + 1, 2):
        refuse("rotation.table_PR.shape[1]", table_PR.shape[1], f"an even number from 2 to {pages.head_size}")


def _turned(pages: PagedKV, rotation: Rotation | None) -> tuple[Tensor, dict[str, int | bool]]:
    """What the kernels take of a rotation; of none, some tensor that they do not read."""
    if rotation is None:
        return pages.layer_page_L, {"R": 0, "INTERLEAVED": False}
    return rotation.table_PR, {"R": rotation.table_PR.shape[1], "INTERLEAVED": rotation.interleaved}


def _strides(pages: PagedKV) -> tuple[int, ...]:
    return *pages.key_PND.stride()[:2], *pages.value_PND.stride()[:2]
