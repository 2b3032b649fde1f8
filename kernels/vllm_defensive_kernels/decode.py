"""Attention of query rows over what eviction left: shared leading blocks, packed pages, growth blocks.

Key `i` of head (l, h) lies in that head's page `i // N`: the first `s` are ordinary leading blocks, then come the
packed pages, then the ordinary blocks from `g` on. All but the last page are whole, so the head's length follows from
vLLM's own: `len(l, h) = (s + pages(l, h) - g) * N + seq_len`. An un-evicted row has s = g = pages = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_defensive_kernels import reference
from vllm_defensive_kernels.addressing import power_of_two, product, runs_triton
from vllm_defensive_kernels.checks import refuse, require_device, require_dtype, require_int, require_shape
from vllm_defensive_kernels.pages import PackedState, PagedKV

BLOCK_T = 64  # keys a step: 32 KiB of K and V for a 128-wide bf16 head
# A page's number has to be read before its keys can be; with fewer stages than this Triton keeps one step in shared
# memory instead of two, and nothing is in flight while the tensor cores work.
STAGES = 5
MIN_STEPS = 4  # a split shorter than 256 keys costs more to merge than it saves
MAX_SPLITS = 64
TARGET_PROGRAMS = 2048  # about four rounds on the 132 multiprocessors of an H200, four programs on each


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
def _decode_kernel(
    out_ptr, part_ptr, lse_ptr, query_ptr, key_ptr, value_ptr,
    query_start_ptr, seq_len_ptr, table_ptr, slot_ptr, fresh_ptr, offset_ptr, shared_ptr, growth_ptr, layer_page_ptr,
    scale_log2, value_scale, layer, q_tiles,
    query_token_stride, query_head_stride, out_token_stride, out_head_stride,
    key_page_stride, key_token_stride, value_page_stride, value_token_stride,
    table_stride, fresh_stride, offset_stride, block_pages, head_pages,
    LH: tl.constexpr, H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr, MIN_STEPS: tl.constexpr,
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
        block = tl.load(table_row + position, mask=exists & (~in_packed), other=0)
        block += tl.load(fresh_row + flat // LH, mask=exists & in_packed, other=0)  # one of the two is 0
        inner = tl.where(in_packed, flat % LH, layer * H + head)
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
def _merge_kernel(
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


@dataclass(frozen=True)
class DecodeWorkspace:
    """Partial results of split heads. Allocate once for the largest batch and reuse in every layer and graph.

    part: fp32, at least tokens * Q * splits * D. lse: fp32, at least tokens * Q * splits (base 2).
    """

    part: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, tokens: int, num_heads: int, splits: int, head_size: int, device: torch.device) -> DecodeWorkspace:
        """Room for `tokens` query tokens of `num_heads` query heads."""
        rows = tokens * num_heads * splits
        return cls(
            torch.empty(rows * head_size, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device),
        )


def tile_rows(group: int, max_query_len: int) -> int:
    """Rows of a query tile: `G` heads by as many query tokens as fit 64 rows; 16 is the least that tl.dot takes."""
    return max(power_of_two(group), min(64, power_of_two(group * max_query_len)), 16)


def choose_splits(rows: int, group: int, num_kv_heads: int, max_query_len: int) -> int:
    """Splits of a launch: a function of its shape only, never of the lengths, so that a captured grid stays right.

    Decode rows always get 16 or more, because one head may hold most of a layer; long prompts that go on over packed
    pages bring their own parallelism and get fewer.
    """
    q_tiles = -(-max_query_len // (tile_rows(group, max_query_len) // group))
    wanted = power_of_two(-(-TARGET_PROGRAMS // max(rows * q_tiles * num_kv_heads, 1)))
    return min(max(wanted, 16 if q_tiles == 1 else 2), MAX_SPLITS)


def ragged_paged_decode(
    query_TQD: Tensor,
    pages: PagedKV,
    layer: int,
    table_RB: Tensor,
    query_start_R1: Tensor,
    seq_len_R: Tensor,
    slot_R: Tensor,
    state: PackedState,
    *,
    out_TQD: Tensor | None = None,
    max_query_len: int = 1,
    splits: int | None = None,
    scale: float | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    workspace: DecodeWorkspace | None = None,
) -> Tensor:
    """Attention of each row's last query tokens over the keys that its head has left. Returns out_TQD.

    query_TQD: fp32, fp16 or bf16 `[tokens, Q, D]`; row r owns tokens `[query_start_R1[r], query_start_R1[r + 1])`, at
        most max_query_len of them, the last ones of its sequence.
    layer: index in `pages.layer_page_L`. table_RB: int32, vLLM's block table. query_start_R1, seq_len_R: int32; seq_len
        counts logical tokens, query tokens included, as vLLM does. Rows that pad a graph have no query tokens.
    slot_R: int32, slot of `state` that holds what the row keeps, or -1 for an un-evicted row.
    splits: power of two; the launch grid depends on it, on the number of rows and on max_query_len alone.
    scale: of the logits, default `D ** -0.5`. key_scale, value_scale: what fp8 pages are multiplied with when read.

    The result equals softmax attention over the concatenation of the three segments, accumulated in fp32. No host sync;
    allocates nothing when out and workspace are given. Raises ValueError for arguments that do not fit each other.
    """
    tokens, num_heads, head_size = query_TQD.shape
    rows, kv_heads = table_RB.shape[0], pages.num_kv_heads
    require_dtype("query_TQD", query_TQD, (torch.float32, torch.float16, torch.bfloat16))
    require_device("query_TQD", query_TQD, pages.key_PND.device)
    require_int("layer", layer, 0, pages.num_layers - 1)
    require_int("max_query_len", max_query_len, 1)
    if head_size != pages.head_size or query_TQD.stride(2) != 1:
        refuse("query_TQD", (tuple(query_TQD.shape), query_TQD.stride()), f"D={pages.head_size}, stride 1 in D")
    if num_heads % kv_heads:
        refuse("query_TQD.shape[1]", num_heads, f"a multiple of the {kv_heads} KV heads")
    require_shape("query_start_R1", query_start_R1, (rows + 1,))
    require_shape("seq_len_R", seq_len_R, (rows,))
    require_shape("slot_R", slot_R, (rows,))
    require_shape("state.offset_SO", state.offset_SO, (None, pages.num_layers * kv_heads + 1))
    indices = {"table_RB": table_RB, "query_start_R1": query_start_R1, "seq_len_R": seq_len_R, "slot_R": slot_R}
    for name, tensor in indices.items():
        require_dtype(name, tensor, (torch.int32,))
    group = num_heads // kv_heads
    splits = splits or choose_splits(rows, group, kv_heads, max_query_len)
    if splits != power_of_two(splits):
        refuse("splits", splits, "a power of two")
    out = torch.empty_like(query_TQD) if out_TQD is None else out_TQD
    require_shape("out_TQD", out, (tokens, num_heads, head_size))
    scale = head_size**-0.5 if scale is None else scale
    if not runs_triton(query_TQD):
        return reference.ragged_paged_decode(
            query_TQD, pages, layer, table_RB, query_start_R1, seq_len_R, slot_R, state, out_TQD=out,
            scale=scale, key_scale=key_scale, value_scale=value_scale,
        )  # fmt: skip
    if rows == 0 or tokens == 0:
        return out
    if workspace is None:
        workspace = DecodeWorkspace.empty(tokens, num_heads, splits, head_size, query_TQD.device)
    partial_rows = tokens * num_heads * splits
    if workspace.lse.numel() < partial_rows or workspace.part.numel() < partial_rows * head_size:
        refuse("workspace", workspace.lse.numel(), f"room for {partial_rows} partial rows of {head_size}")

    block_m = tile_rows(group, max_query_len)
    q_tiles = -(-max_query_len // (block_m // group))
    shape = {"H": kv_heads, "G": group, "N": pages.page_tokens, "D": head_size, "BLOCK_D": power_of_two(head_size, 16)}
    tiling = {"BLOCK_M": block_m, "BLOCK_T": BLOCK_T, "SPLITS": splits, "MIN_STEPS": MIN_STEPS}
    _decode_kernel[(rows * q_tiles, kv_heads, splits)](
        out, workspace.part, workspace.lse, query_TQD, pages.key_PND, pages.value_PND,
        query_start_R1, seq_len_R, table_RB, slot_R,
        state.fresh_SK, state.offset_SO, state.shared_S, state.growth_S, pages.layer_page_L,
        scale * key_scale * math.log2(math.e), value_scale, layer, q_tiles,
        query_TQD.stride(0), query_TQD.stride(1), out.stride(0), out.stride(1),
        pages.key_PND.stride(0), pages.key_PND.stride(1), pages.value_PND.stride(0), pages.value_PND.stride(1),
        table_RB.stride(0), state.fresh_SK.stride(0), state.offset_SO.stride(0), pages.block_pages, pages.head_pages,
        LH=pages.num_layers * kv_heads, **shape, **tiling, num_warps=4, num_stages=STAGES,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(rows * max_query_len, num_heads)](
            out, workspace.part, workspace.lse, query_start_R1, seq_len_R, slot_R,
            state.offset_SO, state.shared_S, state.growth_S,
            layer, max_query_len, out.stride(0), out.stride(1), state.offset_SO.stride(0),
            **shape, **tiling, num_warps=4,
        )  # fmt: skip
    return out
