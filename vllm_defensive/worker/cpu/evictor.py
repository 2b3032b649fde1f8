"""Carry out an eviction: window queries -> scores -> pages and tokens -> packed blocks.

Runs once per request, after the forward pass that completed its prefill. The formulas are `policy/`'s; this file brings
them the tensors of each layer and moves what they chose.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_defensive import audit
from vllm_defensive.plan import Eviction, WorkerReport
from vllm_defensive.policy import PRESETS, LayerScores, ReduceHeads, Selection, score_layer, select
from vllm_defensive.policy.budget import layer_deciles, pages_by_decile
from vllm_defensive.settings.engine import EvictionConfig
from vllm_defensive.worker.cpu.pages import PageCodec, PageView
from vllm_defensive.worker.cpu.runtime import CPURuntime
from vllm_defensive.worker.cpu.tables import RequestTable
from vllm_defensive.worker.projections import Projections

# Of keys and values that may lie unpacked beside the cache: 5,000 tokens of a 135M model, 1,000 of an 8B one.
READ_ONCE_BYTES = 2**27


class CPUEvictor:
    """Evictions on one worker."""

    def __init__(
        self,
        config: EvictionConfig,
        runtime: CPURuntime,
        view: PageView,
        codec: PageCodec,
        scale: float,
        projections: Projections,
        rank: tuple[int, int] = (0, 1),
        reduce_heads: ReduceHeads | None = None,
    ) -> None:
        """scale: of the layers' attention logits. rank, reduce_heads: see `EvictionWorker`."""
        self._config = config
        self._runtime = runtime
        self._view = view
        self._codec = codec
        self._scale = scale
        self._projections = projections
        self._rank = rank
        self._reduce_heads = reduce_heads
        self._decile_L = layer_deciles(view.num_layers)
        self._report = WorkerReport()
        self._scratch = view.data.new_empty(0)

    def take_report(self) -> WorkerReport:
        report, self._report = self._report, WorkerReport()
        return report

    def evict(self, evictions: Sequence[Eviction]) -> None:
        """Evict each request of the list; afterwards nothing reads their blocks `[s, g)` any more."""
        if not evictions:
            return
        started = time.perf_counter()
        pages_L = torch.stack([self._evict(eviction) for eviction in evictions]).sum(dim=0)
        microseconds = int((time.perf_counter() - started) * 1e6)
        self._report.add(microseconds, pages_by_decile(pages_L, self._decile_L).tolist())

    def _evict(self, eviction: Eviction) -> Tensor:
        """Returns int64 [L], the pages that each layer got."""
        pages_LHB = self._view.of_blocks(torch.tensor(eviction.source_blocks))
        target = self._view.of_packed(torch.tensor(eviction.packed_blocks))
        policy = PRESETS[eviction.policy]
        seen = self._runtime.accumulations if policy.accumulates else self._runtime.windows
        choose = self._layer_by_layer if policy.layers_apart else self._across_layers
        selection = choose(eviction, seen.pop(eviction.request_id), pages_LHB, target)
        self._runtime.tables[eviction.request_id] = RequestTable(self._view, eviction, selection.pages_LH)
        if self._config.audit is not None:
            audit.record(self._config.audit, eviction, selection, self._config, self._view.page_tokens, self._rank)
        return selection.pages_LH.sum(dim=1)

    def _across_layers(self, eviction: Eviction, seen_L: Tensor, pages_LHB: Tensor, target: Tensor) -> Selection:
        """Layers share one budget: every one is scored before the first is packed. What was read for the one is kept
        for the other, unless that takes too much memory."""
        room, first = self._room(pages_LHB), PRESETS[eviction.policy].first_value(eviction.shared_blocks)
        read, scores = [], []
        for layer, pages_HB in enumerate(pages_LHB):
            read.append(self._read(pages_HB, room[layer % len(room)], first))
            scores.append(self._score(layer, seen_L[layer], read[layer], eviction))
        selection = self._select(scores, eviction)
        pages_L = selection.pages_LH.sum(dim=1).tolist()
        parts = zip(selection.pages_LH, selection.tokens_PN.split(pages_L), target.split(pages_L), strict=True)
        for layer, (pages_H, tokens_PN, target_P) in enumerate(parts):
            tokens = read[layer] if len(room) > 1 else self._read(pages_LHB[layer], room[0], first)
            self._compact(tokens, pages_H, tokens_PN, target_P)
        return selection

    def _layer_by_layer(self, eviction: Eviction, seen_L: Tensor, pages_LHB: Tensor, target: Tensor) -> Selection:
        """Each layer has its own budget: it is read once, scored, and packed."""
        (room,), first = self._room(pages_LHB[:1]), PRESETS[eviction.policy].first_value(eviction.shared_blocks)
        parts = []
        for layer, target_P in enumerate(target.chunk(len(pages_LHB))):
            tokens = self._read(pages_LHB[layer], room, first)
            part = self._select([self._score(layer, seen_L[layer], tokens, eviction)], eviction)
            self._compact(tokens, part.pages_LH[0], part.tokens_PN, target_P)
            parts.append(part)
        return Selection(torch.cat([p.pages_LH for p in parts]), torch.cat([p.tokens_PN for p in parts]))

    def _evictable(self, eviction: Eviction) -> tuple[int, int]:
        page_tokens = self._view.page_tokens
        return eviction.shared_blocks * page_tokens, eviction.num_tokens // page_tokens * page_tokens

    def _score(self, layer: int, seen: Tensor, tokens: tuple[Tensor, Tensor], eviction: Eviction) -> LayerScores:
        """seen: the window's queries `[W, Q, D]`, or accumulated attention `[H, T]` where the policy asks for that."""
        key_HTD, value_HTD = tokens
        policy = PRESETS[eviction.policy]
        skipped = key_HTD.shape[1] - value_HTD.shape[1]
        gram = policy.value_weight == "l2-gram"
        return score_layer(
            policy,
            layer=layer,
            query_WQD=None if policy.accumulates else seen,
            mass_HS=seen if policy.accumulates else None,
            window=self._config.window,
            key_HSD=key_HTD[:, : eviction.num_tokens],
            value_HSD=value_HTD[:, : eviction.num_tokens - skipped],
            output_QDM=self._projections.slices(layer) if policy.needs_values and not gram else None,
            factor_QDC=self._projections.factor(layer) if gram else None,
            scale=self._scale,
            keep_ratio=eviction.keep,
            evictable=self._evictable(eviction),
            reduce_heads=self._reduce_heads,
        )

    def _select(self, scores: list[LayerScores], eviction: Eviction) -> Selection:
        return select(
            PRESETS[eviction.policy],
            scores,
            page_size=self._view.page_tokens,
            packed_blocks=len(eviction.packed_blocks),
            evictable=self._evictable(eviction),
        )

    def _room(self, pages_LHB: Tensor) -> Tensor:
        """Where keys and values are unpacked: `[L, 2, H*B, N*D]`, or `[1, ...]`, for one layer after the other, where
        all take too much memory.

        Kept from eviction to eviction: memory that goes back to the system faults in again page by page, which takes
        longer than to fill it.
        """
        data = self._view.data
        most = READ_ONCE_BYTES // data.element_size()
        layers = len(pages_LHB) if pages_LHB.numel() * data.shape[1] <= most else 1
        shape = (layers, 2, pages_LHB[0].numel(), data.shape[1] // 2)
        size = math.prod(shape)
        if size > most:
            return data.new_empty(shape)
        if size > self._scratch.numel():
            self._scratch = data.new_empty(size)
        return self._scratch[:size].view(shape)

    def _read(self, pages_HB: Tensor, room_2PX: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """(K `[H, B*N, D]`, V `[H, (B-first)*N, D]`) of a layer's pages (int64 `[H, B]`), tokens in their order."""
        key_PND = self._codec.read_keys(self._view.data, pages_HB.flatten(), room_2PX[0])
        pages_P = pages_HB[:, first:].flatten()
        value_PND = self._codec.read_values(self._view.data, pages_P, room_2PX[1, : len(pages_P)])
        heads, width = len(pages_HB), key_PND.shape[2]
        return key_PND.view(heads, -1, width), value_PND.view(heads, -1, width)

    def _compact(self, tokens: tuple[Tensor, Tensor], pages_H: Tensor, tokens_PN: Tensor, target_P: Tensor) -> None:
        """Copy a layer's selected tokens (int32 `[P, N]`, `pages_H` pages for each head) into its packed pages."""
        head_P = torch.arange(self._view.num_kv_heads).repeat_interleave(pages_H.long())
        most = tokens[0].shape[1]
        packed = []
        for part_HTD in tokens:
            held = part_HTD.shape[1]  # the last ones of all
            row_X = (head_P[:, None] * held + (tokens_PN - (most - held))).flatten()
            packed.append(part_HTD.flatten(0, 1).index_select(0, row_X).unflatten(0, tokens_PN.shape))
        key_PND, value_PND = packed
        self._view.data.index_copy_(0, target_P, self._codec.pack(key_PND, value_PND))
