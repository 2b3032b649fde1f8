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
from vllm_defensive.policy import (
    PRESETS,
    Attention,
    LayerScores,
    Policy,
    ReduceHeads,
    score_layer,
    settle,
)
from vllm_defensive.settings.engine import EvictionConfig
from vllm_defensive.worker.cuda import launches
from vllm_defensive.worker.cuda.launches import EchoRow
from vllm_defensive.worker.cuda.prompt import LayerScales, Prompt, Scored, kernels_know
from vllm_defensive.worker.cuda.runtime import CUDARuntime, Placed
from vllm_defensive.worker.evictor import Evictor, Selections
from vllm_defensive.worker.learned import Lessons
from vllm_defensive.worker.projections import Projections
from vllm_defensive.worker.report import layer_deciles
from vllm_defensive_kernels import RaggedTokens

LONG_PROMPT = 8192 + 256  # `window.tiling` changes at 8192 scored tokens


class CUDAEvictor(Evictor):
    """Evictions on one worker."""

    def __init__(
        self,
        config: EvictionConfig,
        runtime: CUDARuntime,
        scales: Sequence[LayerScales],
        projections: Projections,
        rank: tuple[int, int] = (0, 1),
        reduce_heads: ReduceHeads | None = None,
    ) -> None:
        """scales: one a layer. rank, reduce_heads: see `EvictionWorker`."""
        pages = runtime.pages
        decile_L = layer_deciles(pages.num_layers, pages.key_PND.device)
        super().__init__(config, projections, decile_L, rank, reduce_heads)
        self._runtime = runtime
        self._pages = pages
        self._scales = scales
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
                window_LWQD = self._runtime.windows.blank() if PRESETS[policy].needs_window else None
                scored = self._weigh(score, window_LWQD, peak_LHS)
                for format, packed in budgets:
                    self._copy(scored, Packing(region, (0,) * packed, format))
        looks = {PRESETS[policy].reconstruction for policy in policies} - {"none"}
        for normalised in sorted(looks) if max_tokens > self._config.window else ():
            self._warm_up_echoes(normalised, max_tokens)

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
        launches.reconstruct(row, query_TQD, pages, 0, scale=scales.logits, key_scale=scales.key)

    def _score(self, score: Score) -> Scored:
        policy, peak_LHS, window_LWQD = PRESETS[score.policy], None, None
        if policy.reconstructs:
            peak_LHS = self._runtime.reconstructions.pop(score.request_id, score.region)
            if self.lessons is not None:
                self._teach(self.lessons, score, peak_LHS)
        if policy.needs_window:
            window_LWQD = self._runtime.windows.pop(score.request_id)
        return self._weigh(score, window_LWQD, peak_LHS)

    def _weigh(self, score: Score, window_LWQD: Tensor | None, peak_LHS: Tensor | None) -> Scored:
        device, region = self._pages.key_PND.device, score.region
        table_1B = compat.to_device(score.source_blocks, device)[None]
        policy, scored = PRESETS[score.policy], region.stop - region.window
        value_table_1B, value_tokens = table_1B, tokens = table_1B, RaggedTokens.of([scored], device)
        if first_value := policy.first_value(region.shared_blocks):
            # A copy, as kernels are compiled for where a tensor begins: anew for the middle of one.
            value_table_1B = table_1B[:, first_value:].clone()
            value_tokens = RaggedTokens.of([max(scored - first_value * region.block_tokens, 0)], device)
        prompt = Prompt(score, policy, window_LWQD, peak_LHS, table_1B, tokens, value_table_1B, value_tokens)
        return Scored(prompt, self._scores(prompt))

    def _scores_by(self, scored: Scored, policy: Policy) -> list[LayerScores]:
        window_LWQD = scored.prompt.window_LWQD if policy.needs_window else None
        return self._scores(replace(scored.prompt, policy=policy, window_LWQD=window_LWQD))

    def _teach(self, lessons: Lessons, score: Score, peak_LHS: Tensor) -> None:
        table_1B = compat.to_device(score.source_blocks, self._pages.key_PND.device)[None]
        for layer, (peak_HS, scales) in enumerate(zip(peak_LHS, self._scales, strict=True)):
            parts = (self._pages.key_PND, scales.key), (self._pages.value_PND, scales.value)
            key_HSD, value_HSD = (self._read(table_1B, score.region.stop, layer, *part) for part in parts)
            lessons.add(layer, key_HSD, value_HSD, peak_HS)

    def _pack(self, scored: Scored, eviction: Eviction) -> Selections:
        assert eviction.packing.format in self._formats, "as every request's fields were checked"
        selections, fresh_K = self._copy(scored, eviction.packing)
        offsets = tuple((selection.offset_O, len(selection.tokens_PN)) for selection in selections)
        self._runtime.place(eviction, Placed(offsets, fresh_K))
        return selections

    def _copy(self, scored: Scored, packing: Packing) -> tuple[Selections, Tensor]:
        """Select and copy. Returns what was chosen, and the fresh blocks' ids on the device."""
        fresh_K = compat.to_device(packing.blocks, self._pages.key_PND.device)
        selections = launches.choose(scored.prompt.policy, scored.layers, packing)
        launches.pack(self._pages, scored.prompt.table_1B[0], selections, fresh_K, packing)
        return selections, fresh_K

    # -- scores -------------------------------------------------------------------------------------------------------

    def _scores(self, prompt: Prompt) -> list[LayerScores]:
        """Of every layer, by the kernels where they know the formula."""
        layers = range(self._pages.num_layers)
        if not kernels_know(prompt.policy):
            return [self._score_in_torch(prompt, layer) for layer in layers]
        weighed_L = [prompt.policy.value_weight != "none" and self._projections.found(layer) for layer in layers]
        # A launch takes one scale of each kind, and layers with value norms are not weighed with layers that have none.
        apart = len({(s.key, s.logits) for s in self._scales}) > 1 or len(set(weighed_L)) > 1
        scores = []
        for group in launches.layer_groups(self._pages, prompt.tokens.total, apart=apart):
            scores += self._score_some(prompt, group, weighed_L[group.start])
        return scores

    def _score_some(self, prompt: Prompt, group: slice, weighed: bool) -> list[LayerScores]:
        """A group of layers, their attention in one launch. weighed: by the norms of their values."""
        policy, peak_LHT = prompt.policy, self._peaks(prompt, group)
        if prompt.window_LWQD is None:
            assert peak_LHT is not None, "of policies whose formula the kernels have"
            attention = Attention(peak_LHT)
        else:
            attention = replace(self._observe(prompt, prompt.window_LWQD, group), echo_HT=peak_LHT)
        return settle(
            policy,
            attention,
            self._norms(prompt, range(group.start, group.stop)) if weighed else None,
            window=prompt.score.region.window,
            keep_ratio=prompt.score.keep,
            evictable=prompt.score.region.tokens,
            reduce_heads=self._reduce_heads,
        ).apart()

    def _observe(self, prompt: Prompt, window_LWQD: Tensor, group: slice) -> Attention:
        """What the window's queries say of a group of layers."""
        scales = self._scales[group.start]
        observed = launches.observe(
            prompt.policy,
            window_LWQD,
            self._pages,
            group,
            prompt.table_1B,
            prompt.tokens,
            scale=scales.logits,
            key_scale=scales.key,
        )
        return Attention.of(prompt.policy, observed.score_LHT, observed.mean_LHT, prompt.score.region.window)

    def _peaks(self, prompt: Prompt, group: slice) -> Tensor | None:
        """What a second look saw, or would see, in a group of layers: fp32 `[L, H, T]`; None without either."""
        if prompt.peak_LHS is not None:
            return prompt.peak_LHS[group, :, : prompt.tokens.total]
        if not prompt.policy.learned:
            return None
        assert self.learned is not None, f"{prompt.policy.name} needs a learned score"
        shape = (group.stop - group.start, self._pages.num_kv_heads, prompt.tokens.total)
        peak_LHT = torch.empty(shape, dtype=torch.float32, device=prompt.table_1B.device)
        for layer, peak_HT in enumerate(peak_LHT, group.start):
            scales = self._scales[layer]
            launches.foretell(
                self.learned.weight_LHX[layer],
                self.learned.rotations[layer],
                self._pages,
                layer,
                prompt.table_1B,
                prompt.tokens,
                key_scale=scales.key,
                value_scale=scales.value,
                out_HT=peak_HT,
            )
        return peak_LHT.mul_(self.learned.balance)

    def _norms(self, prompt: Prompt, layers: range) -> Tensor:
        """Value norms of neighbouring layers, fp32 `[L, H, T]`."""
        gram, tokens = prompt.policy.value_weight == "l2-gram", prompt.value_tokens
        shape = (len(layers), self._pages.num_kv_heads, tokens.total)
        norm_LHT = torch.empty(shape, dtype=torch.float32, device=prompt.table_1B.device)
        for layer, norm_HT in zip(layers, norm_LHT, strict=True):
            # One after the other: what slices of quantised weights are written to is the next layer's, too.
            weights = self._projections.factor(layer) if gram else self._projections.slices(layer)
            assert weights is not None, "of layers whose projections were found"
            launches.weigh(
                prompt.policy,
                self._pages,
                layer,
                prompt.value_table_1B,
                tokens,
                weights,
                value_scale=self._scales[layer].value,
                out_HT=norm_HT,
            )
        return norm_LHT

    def _score_in_torch(self, prompt: Prompt, layer: int) -> LayerScores:
        """For policies that read no tensor of the model, and formulas that the kernels do not have."""
        policy, scales = prompt.policy, self._scales[layer]
        window_LWQD, peak_LHS = prompt.window_LWQD, prompt.peak_LHS
        where = prompt.table_1B, prompt.score.region.stop, layer
        key_HSD = self._read(*where, self._pages.key_PND, scales.key if policy.needs_keys else None)
        value_HSD = self._read(*where, self._pages.value_PND, scales.value if policy.needs_values else None)
        echo_HS = None if peak_LHS is None else peak_LHS[layer]
        if policy.learned:
            assert self.learned is not None, f"{policy.name} needs a learned score"
            echo_HS = self.learned.peaks(layer, key_HSD, value_HSD)
        return score_layer(
            policy,
            layer=layer,
            query_WQD=window_LWQD[layer] if window_LWQD is not None and policy.needs_queries else None,
            echo_HS=echo_HS,
            key_HSD=key_HSD,
            value_HSD=value_HSD,
            output_QDM=self._projections.slices(layer) if policy.needs_projection else None,
            factor_QDC=self._projections.factor(layer) if policy.value_weight == "l2-gram" else None,
            scale=scales.logits,
            keep_ratio=prompt.score.keep,
            evictable=prompt.score.region.tokens,
            reduce_heads=self._reduce_heads,
            window=prompt.score.region.window,
            first_head=self._rank[0] * self._pages.num_kv_heads,
        )

    def _read(self, table_1B: Tensor, stop: int, layer: int, data_PND: Tensor, scale: float | None) -> Tensor:
        """Keys or values of a prompt, `[H, S, D]`, those of fp8 in fp32 and multiplied by `scale`; without one, of
        that shape and no more: nobody looks at them."""
        heads = self._pages.num_kv_heads
        if scale is None:
            return data_PND.new_empty(1).expand(heads, stop, self._pages.head_size)
        heads_H1 = torch.arange(heads, device=data_PND.device)[:, None]
        page_HB = self._pages.page_of(layer, heads_H1, table_1B)
        data_HSD = data_PND[page_HB].flatten(1, 2)[:, :stop]
        return data_HSD if data_HSD.dtype.itemsize > 1 else data_HSD.float() * scale
