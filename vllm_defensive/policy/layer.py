"""What a layer is scored from, what comes of it, and the walk over its query heads that bounds temporaries.

Axes: H KV heads, G query heads per KV head, Q = H*G, W window, S prompt tokens, T = S - W scored tokens,
E evictable tokens, D head size, M hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from vllm_defensive.policy.definition import Policy
from vllm_defensive_kernels import formulas

ReduceHeads = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks that share a layer's heads."""


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
    local_H: Tensor | None = None
    """bool, of policies whose budgets follow a head's type: whether the head looks at the prompt's ends only."""

    def apart(self) -> list["LayerScores"]:
        """Each layer's, of several. Views."""
        others = (self.rank_HE, self.preference, self.local_H)
        parts = ([None] * len(self.scores_HE) if part is None else part for part in others)
        return [LayerScores(*each) for each in zip(self.scores_HE, *parts, strict=True)]


@dataclass
class Attention:
    """What the window's attention says of one layer, reduced to what policies read; or of several layers, with their
    axis in front."""

    scores_HT: Tensor
    mean_HT: Tensor | None = None
    """Mean attention over window and group, not pooled; stage 1 of "mass" reads it, and the bias."""
    bias_H: Tensor | None = None
    """Mean mass of a row on the window, or on the W keys before it (see Policy.window_bias)."""
    preference: Tensor | None = None
    local_H: Tensor | None = None
    """These two: see `LayerScores`."""
    echo_HT: Tensor | None = None
    """The largest attention that a query of a second pass over the prompt pays, seen or foretold."""

    @classmethod
    def of(cls, policy: Policy, scores_HT: Tensor, mean_HT: Tensor, window: int) -> "Attention":
        """For who has scores and mean: the bias follows from the mean, as a row of attention sums to 1."""
        if policy.window_bias == "true":
            return cls(scores_HT, mean_HT, 1 - mean_HT.sum(dim=-1))
        return cls(scores_HT, mean_HT, mean_HT[..., max(mean_HT.shape[-1] - window, 0) :].sum(dim=-1))


@dataclass(frozen=True)
class Layer:
    """One layer of a prompt, as `score_layer` was given it."""

    index: int
    query_WQD: Tensor | None
    key_HSD: Tensor
    value_HSD: Tensor
    output_QDM: Tensor | None
    factor_QDC: Tensor | None
    scale: float
    keep_ratio: float
    window: int
    first_head: int
    reduce_heads: ReduceHeads | None
    mass_HS: Tensor | None
    echo_HS: Tensor | None
    first_token: int = 0
    there_HS: Tensor | None = None

    @property
    def heads(self) -> int:
        return self.key_HSD.shape[0]

    @property
    def tokens(self) -> int:
        return self.key_HSD.shape[1]

    @property
    def scored(self) -> int:
        return self.tokens - self.window

    @property
    def device(self) -> torch.device:
        return self.key_HSD.device

    @cached_property
    def query_WHGD(self) -> Tensor:
        """The window's queries by KV head."""
        assert self.query_WQD is not None, "of policies that need queries"
        return self.query_WQD.unflatten(1, (self.heads, -1))

    @property
    def scored_value_HTD(self) -> Tensor:
        """Values of the tokens before the window; those of the first may be missing."""
        return self.value_HSD[:, : max(self.value_HSD.shape[1] - self.window, 0)]

    def sum_over_ranks(self, part: Tensor) -> Tensor:
        """`part` is this rank's share of a sum over the layer's heads. -> the sum."""
        return part if self.reduce_heads is None else self.reduce_heads(part)


@dataclass(frozen=True)
class Tile:
    """Some query heads of one layer: `heads` of its KV heads, and `group` of each one's query heads."""

    heads: slice
    group: slice
    logits_HGWS: Tensor
    """fp32; of keys that lie behind the query, -inf."""

    @cached_property
    def rows_HGWS(self) -> Tensor:
        """Attention: each row sums to 1."""
        return self.logits_HGWS.softmax(dim=-1)


def heads_at_once(layer: Layer, copies: int = 1) -> tuple[int, int]:
    """(KV heads, query heads of each) whose attention is held at a time: on CPU no more rows than fit a core's cache
    (of one query head, if even these do not), elsewhere a bounded number. copies: how often, beside softmax's."""
    window, _, group, _ = layer.query_WHGD.shape
    at_a_time = max(1, 4 * formulas.temporary_elements(layer.key_HSD) // (copies * window * layer.tokens))
    return max(1, at_a_time // group), min(at_a_time, group)


def by_query_head(layer: Layer, reduce: Callable[[Tile], Tensor], copies: int = 1) -> Tensor:
    """What `reduce` makes of each query head's attention: [h, g, ...] of a tile -> [H, G, ...] of the layer.

    copies: see `heads_at_once`.
    """
    (head_step, group_step), group = heads_at_once(layer, copies), layer.query_WHGD.shape[2]
    rows = []
    for first in range(0, layer.heads, head_step):
        heads = slice(first, first + head_step)
        key_HSD, parts = layer.key_HSD[heads].float(), []
        for start in range(0, group, group_step):
            some = slice(start, start + group_step)
            query_WQD = layer.query_WHGD[:, heads, some].flatten(1, 2)
            there_HS = None if layer.there_HS is None else layer.there_HS[heads]
            logits_HGWS = formulas.window_logits(query_WQD, key_HSD, layer.scale, there_HS)
            parts.append(reduce(Tile(heads, some, logits_HGWS)))
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


def last_query_only(layer: Layer) -> Layer:
    """The layer for who reads one query; the tokens that are scored stay the same."""
    assert layer.query_WQD is not None, "of policies that need queries"
    return replace(layer, query_WQD=layer.query_WQD[-1:])
