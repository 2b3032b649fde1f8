"""What is made of every function's scores alike, in this order: the halo, the weight of values, what is certain, the
layer's norm and preference, and the first tokens.

Axes: as in `layer.py`; T' the last of the T tokens, where the values of the first are missing.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vllm_defensive.policy.budget import stage_one_cap
from vllm_defensive.policy.definition import Policy
from vllm_defensive.policy.layer import Attention, Layer, LayerScores, ReduceHeads
from vllm_defensive_kernels import formulas


def pooled(policy: Policy, scores_HT: Tensor) -> Tensor:
    """Average or maximum over neighbouring tokens, as the policy says. Same shape."""
    if policy.pool == "max" and policy.pool_kernel > 1:
        return formulas.halo(scores_HT, policy.pool_kernel // 2, 1.0)
    return formulas.pool_tokens(scores_HT, policy.pool_kernel)


def value_norm(policy: Policy, layer: Layer) -> Tensor | None:
    """What the policy weighs values by, fp32 [H, T']; None where nothing, or the projection was not found."""
    value_HTD, weight = layer.scored_value_HTD, policy.value_weight
    if weight == "l1":
        return None if layer.output_QDM is None else formulas.value_norm_l1(value_HTD, layer.output_QDM)
    if weight == "l2-gram":
        factor_QDC = value_factor(layer)
        return None if factor_QDC is None else formulas.value_norm_l2(value_HTD, factor_QDC)
    if weight == "raw-l2":
        return torch.linalg.vector_norm(value_HTD, dim=-1, dtype=torch.float32)
    if weight == "raw-l1-max":
        norm_HS = torch.linalg.vector_norm(layer.value_HSD, ord=1, dim=-1, dtype=torch.float32)
        return norm_HS.amax(dim=-1, keepdim=True).expand(-1, layer.scored)
    return None


def value_factor(layer: Layer) -> Tensor | None:
    """C of each query head, whose `|| v C || = || v Wo ||`, made here if it is missing. [Q, D, C]"""
    if layer.factor_QDC is None and layer.output_QDM is not None:
        return formulas.gram_factor(layer.output_QDM)
    return layer.factor_QDC


def value_norm_by_query_head(policy: Policy, layer: Layer) -> Tensor | None:
    """`value_norm` before its mean over the group. fp32 [H, G, T'] or None."""
    norms = []
    for g in range(layer.query_WHGD.shape[2]):
        output_HDM, factor_HDC = (
            None if each is None else each.unflatten(0, (layer.heads, -1))[:, g]
            for each in (layer.output_QDM, layer.factor_QDC)
        )
        norms.append(value_norm(policy, replace(layer, output_QDM=output_HDM, factor_QDC=factor_HDC)))
    found = [norm for norm in norms if norm is not None]
    return torch.stack(found, dim=1) if found else None


def weigh(
    policy: Policy,
    attention: Attention,
    norm_HT: Tensor | None,
    *,
    window: int,
    keep_ratio: float,
    reduce_heads: ReduceHeads | None,
) -> LayerScores:
    """Scores of the T' tokens before the window whose norms are there, of all T where there are none."""
    scores_HT, rank_HT = attention.scores_HT, None
    tokens = scores_HT.shape[-1]
    if policy.halo_tokens:
        scores_HT = formulas.halo(scores_HT, policy.halo_tokens, policy.halo_weight)
    if attention.echo_HT is not None:
        # As it is: neither clamp nor halo are meant for it.
        scores_HT = torch.maximum(scores_HT, attention.echo_HT)
    if norm_HT is not None and (skipped := tokens - norm_HT.shape[-1]):
        assert not policy.needs_all_values, f"{policy.name} needs the values of all tokens"
        scores_HT = scores_HT[..., skipped:]
    if policy.stages == "half-budget":
        rank_HT = None if norm_HT is None else (scores_HT + formulas.HALF_BUDGET_EPSILON) * norm_HT
    else:
        cap = stage_one_cap(scores_HT.shape[-1], keep_ratio, window) if policy.stages == "mass" else 0
        attention = replace(attention, scores_HT=scores_HT)
        scores_HT = _weigh_and_lift(policy, attention, norm_HT, cap, reduce_heads)
    if policy.normalise == "layer":
        scores_HT = _share_of_layer(scores_HT, reduce_heads)
    preference = _evenness(scores_HT, reduce_heads) if policy.layer_budget == "entropy" else attention.preference
    sinks = policy.sinks - (tokens - scores_HT.shape[-1])
    rank_HT = None if rank_HT is None else _lift_first(rank_HT, sinks)
    return LayerScores(_lift_first(scores_HT, sinks), rank_HT, preference, attention.local_H)


def _weigh_and_lift(
    policy: Policy, attention: Attention, norm_HT: Tensor | None, cap: int, reduce_heads: ReduceHeads | None
) -> Tensor:
    """Weigh by the value norm, then lift what is certain (DefensiveKV's stage 1, at most `cap` tokens of a head) to the
    layer's maximum. Of one layer, or of several with their axis in front.

    "heads": the norm is divided by its sum over *heads*, token by token: it looks like a slip of the axis in
    DefensiveKV's reference, but dividing over tokens costs quality. Both that sum and the mean bias run over the heads
    of all ranks; the maximum is that of this rank's heads, above all that shares this rank's budget of the layer.
    """
    scores_HT, bias_H, parts = attention.scores_HT, attention.bias_H, []  # Z: all sums over heads, for one reduction
    if cap:
        assert bias_H is not None, "of functions whose attention has a mean"
        parts += [bias_H.sum(dim=-1, keepdim=True), torch.full_like(bias_H[..., :1], bias_H.shape[-1])]
    across = norm_HT is not None and policy.weight_across == "heads"
    if norm_HT is not None and not across:
        scores_HT = scores_HT * norm_HT
    if norm_HT is not None and across:
        parts.append(norm_HT.sum(dim=-2))
    if not parts:
        return scores_HT
    sums_1Z = _sum_over_ranks(torch.cat(parts, dim=-1).unsqueeze(-2), reduce_heads)
    if norm_HT is not None and across:
        # The quotient first: with a single head it is exactly 1, and equal scores stay equal.
        sum_1T = sums_1Z[..., sums_1Z.shape[-1] - norm_HT.shape[-1] :]
        scores_HT = scores_HT * (norm_HT / sum_1T.clamp_min(torch.finfo(sums_1Z.dtype).tiny))
    if not cap:
        return scores_HT
    assert attention.mean_HT is not None, "as its bias, which comes with it"
    mass_11 = formulas.STAGE_ONE_MASS - sums_1Z[..., :1] / sums_1Z[..., 1:2]
    certain_HT = formulas.certain_by_mass(attention.mean_HT, mass_11, cap)
    return torch.where(certain_HT, scores_HT.amax(dim=(-2, -1), keepdim=True), scores_HT)


def _sum_over_ranks(part: Tensor, reduce_heads: ReduceHeads | None) -> Tensor:
    return part if reduce_heads is None else reduce_heads(part)


def _share_of_layer(scores_HT: Tensor, reduce_heads: ReduceHeads | None) -> Tensor:
    """Divide by the sum over heads, those of all ranks, and tokens (LaProx, arXiv 2605.07234). Same shape."""
    sum_11 = _sum_over_ranks(scores_HT.sum(dim=(-2, -1), keepdim=True), reduce_heads)
    return scores_HT / sum_11.clamp_min(torch.finfo(sum_11.dtype).tiny)


def _evenness(scores_HT: Tensor, reduce_heads: ReduceHeads | None) -> Tensor:
    """Entropy of a layer's scores, heads of all ranks together, over its largest value, log(H*T) (LAVa, arXiv
    2509.09754). [..., H, T] -> [...]. Of s that sum to Z: log Z - sum(s log s) / Z."""
    ones_HT = torch.ones_like(scores_HT)
    sums = torch.stack([x.sum(dim=(-2, -1)) for x in (scores_HT, torch.special.xlogy(scores_HT, scores_HT), ones_HT)])
    total, logs, count = _sum_over_ranks(sums, reduce_heads)
    total = total.clamp_min(torch.finfo(total.dtype).tiny)
    return (total.log() - logs / total) / count.log()


def _lift_first(scores_HT: Tensor, sinks: int) -> Tensor:
    """Put the first `sinks` tokens of each head above all others."""
    if sinks <= 0:
        return scores_HT
    first_T = torch.arange(scores_HT.shape[-1], device=scores_HT.device) < sinks
    return torch.where(first_T, scores_HT.amax(dim=-1, keepdim=True) + 1, scores_HT)
