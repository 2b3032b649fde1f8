"""Attention of query rows over what eviction left: shared leading blocks, packed pages, growth blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_defensive_kernels import reference
from vllm_defensive_kernels.addressing import power_of_two, runs_triton, width
from vllm_defensive_kernels.checks import refuse, require_device, require_dtype, require_int, require_shape
from vllm_defensive_kernels.decode_kernels import decode_kernel, merge_kernel
from vllm_defensive_kernels.logits import check_void, factors
from vllm_defensive_kernels.pages import PackedState, PagedKV
from vllm_defensive_kernels.widths import CLASSES, header_bytes

BLOCK_T = 64  # keys a step: 32 KiB of K and V for a 128-wide bf16 head; wider heads get fewer
BLOCK_M = 64  # query rows a tile, at most, unless G is more; wider heads get fewer
# A page's number has to be read before its keys can be; with fewer stages than this Triton keeps one step in shared
# memory instead of two, and nothing is in flight while the tensor cores work.
STAGES = 5
WARPS = 4
MERGE_WARPS = 4
MIN_STEPS = 4  # a split shorter than 256 keys costs more to merge than it saves
MAX_SPLITS = 64
TARGET_PROGRAMS = 2048  # about four rounds on the 132 multiprocessors of an H200, four programs on each


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


def tile_rows(group: int, max_query_len: int, head_size: int = 128) -> int:
    """Rows of a query tile: `G` heads by as many query tokens as fit; 16 is the least that tl.dot takes."""
    return max(power_of_two(group), min(BLOCK_M // width(head_size), power_of_two(group * max_query_len)), 16)


def choose_splits(rows: int, group: int, num_kv_heads: int, max_query_len: int, head_size: int = 128) -> int:
    """Splits of a launch: a function of its shape only, never of the lengths, so that a captured grid stays right.

    Decode rows always get 16 or more, because one head may hold most of a layer; prompts that go on over packed pages
    bring a program for each query tile of their own and get as few as keep the device busy. head_size counts for these
    alone.
    """
    q_tiles = -(-max_query_len // (tile_rows(group, max_query_len, head_size) // group))
    wanted = power_of_two(-(-TARGET_PROGRAMS // max(rows * q_tiles * num_kv_heads, 1)))
    return min(max(wanted, 16 if q_tiles == 1 else 1), MAX_SPLITS)


def step_tokens(page_tokens: int, head_size: int = 128) -> int:
    """Tokens a step over a page of so many codes: a step begins where a page does, so that the last of a page may have
    few. The most of 16, 32 and 64 that pad a page by at most a quarter more than 16 do; fewer of wider heads."""

    def padded(each: int) -> int:
        return -(-page_tokens // each) * each

    return max(
        each for each in (16, 32, BLOCK_T) if each * width(head_size) <= BLOCK_T and 4 * padded(each) <= 5 * padded(16)
    )


def coded_classes(pages: PagedKV, state: PackedState) -> tuple[tuple[int, int, int, int, int], ...]:
    """What the kernels know of each class of codes: see `decode_kernels`."""
    size, classes = pages.head_size, []
    for name in state.coded:
        tokens, bits = pages.page_shape.tokens(name), CLASSES[name]
        step = step_tokens(tokens, size)
        classes.append((bits.key_bits, bits.value_bits, tokens, step, header_bytes(size, tokens)))
    return tuple(classes)


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
    cap: float = 0.0,
    void_Q: Tensor | None = None,
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
    cap, void_Q: see `logits`; a kernel is compiled for each cap. void_Q: fp32, fp16 or bf16.

    The result equals softmax attention over the concatenation of the three segments, accumulated in fp32. Numbers of
    quantised pages are rounded to the queries' dtype first. No host sync; allocates nothing when out and workspace are
    given. Raises ValueError for arguments that do not fit each other.
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
    offsets = len(state.classes) * pages.num_layers * kv_heads + 1
    require_shape("state.offset_SO", state.offset_SO, (None, offsets))
    indices = {"table_RB": table_RB, "query_start_R1": query_start_R1, "seq_len_R": seq_len_R, "slot_R": slot_R}
    for name, tensor in indices.items():
        require_dtype(name, tensor, (torch.int32,))
    group = num_heads // kv_heads
    splits = splits or choose_splits(rows, group, kv_heads, max_query_len, head_size)
    if splits != power_of_two(splits):
        refuse("splits", splits, "a power of two")
    out = torch.empty_like(query_TQD) if out_TQD is None else out_TQD
    require_shape("out_TQD", out, (tokens, num_heads, head_size))
    scale = head_size**-0.5 if scale is None else scale
    check_void("void_Q", void_Q, (num_heads,), query_TQD.device)
    # As bytes, and as the fp16 numbers of their headers.
    coded_views = (pages.row_PNY, pages.half_PNX) if state.coded else (None, None)
    if not runs_triton(query_TQD):
        return reference.ragged_paged_decode(
            query_TQD, pages, layer, table_RB, query_start_R1, seq_len_R, slot_R, state, out_TQD=out,
            scale=scale, key_scale=key_scale, value_scale=value_scale, cap=cap, void_Q=void_Q,
        )  # fmt: skip
    if rows == 0 or tokens == 0:
        return out
    partial_rows = tokens * num_heads * splits if splits > 1 else 0
    if workspace is None:
        workspace = DecodeWorkspace.empty(tokens if splits > 1 else 0, num_heads, splits, head_size, query_TQD.device)
    if workspace.lse.numel() < partial_rows or workspace.part.numel() < partial_rows * head_size:
        refuse("workspace", workspace.lse.numel(), f"room for {partial_rows} partial rows of {head_size}")

    block_m, wide = tile_rows(group, max_query_len, head_size), width(head_size)
    q_tiles = -(-max_query_len // (block_m // group))
    shape = {
        "LH": pages.num_layers * kv_heads,
        "H": kv_heads,
        "G": group,
        "N": pages.page_tokens,
        "D": head_size,
        "BLOCK_D": power_of_two(head_size, 16),
        "CLASSES": coded_classes(pages, state),
    }
    tiling = {"BLOCK_M": block_m, "BLOCK_T": BLOCK_T // wide, "SPLITS": splits, "MIN_STEPS": MIN_STEPS}
    scale_log2, bend = factors(scale * key_scale, cap)
    decode_kernel[(rows * q_tiles, kv_heads, splits)](
        out, workspace.part, workspace.lse, query_TQD, pages.key_PND, pages.value_PND, *coded_views, void_Q,
        query_start_R1, seq_len_R, table_RB, slot_R,
        state.fresh_SK, state.offset_SO, state.shared_S, state.growth_S, pages.layer_page_L,
        scale_log2, value_scale, layer, q_tiles,
        query_TQD.stride(0), query_TQD.stride(1), out.stride(0), out.stride(1),
        pages.key_PND.stride(0), pages.key_PND.stride(1), pages.value_PND.stride(0), pages.value_PND.stride(1),
        table_RB.stride(0), state.fresh_SK.stride(0), state.offset_SO.stride(0),
        pages.layer_pages or 0, pages.block_pages, pages.head_pages,
        EVEN_LAYERS=pages.layer_pages is not None, ROW=pages.row_bytes if state.coded else 0, CAP=bend,
        **shape, **tiling, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(rows * max_query_len, num_heads)](
            out, workspace.part, workspace.lse, query_start_R1, seq_len_R, slot_R,
            state.offset_SO, state.shared_S, state.growth_S,
            layer, max_query_len, out.stride(0), out.stride(1), state.offset_SO.stride(0),
            **shape, **tiling, num_warps=MERGE_WARPS * wide,
        )  # fmt: skip
    return out
