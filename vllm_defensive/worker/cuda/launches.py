"""The kernels as this worker calls them: with which arguments, and for how many layers at a time.

vLLM is not needed here, so that `benchmarks.kernels` times these calls and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vllm_defensive.packing import Packing
from vllm_defensive.policy import LayerScores, Policy, Selection, select_packed
from vllm_defensive_kernels import (
    DecodeWorkspace,
    PackedSource,
    PackedState,
    PagedKV,
    RaggedTokens,
    WindowScores,
    compact,
    compact_quantised,
    learned_page_scores,
    learned_scores,
    list_kept,
    ragged_paged_decode,
    reconstruction_scores,
    value_norm,
    window_scores,
)
from vllm_defensive_kernels.learned import Rotation
from vllm_defensive_kernels.widths import CLASSES

# Of several layers in one go: 8K tokens of all layers of a Llama-3.1-8B twice over. More of them would take more memory
# (see `memory.py`).
SCORES_AT_A_TIME = 2**22


@dataclass(frozen=True)
class PackedRows:
    """Neighbouring rows that our kernel serves. tokens: their place in the batch. The tensors, int32, are those that
    the kernel takes; workspace: None where a graph will never look."""

    tokens: slice
    table_RB: Tensor
    query_start_R1: Tensor
    seq_len_R: Tensor
    slot_R: Tensor
    max_query_len: int
    workspace: DecodeWorkspace | None


@dataclass(frozen=True)
class EchoRow:
    """One row of a batch whose tokens repeat its document. tokens: their place in the batch; first: the position of the
    first of them. table_1B: int32, of the request: its document's blocks, then its echoes'.

    peak_LHS: fp32, the document's scores so far, zeros before its first echo. scored, normalised, sink: what is scored
    over which keys (`vllm_defensive_kernels.echo`)."""

    tokens: slice
    first: int
    table_1B: Tensor
    peak_LHS: Tensor
    scored: tuple[int, int]
    normalised: str
    sink: int


def layer_groups(pages: PagedKV, tokens: int, *, apart: bool = False) -> list[slice]:
    """Layers that are scored together, of prompts of so many scored tokens: groups of one size, so far as that goes."""
    layers = pages.num_layers
    most = 1 if apart else max(1, SCORES_AT_A_TIME // (pages.num_kv_heads * tokens))
    groups = -(-layers // most)
    step = -(-layers // groups)
    return [slice(first, min(first + step, layers)) for first in range(0, layers, step)]


def observe(
    policy: Policy,
    query_AWQD: Tensor,
    pages: PagedKV,
    group: slice,
    table_1B: Tensor,
    tokens: RaggedTokens,
    *,
    scale: float,
    key_scale: float,
    cap: float = 0.0,
    void_LQ: Tensor | None = None,
) -> WindowScores:
    """The window's attention of a group of readers, in one launch. query_AWQD, pages: of all readers; void_LQ: of
    these."""
    return window_scores(
        query_AWQD[group, None],
        # A copy, as kernels are compiled for where a tensor begins: anew for the middle of one.
        replace(pages, layer_page_L=pages.layer_page_L[group].clone()),
        table_1B,
        tokens,
        aggregate="defensive" if policy.aggregate == "defensive" else "mean",
        pool=policy.pool_kernel,
        scale=scale,
        key_scale=key_scale,
        cap=cap,
        void_LQ=void_LQ,
    )


def reconstruct(
    echoes: EchoRow,
    query_TQD: Tensor,
    pages: PagedKV,
    layer: int,
    *,
    scale: float,
    key_scale: float,
    cap: float = 0.0,
    void_Q: Tensor | None = None,
) -> None:
    """What such a row's echoes add to one layer's scores, once their keys are in the cache. query_TQD: of the batch."""
    reconstruction_scores(
        query_TQD[echoes.tokens],
        pages,
        layer,
        echoes.table_1B,
        peak_HS=echoes.peak_LHS[layer],
        scored=echoes.scored,
        first=echoes.first,
        normalised=echoes.normalised,
        sink=echoes.sink,
        scale=scale,
        key_scale=key_scale,
        cap=cap,
        void_Q=void_Q,
    )


def weigh(
    policy: Policy,
    pages: PagedKV,
    layer: int,
    table_1B: Tensor,
    tokens: RaggedTokens,
    weights: Tensor,
    *,
    value_scale: float,
    out_HT: Tensor,
) -> None:
    """One layer's value norms into out_HT. weights: the projection's slices, or their factor where the policy says."""
    order = 2 if policy.value_weight == "l2-gram" else 1
    value_norm(pages, layer, table_1B, tokens, weights, order=order, value_scale=value_scale, out_HT=out_HT)


def foretell(
    weight_HX: Tensor,
    rotation: Rotation | None,
    pages: PagedKV,
    layer: int,
    table_1B: Tensor,
    tokens: RaggedTokens,
    *,
    key_scale: float,
    value_scale: float,
    out_HT: Tensor,
) -> None:
    """One layer's learned scores, by this rank's weights, into out_HT."""
    learned_scores(
        pages, layer, table_1B, tokens, weight_HX, rotation, key_scale=key_scale, value_scale=value_scale, out_HT=out_HT
    )


def foretell_pages(
    weight_RX: Tensor,
    rotation: Rotation | None,
    pages: PagedKV,
    page_P: Tensor,
    row_P: Tensor,
    position_PN: Tensor,
    *,
    key_scale: float,
    value_scale: float,
) -> Tensor:
    """Learned scores of the tokens of any pages, whose layers turn their keys alike and have one scale: fp32 `[P, N]`.
    weight_RX: of this rank's heads, all layers."""
    return learned_page_scores(
        pages, page_P, row_P, position_PN, weight_RX, rotation, key_scale=key_scale, value_scale=value_scale
    )


def choose(policy: Policy, scores: Sequence[LayerScores], packing: Packing) -> tuple[Selection, ...]:
    """What fills the packed pages, of each part of the format. scores: of all layers."""
    return select_packed(
        policy,
        scores,
        packing.format,
        head_pages=packing.head_pages,
        forced_tokens=packing.region.forced_tokens,
        evictable=packing.region.tokens,
        list_kept=list_kept,
    )


def pack(pages: PagedKV, table_B: Tensor, selections: Sequence[Selection], fresh_K: Tensor, packing: Packing) -> None:
    """Copy what was chosen, all layers and heads in one launch for each part of the format."""
    first_page = 0
    for part, selection in zip(packing.format.parts, selections, strict=True):
        kept = pages, table_B, selection.offset_O, selection.tokens_PN
        if CLASSES[part.page_class].quantised:
            compact_quantised(*kept, pages, fresh_K, page_class=part.page_class, first_page=first_page)
        else:
            compact(*kept[:3], selection.tokens_PN.flatten(), pages, fresh_K)
        first_page += len(selection.tokens_PN)


def choose_again(
    policy: Policy, score_RC: Tensor, packing: Packing, pages_R: Tensor, layers: int
) -> tuple[Tensor, Tensor]:
    """What fills the packed pages, of candidates that lie packed themselves, or behind. score_RC: fp32, of each row's
    places, far below all others where there is nobody. pages_R: int32, full pages' worth of a row that there are.

    Returns offset_O, int32 `[R + 1]`, the first page of each row, and place_PN, int32, ascending within a row. A row
    that was granted more pages than there are has those that there are; so the last pages may be nobody's, with -1.
    """

    def there_O(pages_granted_R: Tensor) -> Tensor:
        there_R = torch.minimum(pages_granted_R, pages_R)
        return torch.nn.functional.pad(there_R.cumsum(0), (1, 0)).int()

    def list_there(score_RE: Tensor, last_R1: Tensor, offset_O: Tensor, **options: Any) -> Tensor:
        return list_kept(score_RE, last_R1, there_O(offset_O.diff()), **options)

    (chosen,) = select_packed(
        policy,
        [LayerScores(score_HC) for score_HC in score_RC.unflatten(0, (layers, -1))],
        packing.format,
        head_pages=packing.head_pages,
        forced_tokens=packing.region.forced_tokens if policy.keeps_window else 0,
        evictable=(0, score_RC.shape[1]),
        list_kept=list_there,
    )
    offset_O, place_PN = there_O(chosen.pages_LH.flatten()), chosen.tokens_PN
    page_P = torch.arange(len(place_PN), device=place_PN.device)
    return offset_O, place_PN.masked_fill_((page_P >= offset_O[-1])[:, None], -1)


def pack_again(
    pages: PagedKV, table_B: Tensor, source: PackedSource, offset_O: Tensor, place_PN: Tensor, fresh_K: Tensor
) -> None:
    """Copy what was chosen so, all layers and heads in one launch. table_B: int32, the blocks behind what is packed."""
    compact(pages, table_B, offset_O, place_PN.flatten(), pages, fresh_K, packed=source)


def attend(
    rows: PackedRows,
    query_TQD: Tensor,
    pages: PagedKV,
    layer: int,
    state: PackedState,
    out_TQD: Tensor,
    *,
    scale: float,
    key_scale: float,
    value_scale: float,
    cap: float = 0.0,
    void_Q: Tensor | None = None,
) -> None:
    """One layer's attention of such rows of a batch, into their rows of out_TQD."""
    ragged_paged_decode(
        query_TQD[rows.tokens],
        pages,
        layer,
        rows.table_RB,
        rows.query_start_R1,
        rows.seq_len_R,
        rows.slot_R,
        state,
        out_TQD=out_TQD[rows.tokens],
        max_query_len=rows.max_query_len,
        scale=scale,
        key_scale=key_scale,
        value_scale=value_scale,
        cap=cap,
        void_Q=void_Q,
        workspace=rows.workspace,
    )
