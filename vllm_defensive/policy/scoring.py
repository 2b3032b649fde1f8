"""From one layer's window queries, keys and values to one score a token and head.

Axes: H KV heads, G query heads per KV head, Q = H*G, W window, S prompt tokens, T = S - W scored tokens,
E evictable tokens, D head size, M hidden size.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vllm_defensive.policy import scores
from vllm_defensive.policy.aggregates import AGGREGATES
from vllm_defensive.policy.definition import Policy
from vllm_defensive.policy.layer import Attention, Layer, LayerScores, ReduceHeads
from vllm_defensive.policy.weighing import value_norm, weigh

FORCED = float("inf")

assert scores.__all__, "whose import fills the registry"


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
    first_head: int = 0,
    first_token: int = 0,
    there_HS: Tensor | None = None,
    cap: float = 0.0,
    void_Q: Tensor | None = None,
) -> LayerScores:
    """Score the tokens in `evictable` = [start, stop) of one layer, in float32.

    Scores are computed over all tokens before the window and then cut to the range, so that a shared head of the
    prompt does not change what its tokens weigh. Tokens of the window that lie in the range get +inf.

    query_WQD: post-RoPE queries of the last W tokens (None where the policy needs none; give `window` then).
    value_HSD: those of the first tokens may be missing, up to `start`, unless `policy.needs_all_values`.
    output_QDM: the output projection's slice of each query head; None weighs no values.
    factor_QDC: `formulas.gram_factor(output_QDM)`, for "l2-gram"; computed here when it is missing.
    scale, cap, void_Q: of the logits, as in `formulas.window_attention`. keep_ratio: bounds stage 1 of "mass".
    reduce_heads: sums a tensor over the ranks that share this layer's heads; None on one rank.
    mass_HS: fp32, of policies that accumulate: `formulas.accumulate_attention` over every query of the prompt.
    echo_HS: fp32, of policies that reconstruct: the largest attention that a query of the second pass pays; of learned
        ones: the same, foretold.
    first_head: of the layer's heads, where other ranks have the ones before it.
    first_token: position of the first of these tokens, of lasting policies, which may score some later ones alone.
    there_HS: bool, the tokens that each head still has; None: all. The others' values are zero. Of policies that can be
        asked again (`Policy.evicts_answers_by`).
    """
    tokens = key_HSD.shape[1]
    if window is None:
        window = 0 if query_WQD is None else query_WQD.shape[0]
    if not policy.keeps_window:
        window = 0
    start, stop = evictable
    assert 0 <= start < stop <= tokens, f"evictable range {evictable} of a prompt of {tokens} tokens"
    assert tokens > window, f"a prompt of {tokens} tokens has none before its window of {window}"
    if policy.needs_queries:
        assert query_WQD is not None, f"{policy.name} needs the window's queries"
        assert not policy.keeps_window or query_WQD.shape[0] == window, (
            f"{policy.name} needs all of the window's queries"
        )
    if policy.needs_all_values:
        assert value_HSD.shape[1] == tokens, f"{policy.name} needs the values of all tokens"
    whole = Layer(
        index=layer,
        query_WQD=query_WQD,
        key_HSD=key_HSD,
        value_HSD=value_HSD,
        output_QDM=output_QDM,
        factor_QDC=factor_QDC,
        scale=scale,
        keep_ratio=keep_ratio,
        window=window,
        first_head=first_head,
        reduce_heads=reduce_heads,
        mass_HS=mass_HS,
        echo_HS=echo_HS,
        first_token=first_token,
        there_HS=there_HS,
        cap=cap,
        void_Q=void_Q,
    )
    function = AGGREGATES[policy.aggregate]
    found = function.score(policy, whole)
    attention = found if isinstance(found, Attention) else Attention(found)
    return settle(
        policy,
        attention if echo_HS is None else replace(attention, echo_HT=echo_HS[:, : whole.scored]),
        None if function.weighs else value_norm(policy, whole),
        window=window,
        keep_ratio=keep_ratio,
        evictable=evictable,
        reduce_heads=reduce_heads,
    )


def settle(
    policy: Policy,
    attention: Attention,
    norm_HT: Tensor | None,
    *,
    window: int,
    keep_ratio: float,
    evictable: tuple[int, int],
    reduce_heads: ReduceHeads | None = None,
) -> LayerScores:
    """The second half of `score_layer`, for attention and value norms that a kernel has computed.

    Of one layer, or of several, with their axis in front of both: a GPU is given few large operations then.
    norm_HT: those of the first tokens may be missing, as `score_layer` says of values.
    """
    weighed = weigh(policy, attention, norm_HT, window=window, keep_ratio=keep_ratio, reduce_heads=reduce_heads)
    skipped = attention.scores_HT.shape[-1] - weighed.scores_HE.shape[-1]
    start, stop = evictable[0] - skipped, evictable[1] - skipped
    return replace(
        weighed,
        scores_HE=_cut_and_force(weighed.scores_HE, start, stop),
        rank_HE=None if weighed.rank_HE is None else _cut_and_force(weighed.rank_HE, start, stop),
    )


def _cut_and_force(scores_HT: Tensor, start: int, stop: int) -> Tensor:
    """Cut [H, T] or [L, H, T] to the evictable range. Beyond the scored tokens lies the window, which must stay."""
    *rows, scored = scores_HT.shape
    cut_HE = torch.full((*rows, stop - start), FORCED, device=scores_HT.device)
    if start < scored:
        cut_HE[..., : min(stop, scored) - start] = scores_HT[..., start : min(stop, scored)]
    return cut_HE
