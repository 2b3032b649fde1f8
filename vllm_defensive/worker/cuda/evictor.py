"""Carry out an eviction with the kernels: window queries -> scores -> pages and tokens -> packed blocks.

Everything is queued on the stream of the forward pass that completed the prefill, and nothing is read back: how many
pages there are follows from the plan, and which they are stays on the device. An audit, which is asked for, does wait.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_defensive.compat import worker as compat
from vllm_defensive.counts import WorkerReport
from vllm_defensive.packing import WIDTHS, Format, Packing
from vllm_defensive.plan import Eviction, Score
from vllm_defensive.policy import PRESETS, ReduceHeads, Selection
from vllm_defensive.settings.engine import EvictionConfig
from vllm_defensive.worker.cuda import launches
from vllm_defensive.worker.cuda.again import Candidates, Kept
from vllm_defensive.worker.cuda.launches import EchoRow
from vllm_defensive.worker.cuda.prompt import LayerScales, Scored, ScoredAgain
from vllm_defensive.worker.cuda.runtime import CUDARuntime, Placed
from vllm_defensive.worker.cuda.scoring import CUDAScorer
from vllm_defensive.worker.evictor import Selections
from vllm_defensive.worker.learned import Lessons
from vllm_defensive.worker.projections import Projections
from vllm_defensive.worker.readers import Readers
from vllm_defensive.worker.report import layer_deciles

LONG_PROMPT = 8192 + 256  # `window.tiling` changes at 8192 scored tokens


class CUDAEvictor(CUDAScorer):
    """Evictions on one worker."""

    def __init__(
        self,
        config: EvictionConfig,
        runtime: CUDARuntime,
        scales: Sequence[LayerScales],
        readers: Readers,
        projections: Projections,
        rank: tuple[int, int] = (0, 1),
        reduce_heads: ReduceHeads | None = None,
    ) -> None:
        """scales: one a reader. rank, reduce_heads: see `EvictionWorker`."""
        pages = runtime.pages
        decile_L = layer_deciles(pages.num_layers, pages.key_PND.device)
        super().__init__(config, projections, decile_L, rank, reduce_heads)
        self._runtime = runtime
        self._pages = pages
        self._cache_A = torch.tensor(readers.caches, device=pages.key_PND.device)
        self._reader_pages = replace(pages, layer_page_L=pages.layer_page_L[self._cache_A], layer_pages=None)
        self._scales, self._readers = scales, readers
        # Per step with evictions: start, end, and pages by decile in host memory, there once the end is reached
        self._queued: deque[tuple[Any, Any, np.ndarray]] = deque()

    def _start(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _finish(self, started: Any, decile_pages: Tensor) -> None:
        # Into pinned memory, and nobody waits.
        pages = decile_pages.to("cpu", non_blocking=True).numpy()
        self._queued.append((started, self._start(), pages))

    def take_report(self) -> WorkerReport:
        """Of the evictions that the device has finished since the last call; the others are for a later one."""
        report = super().take_report()
        while self._queued and self._queued[0][1].query():
            start, end, decile_pages = self._queued.popleft()
            report.add(int(start.elapsed_time(end) * 1000), decile_pages.tolist())
        return report

    def warm_up(self, max_tokens: int) -> None:
        """Compile the kernels of every policy that a request may have, and of everything that it may be packed in, on
        vLLM's null block, which nobody reads: no prompt should wait for a compiler, and nobody make others wait. Long
        prompts run variants of their own.
        """
        # While one is being learned, there is no learned score yet.
        policies = [name for name in self._config.served if self.learned is not None or not PRESETS[name].learned]
        lengths = (max(self._config.min_tokens, 8 * self._config.window), LONG_PROMPT)
        for policy, stop in itertools.product(policies, lengths):
            region = self._config.region(stop, 0, self._pages.page_tokens)
            budgets = [(format, self._config.budget_blocks(region, policy, format=format)) for format in self._formats]
            if budgets[0][1] and stop <= max_tokens:
                source = (0,) * -(-stop // region.block_tokens)
                score = Score("warm-up", policy, self._config.keep, region, source)
                peak_LHS = self._runtime.reconstructions.blank(stop) if PRESETS[policy].reconstructs else None
                window_AWQD = self._runtime.windows.blank() if PRESETS[policy].needs_window else None
                scored = self._weigh(score, window_AWQD, peak_LHS)
                for format, packed in budgets:
                    self._copy(scored, Packing(region, (0,) * packed, format))
        looks = {PRESETS[policy].reconstruction for policy in policies} - {"none"}
        for normalised in sorted(looks) if max_tokens > self._config.window else ():
            self._warm_up_echoes(normalised, max_tokens)
        if self._config.again_or_late and lengths[0] <= max_tokens:
            able = {PRESETS[policy].evicts_answers_by for policy in policies if self._config.evicts_again(policy)}
            for policy in sorted(filter(None, able)):
                self._warm_up_again(policy, lengths[0])

    @property
    def _formats(self) -> list[Format]:
        """All that requests may be packed in, 16 bits first."""
        served, shape = self._runtime.state.classes, self._pages.page_shape
        classes_of = {name: [page_class for page_class, _ in parts] for name, parts in WIDTHS.items()}
        # No pages as the cache has them beside others: `compact` fills all pages there are.
        one_kind = {name: own for name, own in classes_of.items() if own == ["16"] or "16" not in own}
        return [Format.of(name, shape) for name, own in one_kind.items() if set(own) <= set(served)]

    def _warm_up_echoes(self, normalised: str, max_tokens: int) -> None:
        """Of as long a prompt as there may be: only then a launch shares its keys out, and merges what comes of it."""
        query_TQD = self._runtime.windows.blank()[0]
        document, pages = max_tokens - len(query_TQD), self._pages
        blocks = -(-max_tokens // pages.page_tokens)
        table_1B = torch.zeros(1, blocks, dtype=torch.int32, device=pages.key_PND.device)
        peak_LHS = self._runtime.reconstructions.blank(document)
        row = EchoRow(slice(0, len(query_TQD)), document, table_1B, peak_LHS, (0, document), normalised, 0)
        scales = self._scales[0]
        launches.reconstruct(row, query_TQD, pages, 0, key_scale=scales.key, **scales.softmax.arguments)

    def _warm_up_again(self, policy: str, stop: int) -> None:
        """A prompt of so many tokens is packed, and then once more with two blocks behind it."""
        first, since = self._config.region(stop, 0, self._pages.page_tokens), None
        packed = self._config.budget_blocks(first, policy)
        for blocks in (first.full_blocks, first.full_blocks + 2) if packed else ():
            region = self._config.region(blocks * first.block_tokens, 0, self._pages.page_tokens)
            behind = region.full_blocks - (since.full_blocks if since is not None else 0)
            score = Score("warm-up", policy, self._config.keep, region, (0,) * behind, policy, since)
            packing = Packing(region, (0,) * packed, region.plain)
            _, kept = self._copy_again(self._score_again(score), packing)
            self._known.note(Eviction(score, packing), kept)
            since = region
        self.forget(["warm-up"])

    def _score(self, score: Score) -> Scored | ScoredAgain:
        policy, peak_LHS, window_AWQD = PRESETS[score.policy], None, None
        if score.since is not None or score.later == score.policy:
            return self._score_again(score)
        if policy.reconstructs:
            peak_LHS = self._runtime.reconstructions.pop(score.request_id, score.region)
            if self.lessons is not None:
                self._teach(self.lessons, score, peak_LHS)
        if policy.needs_window:
            window_AWQD = self._runtime.windows.pop(score.request_id)
        return self._weigh(score, window_AWQD, peak_LHS)

    def _teach(self, lessons: Lessons, score: Score, peak_LHS: Tensor) -> None:
        table_1B = compat.to_device(score.source_blocks, self._pages.key_PND.device)[None]
        for layer, (peak_HS, reader) in enumerate(zip(peak_LHS, self._readers.own, strict=True)):
            scales = self._scales[reader]
            parts = (self._pages.key_PND, scales.key), (self._pages.value_PND, scales.value)
            key_HSD, value_HSD = (self._read(table_1B, score.region.stop, layer, *part) for part in parts)
            lessons.add(layer, key_HSD, value_HSD, peak_HS)

    def _score_again(self, score: Score) -> ScoredAgain:
        """Weigh what is not packed yet of a request that is evicted by one policy again and again. No window is read,
        for what lasts goes by none."""
        region, since, policy = score.region, score.since, PRESETS[score.policy]
        if since is None:
            kept, begin = self._nothing_kept(), region.shared_blocks
            behind = score.source_blocks[begin : region.full_blocks]
        else:
            kept, begin = self._known.of(score.request_id), since.full_blocks
            behind = score.source_blocks[: region.full_blocks - begin]  # without the tail
        # Kernels index into it, and read none of it where nothing is behind: vLLM's null block stands there, then.
        table_B = compat.to_device(behind or (0,), self._pages.key_PND.device)
        score_RB = self._lasting(score, policy) if behind else kept.score_PN.new_empty(len(kept.pages_R), 0)
        candidates = Candidates(kept, begin * region.block_tokens, score_RB)
        return ScoredAgain(policy, table_B, candidates)

    def _nothing_kept(self) -> Kept:
        rows = self._pages.num_layers * self._pages.num_kv_heads
        return Kept.nothing(rows, self._pages.page_tokens, self._pages.key_PND.device)

    def _pack(self, scored: Scored | ScoredAgain, eviction: Eviction) -> Selections:
        assert eviction.packing.format in self._formats, "as every request's fields were checked"
        if isinstance(scored, ScoredAgain):
            selection, kept = self._copy_again(scored, eviction.packing)
            self._known.note(eviction, kept)
            placed = Placed(((kept.source.offset_O, len(kept.position_PN)),), kept.source.fresh_K)
            self._runtime.place(eviction, placed)
            return (selection,)
        selections, fresh_K = self._copy(scored, eviction.packing)
        if scored.prompt.score.later is not None:
            self._note_kept(scored, eviction, selections[0], fresh_K)
        offsets = tuple((selection.offset_O, len(selection.tokens_PN)) for selection in selections)
        self._runtime.place(eviction, Placed(offsets, fresh_K))
        return selections

    def _copy(self, scored: Scored, packing: Packing) -> tuple[Selections, Tensor]:
        """Select and copy. Returns what was chosen, and the fresh blocks' ids on the device."""
        fresh_K = compat.to_device(packing.blocks, self._pages.key_PND.device)
        selections = launches.choose(scored.prompt.policy, scored.layers, packing)
        launches.pack(self._pages, scored.prompt.table_1B[0], selections, fresh_K, packing)
        return selections, fresh_K

    def _copy_again(self, scored: ScoredAgain, packing: Packing) -> tuple[Selection, Kept]:
        """The same, of what is packed and what lies behind."""
        layers, policy, candidates = self._pages.num_layers, scored.policy, scored.candidates
        fresh_K = compat.to_device(packing.blocks, self._pages.key_PND.device)
        offset_O, place_PN = candidates.choose(policy, packing, layers)
        launches.pack_again(self._pages, scored.table_B, candidates.kept.source, offset_O, place_PN, fresh_K)
        kept = candidates.follow(policy, packing, layers, offset_O, place_PN, fresh_K)
        pages_R = kept.pages_R
        pages_R[-1] += len(place_PN) - offset_O[-1]  # pages that are nobody's stand behind the last head's
        return Selection(pages_R.view(layers, -1), kept.position_PN), kept

    def _note_kept(self, scored: Scored, eviction: Eviction, chosen: Selection, fresh_K: Tensor) -> None:
        """A request will be evicted again, by another policy: keep positions and scores by that one of what is
        packed."""
        score, policy = scored.prompt.score, scored.prompt.policy
        assert score.later is not None
        first, layers = eviction.region.tokens[0], self._pages.num_layers
        candidates = Candidates(self._nothing_kept(), first, self._lasting(score, PRESETS[score.later]))
        kept = candidates.follow(policy, eviction.packing, layers, chosen.offset_O, chosen.tokens_PN - first, fresh_K)
        self._known.note(eviction, kept)
