"""One forced answer: what the model would have said at each of its tokens, and what that comes to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.quality.metrics import divergence, mean


@dataclass
class Forced:
    """One forced answer of A tokens. full_AV: log-probabilities with the full cache, kept if `keep`, compared with if
    given. kl, nll, right: per token, filled in while the engine runs."""

    tokens: list[int]
    full_AV: Tensor | None = None
    keep: bool = False
    kl: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        size = len(self.tokens)
        self.kl, self.nll, self.right = [0.0] * size, [0.0] * size, [False] * size
        self._kept: list[Tensor | None] = [None] * size

    def record(self, position: int, logprobs_V: Tensor) -> None:
        token = self.tokens[position]
        self.nll[position] = -float(logprobs_V[token])
        self.right[position] = int(logprobs_V.argmax()) == token
        if self.keep:
            self._kept[position] = logprobs_V.clone()
        if self.full_AV is not None:
            self.kl[position] = float(divergence(self.full_AV[position], logprobs_V))

    def reference(self) -> Tensor:
        return torch.stack([row for row in self._kept if row is not None])

    def counts(self, first_counts: bool) -> dict[str, float]:
        """What a row holds. kl, nll: means over the tokens after the first, the count that all settings share.
        kl_with_first: over all of them.

        first_counts: whether the first token was computed from what was kept, that is whether something of the prompt
        came after the eviction. Of a prompt that is evicted at its end it is read off the full cache.
        """
        after = {"kl_with_first": mean(self.kl)} if first_counts else {}
        return {"kl": mean(self.kl[1:]), **after, "nll": mean(self.nll[1:]), "exact": float(all(self.right))}
