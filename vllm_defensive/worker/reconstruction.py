"""The largest attention that the queries of an echo pay each token of the request which it repeats, on any device.

Costs 4 bytes for each layer, KV head and token of the request, from its first echo to its eviction, and a second look
at an echo's attention; other requests pay nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_defensive.packing import Region
from vllm_defensive.plan import Reconstruction
from vllm_defensive.worker.window import IncompleteError


@dataclass(eq=False)
class _Seen:
    """Of one request. peak_LHT: fp32, the largest attention so far. ends: part -> up to which position an echo's
    queries have passed. whole: parts whose last query has passed."""

    peak_LHT: Tensor
    ends: dict[tuple[int, int], int] = field(default_factory=dict)
    whole: set[tuple[int, int]] = field(default_factory=set)


class Reconstructions:
    """Peaks of the request that is being repeated.

    Queries count where the last ones ended, or where an echo begins, so that a part with a gap is never whole. Those
    that are seen twice change nothing, so to plan a step twice, as for two metadata builders, is to plan it once.

    One request at a time: while it waits for its next echo, no other one has any. Peaks that are there when another
    request's turn comes belong to one that was given up, and lives on whole.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, device: torch.device | str = "cpu") -> None:
        self._shape, self._device = (num_layers, num_kv_heads), device
        self._seen: dict[str, _Seen] = {}

    def plan(self, wanted: Reconstruction, chunk: tuple[int, int]) -> Tensor:
        """Peaks `[L, H, T]` that a step raises, each layer by the queries of an echo's positions `chunk`."""
        begin, end = chunk
        if wanted.request_id not in self._seen:
            self._seen = {wanted.request_id: _Seen(self.blank(wanted.stop))}
        seen = self._seen[wanted.request_id]
        if begin in (wanted.stop, seen.ends.get(wanted.part)):
            seen.ends[wanted.part] = end
            if end == wanted.end:
                seen.whole.add(wanted.part)
        return seen.peak_LHT

    def blank(self, tokens: int) -> Tensor:
        """What peaks begin with: zeros."""
        return torch.zeros(*self._shape, tokens, dtype=torch.float32, device=self._device)

    def pop(self, request_id: str, region: Region) -> Tensor:
        """The complete peaks `[L, H, T]`. Raises IncompleteError if some of the region was not repeated."""
        seen = self._seen.pop(request_id, None)
        repeated = 0 if seen is None else sum(stop - first for first, stop in seen.whole)
        if seen is None or repeated != region.stop - region.tokens[0]:
            raise IncompleteError(f"of its prompt {repeated} tokens were repeated")
        return seen.peak_LHT

    def drop(self, request_id: str) -> None:
        """Forget a request that ended, was preempted or starts anew."""
        self._seen.pop(request_id, None)
