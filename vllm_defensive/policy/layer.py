"""What a layer is scored from, what comes of it, and the walk over its query heads that bounds temporaries.

Axes: H KV heads, G query heads per KV head, Q = H*G, W window, S prompt tokens, T = S - W scored tokens,
E evictable tokens, D head size, M hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
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

    @classmethod
    def largest(cls, scores: Sequence["LayerScores"]) -> "LayerScores":
        """Of a layer that several look at: who needs a token most decides, and local is a head that is so to all."""
        if len(scores) == 1:
            return scores[0]

        def most(parts: list[Tensor | None]) -> Tensor | None:
            there = [part for part in parts if part is not None]
            return torch.stack(there).amax(dim=0) if there else None

        scores_HE = most([each.scores_HE for each in scores])
        assert scores_HE is not None, "of a layer that anybody looks at"
        local = [each.local_H for each in scores if each.local_H is not None]
        return cls(
            scores_HE,
            most([each.rank_HE for each in scores]),
            most([each.preference for each in scores]),
            torch.stack(local).all(dim=0) if local else None,
        )

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
    """Mean mass of a row on the window and on nothing, or on the W keys before it (see Policy.window_bias)."""
    preference: Tensor | None = None
    local_H: Tensor | None = None
    """These two: see `LayerScores`."""
    echo_HT: Tensor | None = None
    """The largest attention that a query of a second pass over the prompt pays, seen or foretold."""

    @classmethod
    def of(cls, policy: Policy, scores_HT: Tensor, mean_HT: Tensor, window: int) -> "Attention":
        """For who has scores and mean: the bias follows from the mean, as all shares of a row sum to 1."""
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
    cap: float = 0.0
    void_Q: Tensor | None = None

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
    void_HG: Tensor | None
    """Logits of nothing, where the model has such."""

    @cached_property
    def shares_HGWX(self) -> Tensor:
        """Of attention: each row sums to 1. Behind the keys, where the model has it, the share of nothing."""
        return formulas.softmax(self.logits_HGWS, self.void_HG)

    @property
    def rows_HGWS(self) -> Tensor:
        """Attention to the keys."""
        return self.shares_HGWX[..., : self.logits_HGWS.shape[-1]]

    @property
    def void_HGW1(self) -> Tensor:
        """What goes to nothing."""
        return self.shares_HGWX[..., self.logits_HGWS.shape[-1] :].sum(dim=-1, keepdim=True)


def heads_at_once(layer: Layer, copies: int = 1) -> tuple[int, int]:
    """(KV heads, query heads of each) whose attention is held at a time: on CPU no more rows than fit a core's cache
    (of one query head, if even these do not), elsewhere a bounded number. copies: how often, beside softmax's."""
    window, _, group, _ = layer.query_WHGD.shape
    at_a_time = max(1, 4 * formulas.temporary_elements(layer.key_HSD) // (copies * window * layer.tokens))
    return max(1, at_a_time // group), min(at_a_time, group)


def tiles(layer: Layer, copies: int = 1) -> Iterator[Iterator[Tile]]:
    """A layer's query heads, a few at a time: for some of its KV heads after the others, parts of their groups. A tile
    is made when it is asked for. copies: see `heads_at_once`."""
    (head_step, group_step), group = heads_at_once(layer, copies), layer.query_WHGD.shape[2]
    void_HG = None if layer.void_Q is None else layer.void_Q.view(layer.heads, group)

    def of_heads(heads: slice) -> Iterator[Tile]:
        key_HSD = layer.key_HSD[heads].float()
        there_HS = None if layer.there_HS is None else layer.there_HS[heads]
        for start in range(0, group, group_step):
            some = slice(start, start + group_step)
            query_WQD = layer.query_WHGD[:, heads, some].flatten(1, 2)
            logits_HGWS = formulas.window_logits(query_WQD, key_HSD, layer.scale, there_HS, layer.cap)
            yield Tile(heads, some, logits_HGWS, None if void_HG is None else void_HG[heads, some])

    return (of_heads(slice(first, first + head_step)) for first in range(0, layer.heads, head_step))


def by_query_head(layer: Layer, reduce: Callable[[Tile], Tensor], copies: int = 1) -> Tensor:
    """What `reduce` makes of each query head's attention: [h, g, ...] of a tile -> [H, G, ...] of the layer.

    copies: see `heads_at_once`.
    """
    return torch.cat([torch.cat([reduce(tile) for tile in some], dim=1) for some in tiles(layer, copies)])


def last_query_only(layer: Layer) -> Layer:
    """The layer for who reads one query; the tokens that are scored stay the same."""
    assert layer.query_WQD is not None, "of policies that need queries"
    return replace(layer, query_WQD=layer.query_WQD[-1:])
