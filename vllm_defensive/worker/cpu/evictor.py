"""Carry out an eviction: window queries -> scores -> pages and tokens -> packed blocks.

Runs once per request, after the forward pass that completed its prefill. The formulas are `policy/`'s; this file brings
them the tensors of each layer and moves what they chose.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vllm_defensive.plan import Eviction, Score
from vllm_defensive.policy import PRESETS, LayerScores, Policy, ReduceHeads, Selection, score_layer, select_packed
from vllm_defensive.settings.engine import EvictionConfig
from vllm_defensive.worker.cpu.again import Repeats, ScoredAgain
from vllm_defensive.worker.cpu.pages import PageCodec, PageView
from vllm_defensive.worker.cpu.runtime import CPURuntime
from vllm_defensive.worker.cpu.tables import Placed
from vllm_defensive.worker.evictor import Evictor, Selections
from vllm_defensive.worker.learned import Lessons
from vllm_defensive.worker.projections import Projections
from vllm_defensive.worker.readers import Readers
from vllm_defensive.worker.report import layer_deciles
from vllm_defensive.worker.softmax import Softmax
from vllm_defensive.worker.window import IncompleteError
from vllm_defensive_kernels.widths import CLASSES

# Of keys and values that may lie unpacked beside the cache: 5,000 tokens of a 135M model, 1,000 of an 8B one.
READ_ONCE_BYTES = 2**27

Tokens = tuple[Tensor, Tensor]  # K `[H, T, D]`, and V of the last of these tokens, of one layer


@dataclass(eq=False)
class Scored:
    """A request between `score` and `pack`. seen_A: of each reader the window's queries, or accumulated attention; None
    if neither is read. echo_L: of each layer, what a second look saw; None without one.
    pages_LHB: int64, where its tokens are. first_value: values of blocks before this one are not read.

    layers: scores, of a policy whose layers share a budget; layers apart are scored as they are packed, so that one
    layer is read at a time, once. read: tokens of all layers, while nobody has used the memory again.
    """

    score: Score
    policy: Policy
    seen_A: Tensor | None
    pages_LHB: Tensor
    first_value: int
    echo_L: Tensor | None = None
    layers: list[LayerScores] = field(default_factory=list)
    read: list[Tokens] = field(default_factory=list)


class CPUEvictor(Evictor):
    """Evictions on one worker."""

    def __init__(
        self,
        config: EvictionConfig,
        runtime: CPURuntime,
        view: PageView,
        codec: PageCodec,
        softmax_A: Sequence[Softmax],
        readers: Readers,
        projections: Projections,
        rank: tuple[int, int] = (0, 1),
        reduce_heads: ReduceHeads | None = None,
    ) -> None:
        """rank, reduce_heads: see `EvictionWorker`."""
        super().__init__(config, projections, layer_deciles(view.num_layers), rank, reduce_heads)
        self._runtime = runtime
        self._view = view
        self._codec = codec
        self._softmax_A, self._readers = softmax_A, readers
        self._repeats = Repeats(view, codec, runtime, self.weigh, self._known)
        self._scratch = view.data.new_empty(0)
        self._in_scratch: Scored | None = None

    def _start(self) -> float:
        return time.perf_counter()

    def _finish(self, started: float, decile_pages: Tensor) -> None:
        self._report.add(int((time.perf_counter() - started) * 1e6), decile_pages.tolist())

    def _score(self, score: Score) -> Scored | ScoredAgain:
        policy = PRESETS[score.policy]
        if score.since is not None or (policy.lasting and score.later == score.policy):
            return self._repeats.score(score, policy)
        seen = self._runtime.accumulations if policy.accumulates else self._runtime.windows
        seen_A = seen.pop(score.request_id) if policy.needs_window else None
        echo_L = self._runtime.reconstructions.pop(score.request_id, score.region) if policy.reconstructs else None
        pages_LHB = self._view.of_blocks(torch.tensor(score.source_blocks))
        scored = Scored(score, policy, seen_A, pages_LHB, policy.first_value(score.region.shared_blocks), echo_L)
        if self.lessons is not None and echo_L is not None:
            self._teach(self.lessons, scored, echo_L)
        if not policy.layers_apart:
            self._score_all(scored)
        return scored

    def _teach(self, lessons: Lessons, scored: Scored, echo_L: Tensor) -> None:
        stop = scored.score.region.stop
        (room,) = self._room(scored.pages_LHB[:1])
        whole = replace(scored, first_value=0)
        for layer, peak_HT in enumerate(echo_L):
            key_HTD, value_HTD = self._read(whole, layer, room)
            lessons.add(layer, key_HTD[:, :stop], value_HTD[:, :stop], peak_HT[:, :stop])

    def _scores_by(self, scored: Scored, policy: Policy) -> list[LayerScores]:
        other = replace(scored, policy=policy, layers=[], read=[])
        self._score_all(other)
        return other.layers

    def _score_all(self, scored: Scored) -> None:
        """Layers share one budget: every one is scored before the first is packed. What was read for the one is kept
        for the other, unless that takes too much memory."""
        room = self._room(scored.pages_LHB)
        for layer in range(len(scored.pages_LHB)):
            tokens = self._read(scored, layer, room[layer % len(room)])
            scored.layers.append(self._score_layer(scored, layer, tokens))
            if len(room) > 1:
                scored.read.append(tokens)
        self._in_scratch = scored

    def _score_layer(self, scored: Scored, layer: int, tokens: Tokens) -> LayerScores:
        key_HTD, value_HTD = tokens
        policy, region = scored.policy, scored.score.region
        skipped = key_HTD.shape[1] - value_HTD.shape[1]
        return self.weigh(
            policy,
            layer,
            (key_HTD[:, : region.stop], value_HTD[:, : region.stop - skipped]),
            seen_A=scored.seen_A,
            echo_HS=None if scored.echo_L is None else scored.echo_L[layer],
            window=region.window,
            keep_ratio=scored.score.keep,
            evictable=region.tokens,
        )

    def weigh(
        self,
        policy: Policy,
        layer: int,
        tokens: Tokens,
        *,
        seen_A: Tensor | None = None,
        echo_HS: Tensor | None = None,
        first_token: int = 0,
        **more: Any,
    ) -> LayerScores:
        """`score_layer` of this worker's heads, by each who reads the layer's cache. seen_A: of each reader the
        window's queries, or accumulated attention. more: as there."""
        key_HSD, value_HSD = tokens
        if policy.learned:
            assert self.learned is not None, f"{policy.name} needs a learned score"
            echo_HS = self.learned.peaks(layer, key_HSD, value_HSD, first_token)
        mass_A, query_A = (seen_A, None) if policy.accumulates else (None, seen_A)
        scores = [
            score_layer(
                policy,
                layer=layer,
                query_WQD=None if query_A is None else query_A[reader],
                mass_HS=None if mass_A is None else mass_A[reader],
                echo_HS=echo_HS,
                key_HSD=key_HSD,
                value_HSD=value_HSD,
                output_QDM=self._projections.slices(reader) if policy.needs_projection else None,
                factor_QDC=self._projections.factor(reader) if policy.value_weight == "l2-gram" else None,
                **self._softmax_A[reader].arguments,
                reduce_heads=self._reduce_heads,
                first_head=self._rank[0] * len(key_HSD),
                first_token=first_token,
                **more,
            )
            for reader in self._readers.of_layer[layer]
        ]
        return LayerScores.largest(scores)

    def _pack(self, scored: Scored | ScoredAgain, eviction: Eviction) -> Selections:
        if eviction.packing.format.quantised and self._runtime.quantised is None:
            raise IncompleteError("the functions for such widths could not be compiled, as was said at start")
        if isinstance(scored, ScoredAgain):
            return self._repeats.pack(scored, eviction)
        if scored.policy.layers_apart:
            parts = self._pack_layer_by_layer(scored, eviction)
        else:
            parts = self._pack_all(scored, eviction)
        if scored.score.later is not None:
            self._repeats.note(eviction, parts, lambda layer: self._region_tokens(scored, layer))
        self._runtime.place(eviction, Placed(torch.stack([part.pages_LH for part in parts])))
        return parts

    def _pack_all(self, scored: Scored, eviction: Eviction) -> Selections:
        parts = self._select(scored, scored.layers, eviction)
        at_hand = bool(scored.read) and self._in_scratch is scored
        room = self._room(scored.pages_LHB[:1]) if not at_hand else None
        target = self._view.of_packed(torch.tensor(eviction.packing.blocks))
        targets = target.split([len(part.tokens_PN) for part in parts])
        pages = [part.pages_LH.sum(dim=1).tolist() for part in parts]
        tokens = [part.tokens_PN.split(each) for part, each in zip(parts, pages, strict=True)]
        places = [target_P.split(each) for target_P, each in zip(targets, pages, strict=True)]
        for layer in range(len(scored.pages_LHB)):
            read = scored.read[layer] if room is None else self._read(scored, layer, room[0])
            for c, part in enumerate(parts):
                page_class = eviction.packing.format.parts[c].page_class
                self._compact(read, part.pages_LH[layer], tokens[c][layer], places[c][layer], page_class)
        return parts

    def _pack_layer_by_layer(self, scored: Scored, eviction: Eviction) -> Selections:
        """Each layer has its own budget, as large as every other's: it is read once, scored, and packed."""
        layers, packing = len(scored.pages_LHB), eviction.packing
        (room,), chosen = self._room(scored.pages_LHB[:1]), []
        target = self._view.of_packed(torch.tensor(packing.blocks))
        for layer in range(layers):
            read = self._read(scored, layer, room)
            parts, before = self._select(scored, [self._score_layer(scored, layer, read)], eviction), 0
            for part, selection in zip(packing.format.parts, parts, strict=True):
                count = len(selection.tokens_PN)
                target_P = target[before + layer * count : before + (layer + 1) * count]
                self._compact(read, selection.pages_LH[0], selection.tokens_PN, target_P, part.page_class)
                before += layers * count
            chosen.append(parts)
        return tuple(
            Selection(torch.cat([p.pages_LH for p in same]), torch.cat([p.tokens_PN for p in same]))
            for same in zip(*chosen, strict=True)
        )

    def _region_tokens(self, scored: Scored, layer: int) -> Tokens:
        """Those of a layer that were chosen from."""
        start, last = scored.score.region.tokens
        (room,) = self._room(scored.pages_LHB[:1])
        skipped = scored.score.region.shared_blocks
        key_HTD, value_HTD = self._read(replace(scored, first_value=skipped), layer, room)
        return key_HTD[:, start:last], value_HTD[:, : last - start]

    def _select(self, scored: Scored, layers: list[LayerScores], eviction: Eviction) -> Selections:
        return select_packed(
            scored.policy,
            layers,
            eviction.packing.format,
            head_pages=eviction.packing.head_pages,
            forced_tokens=eviction.region.forced_tokens,
            evictable=eviction.region.tokens,
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
        self._in_scratch = None
        if size > most:
            return data.new_empty(shape)
        if size > self._scratch.numel():
            self._scratch = data.new_empty(size)
        return self._scratch[:size].view(shape)

    def _read(self, scored: Scored, layer: int, room_2PX: Tensor) -> Tokens:
        """(K `[H, B*N, D]`, V `[H, (B-first)*N, D]`) of a layer, tokens in their order."""
        pages_HB, first = scored.pages_LHB[layer], scored.first_value * self._view.pages_per_block
        key_PND = self._codec.read_keys(self._view.data, pages_HB.flatten(), room_2PX[0])
        pages_P = pages_HB[:, first:].flatten()
        value_PND = self._codec.read_values(self._view.data, pages_P, room_2PX[1, : len(pages_P)])
        heads, width = len(pages_HB), key_PND.shape[2]
        return key_PND.view(heads, -1, width), value_PND.view(heads, -1, width)

    def _compact(self, tokens: Tokens, pages_H: Tensor, tokens_PN: Tensor, target_P: Tensor, page_class: str) -> None:
        """Copy a layer's selected tokens (int32 `[P, N]`, `pages_H` pages for each head) into its packed pages."""
        head_P = torch.arange(self._view.num_kv_heads).repeat_interleave(pages_H.long())
        if CLASSES[page_class].quantised:
            assert self._runtime.quantised is not None
            self._runtime.quantised.pack(
                *tokens, tokens_PN.contiguous(), head_P.int(), target_P.contiguous(), page_class
            )
            return
        most = tokens[0].shape[1]
        packed = []
        for part_HTD in tokens:
            held = part_HTD.shape[1]  # the last ones of all
            row_X = (head_P[:, None] * held + (tokens_PN - (most - held))).flatten()
            packed.append(part_HTD.flatten(0, 1).index_select(0, row_X).unflatten(0, tokens_PN.shape))
        key_PND, value_PND = packed
        self._view.data.index_copy_(0, target_P, self._codec.pack(key_PND, value_PND))
