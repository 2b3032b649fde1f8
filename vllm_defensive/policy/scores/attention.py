"""Scores from means and peaks of attention, of which stage 1 of "mass" may read more than the score."""

from collections.abc import Iterator

import torch
from torch import Tensor

from vllm_defensive.policy.aggregates import aggregate
from vllm_defensive.policy.definition import Policy
from vllm_defensive.policy.layer import Attention, Layer, Tile, tiles
from vllm_defensive.policy.weighing import pooled
from vllm_defensive_kernels import formulas


@aggregate("accumulated", reads="mass")
def accumulated(policy: Policy, layer: Layer) -> Tensor:
    """What all queries of the prompt pay to a token, summed (H2O, arXiv 2306.14048)."""
    assert layer.mass_HS is not None and layer.mass_HS.shape == layer.key_HSD.shape[:2], (
        f"{policy.name} needs accumulated attention"
    )
    return pooled(policy, layer.mass_HS[:, : layer.scored])


@aggregate("echo", reads="echo")
def echo(policy: Policy, layer: Layer) -> Tensor:
    """The most that a query pays to a token while the model repeats the prompt (KVzip, arXiv 2505.23416), or would."""
    assert layer.echo_HS is not None and layer.echo_HS.shape == layer.key_HSD.shape[:2], (
        f"{policy.name} needs a second pass over the prompt"
    )
    return pooled(policy, layer.echo_HS[:, : layer.scored])


@aggregate("mean", gaps=True)
@aggregate("cake", gaps=True)
@aggregate("defensive", gaps=True)
def observe(policy: Policy, layer: Layer) -> Attention:
    """mean: over window and group, pooled (SnapKV, arXiv 2404.14469). cake: and how it changes over the window (CAKE,
    arXiv 2503.12491). defensive: the worst case instead, nobody below the head's mean (DefensiveKV, arXiv 2510.13334).

    A few query heads at a time.
    """
    parts = [_observe_heads(policy, layer, some) for some in tiles(layer)]
    means, biases = zip(*((part.mean_HT, part.bias_H) for part in parts), strict=True)
    attention = Attention(torch.cat([part.scores_HT for part in parts]), torch.cat(means), torch.cat(biases))
    if spreads := [part.preference for part in parts if part.preference is not None]:
        attention.preference = formulas.layer_preference(layer.sum_over_ranks(torch.stack(spreads).sum(dim=0)))
    return attention


def _observe_heads(policy: Policy, layer: Layer, parts: Iterator[Tile]) -> Attention:
    """`observe` for some heads. Means add up over parts of a group, and the peak is the largest of their peaks."""
    window, _, group, _ = layer.query_WHGD.shape
    scored = layer.tokens - window
    means, biases, peaks, variances, spreads = [], [], [], [], []
    for tile in parts:
        share = tile.logits_HGWS.shape[1] / group
        attention_HGWT = tile.rows_HGWS[..., :scored]
        means.append(share * formulas.aggregate_mean(attention_HGWT))
        if policy.window_bias == "true":
            biases.append(share * tile.shares_HGWX[..., scored:].sum(dim=-1).mean(dim=(1, 2)))
        else:
            biases.append(means[-1][:, max(scored - window, 0) :].sum(dim=-1))
        if policy.aggregate == "defensive":
            peaks.append(formulas.aggregate_peak(attention_HGWT, policy.pool_kernel))
        elif policy.aggregate == "cake":
            variance_HGT = attention_HGWT.var(dim=2, correction=min(1, window - 1))  # of one row 0: nothing changes
            variances.append(share * variance_HGT.mean(dim=1))
            spreads.append(torch.stack([formulas.entropy(attention_HGWT), variance_HGT.sum()]))
    mean_HT = torch.stack(means).sum(dim=0)
    if policy.aggregate == "defensive":
        scores_HT = formulas.clamp_to_mean(torch.stack(peaks).amax(dim=0))
    elif policy.aggregate == "cake":
        scores_HT = pooled(policy, mean_HT + formulas.CAKE_GAMMA * torch.stack(variances).sum(dim=0))
    else:
        scores_HT = pooled(policy, mean_HT)
    spread = torch.stack(spreads).sum(dim=0) if spreads else None  # turned into a preference by the caller
    return Attention(scores_HT, mean_HT, torch.stack(biases).sum(dim=0), spread)
