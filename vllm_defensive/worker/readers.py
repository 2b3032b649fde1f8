"""Which attention layers read which cache: most caches are read by one, some by several (Gemma 3n, Gemma 4 E).

What is kept of a cache is kept for all of its readers. So each of them scores it, by its own queries and output
projection, and a token's score is the largest of these.

Elsewhere a *layer* is one with a cache of its own, and L counts these. A counts readers: cache after cache, a cache's
own layer first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_defensive.policy import LayerScores


@dataclass(frozen=True)
class Readers:
    """caches: of each reader, the number of the layer whose cache it reads; ascending."""

    caches: tuple[int, ...]

    @classmethod
    def one_each(cls, layers: int) -> Readers:
        """Of a model without shared caches."""
        return cls(tuple(range(layers)))

    @classmethod
    def find(cls, names: Sequence[str], context: Mapping[str, Any]) -> tuple[Readers, list[str]]:
        """(readers of a group's caches, their names). names: of the group's layers, those that share a cache or not.
        context: all layers of the model by name."""
        own = [name for name in names if shared_cache(context[name]) is None]
        found = [
            (cache, reader)
            for cache, name in enumerate(own)
            for reader in (name, *(other for other, layer in context.items() if shared_cache(layer) == name))
        ]
        return cls(tuple(cache for cache, _ in found)), [reader for _, reader in found]

    def __len__(self) -> int:
        return len(self.caches)

    @cached_property
    def of_layer(self) -> tuple[range, ...]:
        """The readers of each layer's cache, its own layer's first."""
        starts = [reader for reader, cache in enumerate(self.caches) if reader == 0 or self.caches[reader - 1] != cache]
        return tuple(range(*ends) for ends in zip(starts, [*starts[1:], len(self)], strict=True))

    @property
    def own(self) -> list[int]:
        """The reader that is each layer itself."""
        return [some.start for some in self.of_layer]

    def largest(self, scores_A: Sequence[LayerScores]) -> list[LayerScores]:
        """Of each layer, from those of each reader."""
        return [LayerScores.largest(scores_A[some.start : some.stop]) for some in self.of_layer]


def shared_cache(layer: Any) -> str | None:
    """The name of the layer whose cache this one reads, or None: it has its own."""
    return getattr(layer, "kv_sharing_target_layer_name", None)
