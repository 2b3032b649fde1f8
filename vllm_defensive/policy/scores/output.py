"""Scores by how far the attention's output moves when a token goes: exact algebra for single tokens.

Without token t the softmax over what is left gives o_w(without t) = (o_w - A v_t) / (1 - A), so that
o_w - o_w(without t) = A * (v_t - o_w(without t)), and v_t - o_w = (1 - A) * (v_t - o_w(without t)): all formulas here
are made of A, of 1 - A, and of the distance between a value and what the other tokens give.
"""

import torch
from torch import Tensor

from vllm_defensive.policy.aggregates import aggregate
from vllm_defensive.policy.definition import Policy
from vllm_defensive.policy.layer import Layer, Tile, by_query_head
from vllm_defensive.policy.weighing import pooled, value_factor

DROPKV_EPSILON = 1e-6
COPIES = 8  # of a tile's attention that live at once below


@aggregate("deletion", values="all", weighs=True)
def deletion(policy: Policy, layer: Layer) -> Tensor:
    """mean_{w,g} of how far the projected output moves, A/(1-A) * || (v_t - o_w) Wo_{h,g} ||: our reconstruction of the
    probe of arXiv 2605.08234, whose formula we have not seen."""

    def reduce(tile: Tile) -> Tensor:
        apart_HGWT, _ = from_the_others(policy, layer, tile)
        return (tile.rows_HGWS[..., : layer.scored] * apart_HGWT.sqrt()).mean(dim=2)

    return pooled(policy, by_query_head(layer, reduce, COPIES).mean(dim=1))


@aggregate("dropkv", values="all", weighs=True)
def dropkv(policy: Policy, layer: Layer) -> Tensor:
    """sum_w (A / (1 - A + 1e-6))^2 || v_t - o_w ||^2, averaged over the group, then pooled (DropKV, openreview
    MqfNzH3TVH; the formula second-hand, the group's mean ours)."""

    def reduce(tile: Tile) -> Tensor:
        apart_HGWT, rest_HGWT = from_the_others(policy, layer, tile)
        weight_HGWT = tile.rows_HGWS[..., : layer.scored] * rest_HGWT / (rest_HGWT + DROPKV_EPSILON)
        return (weight_HGWT.square() * apart_HGWT).sum(dim=2)

    return pooled(policy, by_query_head(layer, reduce, COPIES).mean(dim=1))


@aggregate("obcache", values="all", weighs=True)
def obcache(policy: Policy, layer: Layer) -> Tensor:
    """sum_{w,g} (A z)^2 || v_t - o_w ||^2, z the scaled logit, then pooled: how the output answers to a change of the
    key (OBCache-K, arXiv 2510.07651; the formula second-hand)."""

    def reduce(tile: Tile) -> Tensor:
        apart_HGWT, rest_HGWT = from_the_others(policy, layer, tile)
        rows_HGWT, logits_HGWT = (x[..., : layer.scored] for x in (tile.rows_HGWS, tile.logits_HGWS))
        return ((rows_HGWT * logits_HGWT * rest_HGWT).square() * apart_HGWT).sum(dim=2)

    return pooled(policy, by_query_head(layer, reduce, COPIES).sum(dim=1))


def from_the_others(policy: Policy, layer: Layer, tile: Tile) -> tuple[Tensor, Tensor]:
    """|| (v_t - o_w(without t)) Wo ||^2 and 1 - A, fp32 [h, g, W, T] each; "l2-gram" measures through Wo, "none" does
    not, nor does anyone where the projection was not found.

    || v - o ||^2 is expanded, so that no [T, W, D] is held: off by some 1e-7 of || v ||^2. Of a row's largest entry,
    where that and 1 - A may cancel to nothing, both are summed up from the others instead.
    """
    value_HGSC, rows_HGWS = _values(policy, layer, tile), tile.rows_HGWS
    top_HGW1 = rows_HGWS.argmax(dim=-1, keepdim=True)
    weight_HGW1, others_HGWS = rows_HGWS.gather(-1, top_HGW1), rows_HGWS.scatter(-1, top_HGW1, 0.0)
    value_HGWC = value_HGSC.take_along_dim(top_HGW1, dim=2)
    others_HGWC = others_HGWS @ value_HGSC
    output_HGWC = others_HGWC + weight_HGW1 * value_HGWC
    rest_HGW1 = others_HGWS.sum(dim=-1, keepdim=True) + tile.void_HGW1  # nothing is a token as well, of value zero
    rest_HGWS = (1 - rows_HGWS).scatter_(-1, top_HGW1, rest_HGW1)
    apart_HGWS = _squared_distances(output_HGWC, value_HGSC) / rest_HGWS.square().clamp_min(0.25)
    mean_HGWC = others_HGWC / rest_HGW1.clamp_min(torch.finfo(rest_HGW1.dtype).tiny)
    apart_HGWS.scatter_(-1, top_HGW1, (value_HGWC - mean_HGWC).square().sum(dim=-1, keepdim=True))
    return apart_HGWS[..., : layer.scored], rest_HGWS[..., : layer.scored]


def _values(policy: Policy, layer: Layer, tile: Tile) -> Tensor:
    """Values of all tokens, projected if the policy asks for it, [h, g, S, C]; [h, 1, S, D] if not."""
    value_HGSD = layer.value_HSD[tile.heads].float().unsqueeze(1)
    factor_QDC = value_factor(layer) if policy.value_weight == "l2-gram" else None
    if factor_QDC is None:
        return value_HGSD
    return value_HGSD @ factor_QDC.unflatten(0, (layer.heads, -1))[tile.heads, tile.group].float()


def _squared_distances(row_HGWC: Tensor, column_HGSC: Tensor) -> Tensor:
    """|| row - column ||^2, never below zero. -> [h, g, W, S]"""
    rows, columns = row_HGWC.square().sum(dim=-1).unsqueeze(-1), column_HGSC.square().sum(dim=-1).unsqueeze(-2)
    return (rows + columns - 2 * (row_HGWC @ column_HGSC.mT)).clamp_min(0)
