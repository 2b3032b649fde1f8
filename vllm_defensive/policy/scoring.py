"""From one layer's window queries, keys and values to one score a token and head.

Axes: H KV heads, G query heads per KV head, Q = H*G, W window, S prompt tokens, T = S - W scored tokens,
E evictable tokens, D head size, M hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vllm_defensive.policy.budget import stage_one_cap
from vllm_defensive.policy.presets import Policy
from vllm_defensive_kernels import formulas

ReduceHeads = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks that share a layer's heads."""

SINK_TOKENS = 4
FORCED = float("inf")


@dataclass
class LayerScores:
    """Scores of one layer's evictable tokens; +inf is a token that must stay.

    `settle` may return several layers' at once, with an axis of layers in front; `apart` separates them.
    """

    scores_HE: Tensor
    """fp32: decides how much each head gets and, unless `rank_HE` is there, which of its tokens."""
    rank_HE: Tensor | None = None
    """fp32, of half-budget policies: decides the second half of a head's tokens."""
    preference: Tensor | None = None
    """fp32 scalar, of policies whose layers' budgets follow their attention: the layer's weight."""

    def apart(self) -> list["LayerScores"]:
        """Each layer's, of several. Views."""
        ranks = [None] * len(self.scores_HE) if self.rank_HE is None else self.rank_HE
        weights = [None] * len(self.scores_HE) if self.preference is None else self.preference
        return [LayerScores(*parts) for parts in zip(self.scores_HE, ranks, weights, strict=True)]


def score_layer(
    policy: Policy,
    *,
    layer: int,
    query_WQD: Tensor | None,
    key_HSD: Tensor,
    value_HSD: Tensor,
    output_QDM: Tensor | None,
    factor_QDC: Tensor | None,
    scale: float,
    keep_ratio: float,
    evictable: tuple[int, int],
    reduce_heads: ReduceHeads | None = None,
    window: int | None = None,
    mass_HS: Tensor | None = None,
    echo_HS: Tensor | None = None,
) -> LayerScores:
    """Score the tokens in `evictable` = [start, stop) of one layer, in float32.

    Scores are computed over all tokens before the window and then cut to the range, so that a shared head of the
    prompt does not change what its tokens weigh. Tokens of the window that lie in the range get +inf.

    query_WQD: post-RoPE queries of the last W tokens (None where the policy needs none; give `window` then).
    value_HSD: those of the first tokens may be missing, up to `start`, unless `policy.needs_all_values`.
    output_QDM: the output projection's slice of each query head; None weighs no values.
    factor_QDC: `formulas.gram_factor(output_QDM)`, for "l2-gram"; computed here when it is missing.
    scale: of the logits. keep_ratio: bounds stage 1 of "mass".
    reduce_heads: sums a tensor over the ranks that share this layer's heads; None on one rank.
    mass_HS: fp32, of policies that accumulate: `formulas.accumulate_attention` over every query of the prompt.
    echo_HS: fp32, of policies that reconstruct: the largest attention that a query of the second pass pays.
    """
    tokens = key_HSD.shape[1]
    if window is None:
        window = 0 if query_WQD is None else query_WQD.shape[0]
    if not policy.keeps_window:
        window = 0
    start, stop = evictable
    assert 0 <= start < stop <= tokens, f"evictable range {evictable} of a prompt of {tokens} tokens"
    scored = tokens - window
    assert scored > 0, f"a prompt of {tokens} tokens has none before its window of {window}"
    if policy.needs_queries:
        assert query_WQD is not None and query_WQD.shape[0] == window, f"{policy.name} needs the window's queries"
        if policy.score is not None:
            assert value_HSD.shape == key_HSD.shape, f"{policy.name} needs the values of all tokens"
            scores_HT = policy.score(
                query_WQD=query_WQD, key_HSD=key_HSD, value_HSD=value_HSD, output_QDM=output_QDM, scale=scale
            )
            assert scores_HT.shape == (key_HSD.shape[0], scored), f"{policy.name} returned {tuple(scores_HT.shape)}"
            return LayerScores(_cut_and_force(scores_HT.float(), start, stop))
        attention = _observe(policy, query_WQD, key_HSD, scale, reduce_heads)
        skipped = tokens - value_HSD.shape[1]
        norm_HT = _value_norm(policy, value_HSD[:, : max(scored - skipped, 0)], output_QDM, factor_QDC)
        return settle(
            policy,
            attention,
            norm_HT,
            window=window,
            keep_ratio=keep_ratio,
            evictable=evictable,
            reduce_heads=reduce_heads,
            echo_HT=None if echo_HS is None else echo_HS[:, :scored],
        )
    if policy.aggregate == "echo":
        assert echo_HS is not None and echo_HS.shape == key_HSD.shape[:2], f"{policy.name} needs a second pass"
        scores_HT = echo_HS[:, :scored]
    elif policy.accumulates:
        assert mass_HS is not None and mass_HS.shape == key_HSD.shape[:2], f"{policy.name} needs accumulated attention"
        scores_HT = formulas.pool_tokens(mass_HS[:, :scored], policy.pool_kernel)
    else:
        scores_HT = _score_positions(policy, layer, key_HSD.shape[0], tokens, scored, key_HSD.device)
    return LayerScores(_cut_and_force(scores_HT, start, stop))


@dataclass
class Attention:
    """What the window's attention says of one layer, reduced to what policies read; or of several layers, with their
    axis in front."""

    scores_HT: Tensor
    mean_HT: Tensor
    """Mean attention over window and group, not pooled."""
    bias_H: Tensor
    """Mean mass of a row on the window, or on the W keys before it (see Policy.window_bias)."""
    preference: Tensor | None = None
    """See `LayerScores`."""

    @classmethod
    def of(cls, policy: Policy, scores_HT: Tensor, mean_HT: Tensor, window: int) -> "Attention":
        """For who has scores and mean: the bias follows from the mean, as a row of attention sums to 1."""
        if policy.window_bias == "true":
            return cls(scores_HT, mean_HT, 1 - mean_HT.sum(dim=-1))
        return cls(scores_HT, mean_HT, mean_HT[..., max(mean_HT.shape[-1] - window, 0) :].sum(dim=-1))


def settle(
    policy: Policy,
    attention: Attention,
    norm_HT: Tensor | None,
    *,
    window: int,
    keep_ratio: float,
    evictable: tuple[int, int],
    reduce_heads: ReduceHeads | None = None,
    echo_HT: Tensor | None = None,
) -> LayerScores:
    """The second half of `score_layer`, for attention and value norms that a kernel has computed.

    Of one layer, or of several, with their axis in front of both: a GPU is given few large operations then.
    norm_HT: those of the first tokens may be missing, as `score_layer` says of values.
    """
    scores_HT, rank_HT = attention.scores_HT, None
    if policy.halo_tokens:
        scores_HT = formulas.halo(scores_HT, policy.halo_tokens, policy.halo_weight)
    if echo_HT is not None:
        # As it is: clamped, or with a halo of its own, it would be worse (docs/quality.md).
        scores_HT = torch.maximum(scores_HT, echo_HT)
    if norm_HT is not None and (skipped := scores_HT.shape[-1] - norm_HT.shape[-1]):
        assert not policy.needs_all_values, f"{policy.name} needs the values of all tokens"
        scores_HT = scores_HT[..., skipped:]
        evictable = evictable[0] - skipped, evictable[1] - skipped
    if policy.aggregate == "defensive":
        cap = stage_one_cap(scores_HT.shape[-1], keep_ratio, window) if policy.stages == "mass" else 0
        scores_HT = _weigh_and_settle(replace(attention, scores_HT=scores_HT), norm_HT, cap, reduce_heads)
    elif policy.stages == "half-budget" and norm_HT is not None:
        rank_HT = _cut_and_force((scores_HT + formulas.HALF_BUDGET_EPSILON) * norm_HT, *evictable)
    return LayerScores(_cut_and_force(scores_HT, *evictable), rank_HT, attention.preference)


def _observe(
    policy: Policy, query_WQD: Tensor, key_HSD: Tensor, scale: float, reduce_heads: ReduceHeads | None
) -> Attention:
    """Reduce the window's attention to what policies read, a few query heads at a time: on CPU no more rows than fit
    a core's cache (of one query head, if even these do not), elsewhere a bounded number."""
    window, query_heads, _ = query_WQD.shape
    heads, tokens, _ = key_HSD.shape
    group = query_heads // heads
    at_a_time = max(1, 4 * formulas.temporary_elements(key_HSD) // (window * tokens))
    head_step, group_step = max(1, at_a_time // group), min(at_a_time, group)
    query_WHGD = query_WQD.unflatten(1, (heads, group))
    some_heads = zip(query_WHGD.split(head_step, dim=1), key_HSD.split(head_step), strict=True)
    parts = [_observe_heads(policy, query, key.float(), scale, group_step) for query, key in some_heads]
    attention = Attention(
        torch.cat([part.scores_HT for part in parts]),
        torch.cat([part.mean_HT for part in parts]),
        torch.cat([part.bias_H for part in parts]),
    )
    if spreads := [part.preference for part in parts if part.preference is not None]:
        spread_2 = torch.stack(spreads).sum(dim=0)
        attention.preference = formulas.layer_preference(reduce_heads(spread_2) if reduce_heads else spread_2)
    return attention


def _observe_heads(policy: Policy, query_WHGD: Tensor, key_HSD: Tensor, scale: float, group_step: int) -> Attention:
    """`_observe` for some heads. Means add up over parts of a group, and the peak is the largest of their peaks."""
    window, _, group, _ = query_WHGD.shape
    scored = key_HSD.shape[1] - window
    means, biases, peaks, variances, spreads = [], [], [], [], []
    for query in query_WHGD.split(group_step, dim=2):
        share = query.shape[2] / group
        rows_HGWS = formulas.window_attention(query.flatten(1, 2), key_HSD, scale)
        attention_HGWT = rows_HGWS[..., :scored]
        means.append(share * formulas.aggregate_mean(attention_HGWT))
        if policy.window_bias == "true":
            biases.append(share * rows_HGWS[..., scored:].sum(dim=-1).mean(dim=(1, 2)))
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
        changing_HT = mean_HT + formulas.CAKE_GAMMA * torch.stack(variances).sum(dim=0)
        scores_HT = formulas.pool_tokens(changing_HT, policy.pool_kernel)
    else:
        scores_HT = formulas.pool_tokens(mean_HT, policy.pool_kernel)
    spread = torch.stack(spreads).sum(dim=0) if spreads else None  # turned into a preference by the caller
    return Attention(scores_HT, mean_HT, torch.stack(biases).sum(dim=0), spread)


def _value_norm(
    policy: Policy, value_HTD: Tensor, output_QDM: Tensor | None, factor_QDC: Tensor | None
) -> Tensor | None:
    if policy.value_weight == "l1" and output_QDM is not None:
        return formulas.value_norm_l1(value_HTD, output_QDM)
    if policy.value_weight == "l2-gram":
        if factor_QDC is None and output_QDM is not None:
            factor_QDC = formulas.gram_factor(output_QDM)
        return None if factor_QDC is None else formulas.value_norm_l2(value_HTD, factor_QDC)
    return None


def _weigh_and_settle(
    attention: Attention, norm_HT: Tensor | None, cap: int, reduce_heads: ReduceHeads | None
) -> Tensor:
    """DefensiveKV's two stages: weigh by the value norm, then lift what is certain (at most `cap` tokens of a head) to
    the layer's maximum. Of one layer, or of several with their axis in front.

    The norm is divided by its sum over *heads*, token by token: it looks like a slip of the axis in the reference,
    but dividing over tokens costs quality. Both that sum and the mean bias run over the heads of all ranks; the
    maximum is that of this rank's heads, above all that shares this rank's budget of the layer.
    """
    scores_HT, bias_H = attention.scores_HT, attention.bias_H
    # Z: the biases' sum, how many heads there are, the norms' sums of T tokens.
    parts = [bias_H.sum(dim=-1, keepdim=True), torch.full_like(bias_H[..., :1], bias_H.shape[-1])]
    if norm_HT is not None:
        parts.append(norm_HT.sum(dim=-2))
    sums_1Z = torch.cat(parts, dim=-1).unsqueeze(-2)
    if reduce_heads is not None:
        sums_1Z = reduce_heads(sums_1Z)
    if norm_HT is not None:
        # The quotient first: with a single head it is exactly 1, and equal scores stay equal.
        scores_HT = scores_HT * (norm_HT / sums_1Z[..., 2:].clamp_min(torch.finfo(sums_1Z.dtype).tiny))
    if cap == 0:
        return scores_HT
    mass_11 = formulas.STAGE_ONE_MASS - sums_1Z[..., :1] / sums_1Z[..., 1:2]
    certain_HT = formulas.certain_by_mass(attention.mean_HT, mass_11, cap)
    return torch.where(certain_HT, scores_HT.amax(dim=(-2, -1), keepdim=True), scores_HT)


def _score_positions(policy: Policy, layer: int, heads: int, tokens: int, scored: int, device: torch.device) -> Tensor:
    """Scores that read no tensor of the model. -> fp32 [H, T]."""
    position_T = torch.arange(scored, device=device)
    if policy.aggregate == "recency":
        recency_T = torch.where(position_T < SINK_TOKENS, tokens, position_T)
        return recency_T.float().expand(heads, -1)
    if policy.aggregate == "uniform":
        return torch.ones(heads, scored, device=device)
    head_H1 = layer * 1000 + torch.arange(heads, device=device).unsqueeze(-1)
    spread_H1 = torch.exp(6 * _hash_to_unit(head_H1))
    return spread_H1 * _hash_to_unit(head_H1 * 1_000_003 + position_T)


def _hash_to_unit(key: Tensor) -> Tensor:
    """Spread int64 keys evenly over [0, 1): multiply and fold within 32 bits. The same on every device."""
    for factor in (0x9E3779B1, 0x85EBCA77):
        key = ((key ^ (key >> 15)) * factor) & 0xFFFFFFFF
    return ((key ^ (key >> 16)) >> 8).float() / 2**24


def _cut_and_force(scores_HT: Tensor, start: int, stop: int) -> Tensor:
    """Cut [H, T] or [L, H, T] to the evictable range. Beyond the scored tokens lies the window, which must stay."""
    *rows, scored = scores_HT.shape
    cut_HE = torch.full((*rows, stop - start), FORCED, device=scores_HT.device)
    if start < scored:
        cut_HE[..., : min(stop, scored) - start] = scores_HT[..., start : min(stop, scored)]
    return cut_HE
