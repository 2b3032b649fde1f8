"""One forced answer: what the model would have said at each of its tokens, and what that comes to."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.quality.metrics import divergence, mean


@dataclass
class Forced:
    """One forced answer of A tokens. full_AV: log-probabilities with the full cache, kept if `keep`, compared with if
    given. at: places of the tokens that are looked at; None: all. kl, nll, right: per token, filled in while the engine
    runs."""

    tokens: list[int]
    full_AV: Tensor | Sequence[Tensor | None] | None = None
    keep: bool = False
    at: Container[int] | None = None
    kl: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = len(self.tokens)
        self.kl, self.nll, self.right = [0.0] * size, [0.0] * size, [False] * size
        self.rows: list[Tensor | None] = [None] * size
        """What `keep` kept, by place."""

    def record(self, position: int, logits_V: Tensor) -> None:
        if self.at is not None and position not in self.at:
            return
        logprobs_V = logits_V.log_softmax(dim=-1)
        token = self.tokens[position]
        self.nll[position] = -float(logprobs_V[token])
        self.right[position] = int(logprobs_V.argmax()) == token
        if self.keep:
            self.rows[position] = logprobs_V
        if self.full_AV is not None:
            full_V = self.full_AV[position]
            assert full_V is not None, "the full cache's is kept at all places that are compared"
            self.kl[position] = float(divergence(full_V, logprobs_V))

    def reference(self) -> Tensor:
        return torch.stack([row for row in self.rows if row is not None])

    def counts(self, first_counts: bool) -> dict[str, float]:
        """What a row holds. kl, nll: means over the tokens after the first, the count that all settings share.
        kl_with_first: over all of them.

        first_counts: whether the first token was computed from what was kept, that is whether something of the prompt
        came after the eviction. Of a prompt that is evicted at its end it is read off the full cache.
        """
        after = {"kl_with_first": mean(self.kl)} if first_counts else {}
        return {"kl": mean(self.kl[1:]), **after, "nll": mean(self.nll[1:]), "exact": float(all(self.right))}
