"""Scores from the keys, and from what queries are like: their mean, and how they vary.

`capacity` and `expected` are functions of a mean query and of a covariance, wherever these come from. The papers take
them over all queries of the prompt, before RoPE; what is offered here looks at the window's queries, as they are after
it, which stand where later queries will.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from vllm_defensive.policy.aggregates import aggregate
from vllm_defensive.policy.definition import Policy
from vllm_defensive.policy.layer import Layer
from vllm_defensive.policy.weighing import pooled

SHARPNESS = 5.0  # CapKV's tau, the best of its ablation
RIDGE = 1e-6


@aggregate("key-difference", reads="keys")
def key_difference(policy: Policy, layer: Layer) -> Tensor:
    """-cos(k_t, mean_t' k_t' / |k_t'|): keys that point elsewhere than the others stay (KeyDiff, arXiv 2504.15364)."""
    key_HSD = normalize(layer.key_HSD.float(), dim=-1)
    mean_HD = normalize(key_HSD.mean(dim=1), dim=-1)
    return pooled(policy, -torch.einsum("htd,hd->ht", key_HSD[:, : layer.scored], mean_HD))


@aggregate("capacity-window", values="all")
def capacity_of_window(policy: Policy, layer: Layer) -> Tensor:
    """`capacity` by the mean of the window's queries."""
    mean_QD, _ = window_statistics(layer)
    sinks = min(policy.sinks, layer.tokens - 1)
    scores_HX = capacity(layer.key_HSD[:, sinks:], layer.value_HSD[:, sinks:], mean_QD)
    return pooled(policy, pad(scores_HX, (sinks, 0))[:, : layer.scored])


@aggregate("expected-window")
def expected_of_window(policy: Policy, layer: Layer) -> Tensor:
    """`expected` by the mean and the covariance of the window's queries."""
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
    heads = key_HSD.shape[0]
    key_HSD, value_HSD = normalize(key_HSD.float(), dim=-1), value_HSD.float()
    one_DD = torch.eye(value_HSD.shape[-1], device=value_HSD.device)
    leverages = []
    for mean_HD in normalize(mean_QD, dim=-1).unflatten(0, (heads, -1)).unbind(1):
        cosine_HS = torch.einsum("htd,hd->ht", key_HSD, mean_HD)
        weight_HS = torch.exp(sharpness * (cosine_HS - cosine_HS.amax(dim=-1, keepdim=True)))
        gram_HDD = one_DD + (value_HSD.mT * (weight_HS + RIDGE).unsqueeze(1)) @ value_HSD
        # Of Z = R R^T: v^T Z^-1 v = || R^-1 v ||^2. Plain `cholesky` would wait for the device to say that it worked.
        root_HDD, _ = torch.linalg.cholesky_ex(gram_HDD)
        solved_HDS = torch.linalg.solve_triangular(root_HDD, value_HSD.mT, upper=False)
        leverages.append(weight_HS * solved_HDS.square().sum(dim=1))
    return torch.stack(leverages).mean(dim=0)


def expected(key_HSD: Tensor, mean_QD: Tensor, covariance_QDD: Tensor, scale: float) -> Tensor:
    """Attention that a Gaussian query is expected to pay, as E exp(z) = exp(mean + variance / 2) of its logit z
    (Expected Attention, arXiv 2510.00636). fp32 [H, S], over these tokens.

    mean_g softmax_t( scale * k.mu + scale^2 / 2 * k^T Sigma k ), scale = 1 / sqrt(D).
    """
    heads = key_HSD.shape[0]
    key_HSD = key_HSD.float()
    means, covariances = mean_QD.unflatten(0, (heads, -1)), covariance_QDD.unflatten(0, (heads, -1))
    shares = []
    for mean_HD, covariance_HDD in zip(means.unbind(1), covariances.unbind(1), strict=True):
        spread_HS = (key_HSD @ covariance_HDD * key_HSD).sum(dim=-1)
        logits_HS = scale * torch.einsum("htd,hd->ht", key_HSD, mean_HD) + scale**2 / 2 * spread_HS
        shares.append(logits_HS.softmax(dim=-1))
    return torch.stack(shares).mean(dim=0)
