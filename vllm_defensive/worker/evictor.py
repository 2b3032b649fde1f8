"""Carry out an eviction: window queries -> scores -> pages and tokens -> packed blocks.

Runs once per request, after the forward pass that completed its prefill. The formulas are `policy/`'s; this file brings them
the tensors of each layer and moves what they chose.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_defensive import audit
from vllm_defensive.config import EvictionConfig
from vllm_defensive.plan import Eviction
from vllm_defensive.policy import LayerScores, Selection, score_layer, select
from vllm_defensive.worker.pages import PageCodec, PageView
from vllm_defensive.worker.runtime import Runtime
from vllm_defensive.worker.tables import RequestTable


@dataclass(frozen=True)
class LayerWeights:
    """What scoring needs of a layer. scale: of its attention logits. output_QDM, gram_QDD: of its output projection, each
    None when it is not needed or cannot be had."""

    scale: float
    output_QDM: Tensor | None = None
    gram_QDD: Tensor | None = None


class Evictor:
    """Evictions on one worker. `microseconds` spent since it was last read are kept for the metrics."""

    def __init__(
        self,
        config: EvictionConfig,
        runtime: Runtime,
        view: PageView,
        codec: PageCodec,
        layers: Sequence[LayerWeights],
        reduce_heads: Callable[[Tensor], Tensor] | None = None,
        writes_audit: bool = True,
    ) -> None:
        self._config = config
        self._policy = config.preset
        self._runtime = runtime
        self._view = view
        self._codec = codec
        self._layers = layers
        self._reduce_heads = reduce_heads
        self._writes_audit = writes_audit and config.audit is not None
        self._microseconds = 0

    def take_microseconds(self) -> int:
        spent, self._microseconds = self._microseconds, 0
        return spent

    def evict(self, evictions: Sequence[Eviction]) -> None:
        """Evict each request of the list; afterwards nothing reads their blocks `[s, g)` any more."""
        started = time.perf_counter()
        for eviction in evictions:
            self._evict(eviction)
        self._microseconds += int((time.perf_counter() - started) * 1e6)

    def _evict(self, eviction: Eviction) -> None:
        num_tokens, page_tokens = eviction.num_tokens, self._view.page_tokens
        evictable = (eviction.shared_blocks * page_tokens, num_tokens // page_tokens * page_tokens)
        pages_LHB = self._view.of_blocks(torch.tensor(eviction.source_blocks))
        windows_LWQD = self._runtime.windows.pop(eviction.request_id)
        scores = [
            self._score(layer, windows_LWQD[layer], pages_LHB[layer], num_tokens, evictable)
            for layer in range(self._view.num_layers)
        ]
        selection = select(
            self._policy,
            scores,
            page_size=page_tokens,
            packed_blocks=len(eviction.packed_blocks),
            evictable=evictable,
        )
        self._compact(eviction, selection, pages_LHB)
        self._runtime.tables[eviction.request_id] = RequestTable(self._view, eviction, selection.pages_LH)
        if self._writes_audit:
            assert self._config.audit is not None
            audit.write(self._config.audit, eviction, selection, self._config, page_tokens)

    def _score(
        self, layer: int, query_WQD: Tensor, pages_HB: Tensor, num_tokens: int, evictable: tuple[int, int]
    ) -> LayerScores:
        key_HTD, value_HTD = self._read(pages_HB)
        weights = self._layers[layer]
        return score_layer(
            self._policy,
            layer=layer,
            query_WQD=query_WQD,
            key_HSD=key_HTD[:, :num_tokens],
            value_HSD=value_HTD[:, :num_tokens],
            output_QDM=weights.output_QDM,
            gram_QDD=weights.gram_QDD,
            scale=weights.scale,
            keep_ratio=self._config.keep,
            evictable=evictable,
            reduce_heads=self._reduce_heads,
        )

    def _read(self, pages_HB: Tensor) -> tuple[Tensor, Tensor]:
        """(K, V), each `[H, B*N, D]`, of a layer's pages (int64 `[H, B]`), tokens in their order."""
        raw = self._view.data.index_select(0, pages_HB.flatten())
        key_PND, value_PND = self._codec.unpack(raw)
        heads, width = pages_HB.shape[0], key_PND.shape[2]
        return key_PND.reshape(heads, -1, width), value_PND.reshape(heads, -1, width)

    def _compact(self, eviction: Eviction, selection: Selection, pages_LHB: Tensor) -> None:
        """Copy the selected tokens of every head into its packed pages, layer by layer."""
        target_P = self._view.of_packed(torch.tensor(eviction.packed_blocks))
        pages_L = selection.pages_LH.sum(dim=1).tolist()
        first = 0
        for layer, count in enumerate(pages_L):
            last = first + count
            if count:
                key_HTD, value_HTD = self._read(pages_LHB[layer])
                tokens_PN = selection.tokens_PN[first:last].long()
                head_P = torch.arange(self._view.num_heads).repeat_interleave(selection.pages_LH[layer].long())
                row_PN = head_P[:, None] * key_HTD.shape[1] + tokens_PN
                key_PND, value_PND = (x.flatten(0, 1)[row_PN] for x in (key_HTD, value_HTD))
                self._view.data.index_copy_(0, target_P[first:last], self._codec.pack(key_PND, value_PND))
            first = last
