"""Scores from the keys, and from what queries are like: their mean, and how they vary.

`capacity` and `expected` are functions of a mean query and of a covariance, wherever these come from. The papers take
them over all queries of the prompt, before RoPE; what is offered here looks at the window's queries, as they are after
it, which stand where later queries will.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from vllm_defensive.policy.aggregates import aggregate
from vllm_defensive.policy.definition import Policy
from vllm_defensive.policy.layer import Layer, by_query_head
from vllm_defensive.policy.weighing import pooled
from vllm_defensive_kernels import formulas

SHARPNESS = 5.0  # CapKV's tau, the best of its ablation
RIDGE = 1e-6
RECENT_QUERIES, IMPORTANCE, ALIKE = 8, 0.07, 0.5  # R-KV's alpha, lambda and threshold


@aggregate("key-difference", reads="keys")
def key_difference(policy: Policy, layer: Layer) -> Tensor:
    """-cos(k_t, mean_t' k_t' / |k_t'|): keys that point elsewhere than the others stay (KeyDiff, arXiv 2504.15364)."""
    rows = []
    for key_SD in layer.key_HSD:
        key_SD = normalize(key_SD.float(), dim=-1)
        rows.append(-(key_SD[: layer.scored] @ normalize(key_SD.mean(dim=0), dim=-1)))
    return pooled(policy, torch.stack(rows))


@aggregate("redundancy", gaps=True)
def importance_less_redundancy(policy: Policy, layer: Layer) -> Tensor:
    """0.07 a - 0.93 r: what the last 8 queries attend to, less how much a key resembles others (arXiv 2505.24133).

    a = pool(mean_w softmax_t max_g z), z the logits; r = softmax_t `resemblance`. Both over the tokens before the
    window; a logit of nothing is left out.
    """
    assert layer.query_WQD is not None, "of policies that need queries"
    recent = replace(layer, query_WQD=layer.query_WQD[-RECENT_QUERIES:])
    logits_HGWT = by_query_head(recent, lambda tile: tile.logits_HGWS[..., : layer.scored])
    attention_HT = logits_HGWT.amax(dim=1).softmax(dim=-1).mean(dim=1)
    resemblance_HT = resemblance(layer.key_HSD, layer.there_HS)[:, : layer.scored]
    if layer.there_HS is not None:
        resemblance_HT = resemblance_HT.masked_fill(~layer.there_HS[:, : layer.scored], float("-inf"))
    return IMPORTANCE * pooled(policy, attention_HT) - (1 - IMPORTANCE) * resemblance_HT.softmax(dim=-1)


def resemblance(key_HSD: Tensor, there_HS: Tensor | None = None) -> Tensor:
    """The mean cosine of each key with the others. Of those that one key resembles (a cosine above 0.5) the newest
    does not count, so that of a family it is the newest that stays. Takes the square of S. fp32 [H, S].

    there_HS: bool, the tokens that a head still has; None: all.
    """
    heads, tokens, _ = key_HSD.shape
    rows_at_once = max(1, formulas.temporary_elements(key_HSD) // tokens)
    sums = []
    for head in range(heads):
        key_SD = normalize(key_HSD[head].float(), dim=-1)
        if there_HS is not None:
            key_SD = key_SD * there_HS[head, :, None]
        sum_S = key_SD.new_zeros(tokens)
        for first in range(0, tokens, rows_at_once):
            cosine_RS = key_SD[first : first + rows_at_once] @ key_SD.mT
            cosine_RS.diagonal(first).zero_()
            alike_RS = cosine_RS > ALIKE
            newest_R1 = tokens - 1 - alike_RS.flip(1).int().argmax(dim=1, keepdim=True)
            counted_R1 = cosine_RS.gather(1, newest_R1).masked_fill(alike_RS.any(dim=1, keepdim=True), 0)
            sum_S += cosine_RS.scatter(1, newest_R1, counted_R1).sum(dim=0)
        sums.append(sum_S)
    there_H1 = tokens if there_HS is None else there_HS.sum(dim=1, keepdim=True)
    return torch.stack(sums) / there_H1


@aggregate("capacity-window", values="all")
def capacity_of_window(policy: Policy, layer: Layer) -> Tensor:
    """`capacity` by the mean of the window's queries."""
    mean_QD, _ = window_statistics(layer)
    sinks = min(policy.sinks, layer.tokens - 1)
    scores_HX = capacity(layer.key_HSD[:, sinks:], layer.value_HSD[:, sinks:], mean_QD)
    return pooled(policy, pad(scores_HX, (sinks, 0))[:, : layer.scored])


@aggregate("expected-window")
def expected_of_window(policy: Policy, layer: Layer) -> Tensor:
    """`expected` by the mean and the covariance of the window's queries. A cap of logits, which leaves no such formula,
    and a logit of nothing are left out."""
    sinks = min(policy.sinks, layer.tokens - 1)
    scores_HX = expected(layer.key_HSD[:, sinks:], *window_statistics(layer), layer.scale)
    return pooled(policy, pad(scores_HX, (sinks, 0))[:, : layer.scored])


def window_statistics(layer: Layer) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the window's queries over W, fp32 [Q, D] and [Q, D, D]."""
    query_QWD = layer.query_WHGD.flatten(1, 2).transpose(0, 1).float()
    mean_QD = query_QWD.mean(dim=1)
    away_QWD = query_QWD - mean_QD.unsqueeze(1)
    return mean_QD, away_QWD.mT @ away_QWD / query_QWD.shape[1]


def capacity(key_HSD: Tensor, value_HSD: Tensor, mean_QD: Tensor, sharpness: float = SHARPNESS) -> Tensor:
    """Statistical leverage of each value among all, weighted by how the key answers the mean query (CapKV, arXiv
    2604.25975, as its first author's implementation has it: cosines, where the paper has products). fp32 [H, S].

    w_t = exp(sharpness * (cos(k_t, mu_hg) - max_t cos)); Z = I + sum_t (w_t + 1e-6) v_t v_t^T;
    the score is mean_g w_t v_t^T Z^-1 v_t.
    """
    mean_HGD = normalize(mean_QD, dim=-1).unflatten(0, (len(key_HSD), -1))
    rows = []
    for key_SD, value_SD, mean_GD in zip(key_HSD, value_HSD, mean_HGD, strict=True):
        cosine_GS = mean_GD @ normalize(key_SD.float(), dim=-1).mT
        weight_GS = torch.exp(sharpness * (cosine_GS - cosine_GS.amax(dim=-1, keepdim=True)))
        rows.append(sum_of_leverages(weight_GS, value_SD.float()) / len(mean_GD))
    return torch.stack(rows)


def sum_of_leverages(weight_GS: Tensor, value_SD: Tensor) -> Tensor:
    """sum_g w_t v_t^T Z_g^-1 v_t, one g at a time. fp32 [S]"""
    total_S, one_DD = torch.zeros_like(weight_GS[0]), torch.eye(value_SD.shape[1], device=value_SD.device)
    for weight_S in weight_GS:
        gram_DD = one_DD + (value_SD.mT * (weight_S + RIDGE)) @ value_SD
        # Of Z = R R^T: v^T Z^-1 v = || R^-1 v ||^2. Plain `cholesky` would wait for the device to say that it worked.
        root_DD, _ = torch.linalg.cholesky_ex(gram_DD)
        total_S += weight_S * torch.linalg.solve_triangular(root_DD, value_SD.mT, upper=False).square().sum(dim=0)
    return total_S


def expected(key_HSD: Tensor, mean_QD: Tensor, covariance_QDD: Tensor, scale: float) -> Tensor:
    """Attention that a Gaussian query is expected to pay, as E exp(z) = exp(mean + variance / 2) of its logit z
    (Expected Attention, arXiv 2510.00636). fp32 [H, S], over these tokens.

    mean_g softmax_t( scale * k.mu + scale^2 / 2 * k^T Sigma k ), scale = 1 / sqrt(D).
    """
    heads, rows = len(key_HSD), []
    means, covariances = mean_QD.unflatten(0, (heads, -1)), covariance_QDD.unflatten(0, (heads, -1))
    for key_SD, mean_GD, covariance_GDD in zip(key_HSD, means, covariances, strict=True):
        key_SD = key_SD.float()
        spread_GS = torch.stack([(key_SD @ covariance_DD * key_SD).sum(dim=-1) for covariance_DD in covariance_GDD])
        logits_GS = scale * mean_GD @ key_SD.mT + scale**2 / 2 * spread_GS
        rows.append(logits_GS.softmax(dim=-1).mean(dim=0))
    return torch.stack(rows)
