"""How an attention layer makes attention of products of queries and keys, as scores and our own attention need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Softmax:
    """Of one layer, under the names that the formulas and kernels give these: `formulas.window_attention`.

    void_Q: the layer's own parameter, so that new weights are seen here as soon as there.
    """

    scale: float
    cap: float = 0.0
    void_Q: Tensor | None = None

    @classmethod
    def of(cls, impl: Any) -> Softmax:
        """Of a layer's implementation, vLLM's or ours."""
        return cls(impl.scale, impl.logits_soft_cap or 0.0, impl.sinks)

    @property
    def arguments(self) -> dict[str, Any]:
        """For whoever takes one layer's."""
        return vars(self)
