"""Scores from the window's attention, reduced query head by query head."""

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, pad

from vllm_defensive.policy.aggregates import aggregate
from vllm_defensive.policy.definition import Policy
from vllm_defensive.policy.layer import Attention, Layer, Tile, by_query_head, last_query_only
from vllm_defensive.policy.weighing import pooled, value_norm_by_query_head

HEAD_TYPE_MASS = 0.9
EXPOSURE_POOL = 5
LOCAL_WINDOWS, LOCAL_SHARE = 2, 16  # a local head looks at so many windows, or that part of the prompt, at most


@aggregate("l2", values="all", weighs=True, gaps=True)
def root_of_squares(policy: Policy, layer: Layer) -> Tensor:
    """The attention column's norm times the projected value's: how much of the product of both matrices a token is
    (LaProx, arXiv 2605.07234; the formula from others' readings of the paper).

    mean_g sqrt(sum_w A[h,g,w,t]^2) * || v_t Wo_{h,g} ||, then pooled. The mean over the group is our reading.
    """
    column_HGT = by_query_head(layer, lambda tile: torch.linalg.vector_norm(_before_window(layer, tile), dim=2))
    norm_HGT = value_norm_by_query_head(policy, layer)
    return pooled(policy, (column_HGT if norm_HGT is None else column_HGT * norm_HGT).mean(dim=1))


@aggregate("last", gaps=True)
def last_query(policy: Policy, layer: Layer) -> Tensor:
    """The last query's attention, averaged over all heads of the layer, those of other ranks too: every head keeps the
    same tokens (TOVA, arXiv 2401.06104, where this is done at each step of decoding)."""
    row_HGT = by_query_head(last_query_only(layer), lambda tile: _before_window(layer, tile)[:, :, -1])
    row_T, heads = row_HGT.sum(dim=(0, 1)), row_HGT.new_full((1,), row_HGT.shape[0] * row_HGT.shape[1])
    sum_Z = layer.sum_over_ranks(torch.cat([row_T, heads]))
    return pooled(policy, (sum_Z[:-1] / sum_Z[-1]).expand(layer.heads, -1))


@aggregate("group-peak", gaps=True)
def largest_of_group(policy: Policy, layer: Layer) -> Tensor:
    """max_g pool(mean_w A) (LAVa, arXiv 2509.09754). A maximum over tokens and one over the group may change places."""
    mean_HGT = by_query_head(layer, lambda tile: _before_window(layer, tile).mean(dim=2))
    return pooled(policy, mean_HGT.amax(dim=1))


@aggregate("exposure")
def exposure(policy: Policy, layer: Layer) -> Tensor:
    """Mean attention of the window's queries that can see a token, the window's own tokens included, averaged over 5
    neighbours with the ends mirrored (RDKV, arXiv 2605.08317: the authors' code)."""
    assert layer.query_WQD is not None, "of policies that need queries"
    window, tokens = len(layer.query_WQD), layer.tokens
    sum_HS = by_query_head(layer, lambda tile: tile.rows_HGWS.sum(dim=2)).mean(dim=1)
    seen_S = (tokens - torch.arange(tokens, device=layer.device)).clamp_max(window)
    around_HS = pad(sum_HS / seen_S, (EXPOSURE_POOL // 2, EXPOSURE_POOL // 2), mode="reflect")
    return avg_pool1d(around_HS, EXPOSURE_POOL, stride=1)[:, : layer.scored]


@aggregate("stratified")
def stratified(policy: Policy, layer: Layer) -> Attention:
    """Ranks within the prompt's two halves, and whether a head is local (HeadKV, arXiv 2605.20600, made for images that
    are being generated; adapted by us to the end of a text's prefill).

    b[h,t] = mean_{g,w} A / (its sum over the token's half); the score is the share of its half that b exceeds, so that
    whatever the budget, each half gets half of it. A head is local if its newest max(2W, S/16) tokens have 0.9 of its
    mean attention, the first tokens (`policy.sinks`) aside.
    """
    middle = -(-layer.scored // 2)

    def reduce(tile: Tile) -> Tensor:
        halves = (_shares(half) for half in _before_window(layer, tile).tensor_split([middle], dim=-1))
        return torch.cat([*halves, tile.rows_HGWS], dim=-1).mean(dim=2)

    share_HT, mean_HS = by_query_head(layer, reduce).mean(dim=1).split([layer.scored, layer.tokens], dim=-1)
    scores_HT = torch.cat([_ranks(half) for half in share_HT.tensor_split([middle], dim=-1)], dim=-1)
    return Attention(scores_HT, local_H=_is_local(mean_HS, policy.sinks, layer.window))


def _before_window(layer: Layer, tile: Tile) -> Tensor:
    """[h, g, W, T]"""
    return tile.rows_HGWS[..., : layer.scored]


def _shares(attention_X: Tensor) -> Tensor:
    """Each row over its sum; a row whose mass underflowed stays zero."""
    return attention_X / attention_X.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(attention_X.dtype).tiny)


def _ranks(share_HX: Tensor) -> Tensor:
    """The part of a row that each entry exceeds, in [0, 1). Same shape, fp32."""
    if share_HX.shape[-1] == 0:
        return share_HX
    sorted_HX = share_HX.contiguous().sort(dim=-1).values
    return torch.searchsorted(sorted_HX, share_HX.contiguous()).float() / share_HX.shape[-1]


def _is_local(mean_HS: Tensor, sinks: int, window: int) -> Tensor:
    """bool [H]"""
    tokens = mean_HS.shape[-1]
    newest = max(LOCAL_WINDOWS * window, tokens // LOCAL_SHARE)
    return mean_HS[:, max(tokens - newest, sinks) :].sum(dim=-1) >= HEAD_TYPE_MASS * mean_HS[:, sinks:].sum(dim=-1)
