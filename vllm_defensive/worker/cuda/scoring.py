"""From one request's tokens in the cache to their scores, by the kernels where they know the formula."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from vllm_defensive.compat import worker as compat
from vllm_defensive.plan import Score
from vllm_defensive.policy import PRESETS, Attention, LayerScores, Policy, score_layer, settle
from vllm_defensive.worker.cuda import launches
from vllm_defensive.worker.cuda.prompt import LayerScales, Prompt, Scored, kernels_know
from vllm_defensive.worker.evictor import Evictor
from vllm_defensive.worker.readers import Readers
from vllm_defensive_kernels import PagedKV, RaggedTokens


class CUDAScorer(Evictor):
    """The half of the CUDA evictor that scores."""

    _pages: PagedKV
    _reader_pages: PagedKV
    """The same, with each reader as a layer of its own."""
    _readers: Readers
    _cache_A: Tensor
    """int64, `_readers.caches` on the device."""
    _scales: Sequence[LayerScales]
    """Of each reader."""

    def _weigh(self, score: Score, window_AWQD: Tensor | None, peak_LHS: Tensor | None) -> Scored:
        region = score.region
        prompt = self._prompt(score, PRESETS[score.policy], region.stop, region.window, region.tokens)
        prompt = replace(prompt, window_AWQD=window_AWQD, peak_LHS=peak_LHS)
        return Scored(prompt, self._scores(prompt))

    def _prompt(
        self, score: Score, policy: Policy, total: int, window: int, evictable: tuple[int, int], first_token: int = 0
    ) -> Prompt:
        """Of the first `total` tokens in the blocks of `score`; the rest: see `Prompt`."""
        device, block_tokens = self._pages.key_PND.device, score.region.block_tokens
        table_1B = compat.to_device(score.source_blocks, device)[None]
        scored = total - window
        value_table_1B, value_tokens = table_1B, tokens = table_1B, RaggedTokens.of([scored], device)
        if first_value := policy.first_value(evictable[0] // block_tokens):
            # A copy, as kernels are compiled for where a tensor begins: anew for the middle of one.
            value_table_1B = table_1B[:, first_value:].clone()
            value_tokens = RaggedTokens.of([max(scored - first_value * block_tokens, 0)], device)
        places = table_1B, tokens, value_table_1B, value_tokens
        return Prompt(score, policy, None, None, *places, window, evictable, first_token)

    def _lasting(self, score: Score, policy: Policy) -> Tensor:
        """Scores, that say the same at any time, of all tokens that are chosen from and are not packed yet. fp32
        `[L*H, B]`."""
        region = score.region
        first = 0 if score.since is None else score.since.full_blocks * region.block_tokens
        start, stop = max(region.tokens[0] - first, 0), region.tokens[1] - first
        # The first tokens of the text, and the window, are for who chooses.
        prompt = self._prompt(score, replace(policy, sinks=0), stop, 0, (start, stop), first)
        return torch.cat([layer.scores_HE for layer in self._scores(prompt)])

    def _scores_by(self, scored: Scored, policy: Policy) -> list[LayerScores]:
        window_AWQD = scored.prompt.window_AWQD if policy.needs_window else None
        return self._scores(replace(scored.prompt, policy=policy, window_AWQD=window_AWQD))

    def _scores(self, prompt: Prompt) -> list[LayerScores]:
        """Of every layer, by the kernels where they know the formula."""
        return self._readers.largest(self._scores_of_readers(prompt))

    def _scores_of_readers(self, prompt: Prompt) -> list[LayerScores]:
        readers = range(len(self._readers))
        if not kernels_know(prompt.policy):
            return [self._score_in_torch(prompt, reader) for reader in readers]
        weighed_A = [prompt.policy.value_weight != "none" and self._projections.found(reader) for reader in readers]
        # A launch takes one scale of each kind, and layers with value norms are not weighed with layers that have none.
        apart = len({scales.of_a_launch for scales in self._scales}) > 1 or len(set(weighed_A)) > 1
        scores = []
        for group in launches.layer_groups(self._reader_pages, prompt.tokens.total, apart=apart):
            scores += self._score_some(prompt, group, weighed_A[group.start])
        return scores

    def _score_some(self, prompt: Prompt, group: slice, weighed: bool) -> list[LayerScores]:
        """A group of readers, their attention in one launch. weighed: by the norms of their values."""
        policy, peak_LHT = prompt.policy, self._peaks(prompt, group)
        if prompt.window_AWQD is None:
            assert peak_LHT is not None, "of policies whose formula the kernels have"
            attention = Attention(peak_LHT)
        else:
            attention = replace(self._observe(prompt, prompt.window_AWQD, group), echo_HT=peak_LHT)
        return settle(
            policy,
            attention,
            self._norms(prompt, range(group.start, group.stop)) if weighed else None,
            window=prompt.window,
            keep_ratio=prompt.score.keep,
            evictable=prompt.evictable,
            reduce_heads=self._reduce_heads,
        ).apart()

    def _observe(self, prompt: Prompt, window_AWQD: Tensor, group: slice) -> Attention:
        """What the window's queries say of a group of readers."""
        scales = self._scales[group.start]
        voids = [s.softmax.void_Q for s in self._scales[group] if s.softmax.void_Q is not None]
        observed = launches.observe(
            prompt.policy,
            window_AWQD,
            self._reader_pages,
            group,
            prompt.table_1B,
            prompt.tokens,
            scale=scales.softmax.scale,
            key_scale=scales.key,
            cap=scales.softmax.cap,
            void_LQ=torch.stack(voids) if voids else None,
        )
        return Attention.of(prompt.policy, observed.score_LHT, observed.mean_LHT, prompt.window)

    def _peaks(self, prompt: Prompt, group: slice) -> Tensor | None:
        """What a second look saw, or would see, in a group of readers: fp32 `[L, H, T]`; None without either."""
        caches = self._readers.caches[group]
        if prompt.peak_LHS is not None:
            # Mostly a cache has one reader: no copy then.
            apart = len(set(caches)) == len(caches)
            beside_LHS = prompt.peak_LHS[caches[0] : caches[-1] + 1] if apart else prompt.peak_LHS[self._cache_A[group]]
            return beside_LHS[..., : prompt.tokens.total]
        if not prompt.policy.learned:
            return None
        assert self.learned is not None, f"{prompt.policy.name} needs a learned score"
        if prompt.first_token:
            return self._peaks_behind(prompt, group).mul_(self.learned.balance)
        shape = (group.stop - group.start, self._pages.num_kv_heads, prompt.tokens.total)
        peak_LHT = torch.empty(shape, dtype=torch.float32, device=prompt.table_1B.device)
        for layer, scales, peak_HT in zip(caches, self._scales[group], peak_LHT, strict=True):
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

    def _peaks_behind(self, prompt: Prompt, group: slice) -> Tensor:
        """What would be seen in tokens that are not a text's first, page by page: layers that turn their keys alike,
        and lie beside each other, in one launch. fp32 `[L, H, T]`."""
        assert self.learned is not None, "as whoever asks has seen"
        learned, pages = self.learned, self._pages
        page_AHB = self._reader_pages.of_blocks(prompt.table_1B[0].long())
        _, heads, blocks = page_AHB.shape
        device = page_AHB.device
        row_AHB = (self._cache_A[:, None] * heads + torch.arange(heads, device=device)).int()[..., None]
        row_AHB = row_AHB.repeat(1, 1, blocks)
        end = prompt.first_token + blocks * pages.page_tokens
        position_BN = torch.arange(prompt.first_token, end, dtype=torch.int32, device=device).view(blocks, -1)
        found = []
        for (_, key_scale, value_scale), same in groupby(range(group.start, group.stop), self._reads_like):
            run = list(same)
            some = slice(run[0], run[-1] + 1)
            score_PN = launches.foretell_pages(
                learned.weight_LHX.flatten(0, 1),
                learned.rotations[self._readers.caches[run[0]]],
                pages,
                page_AHB[some].flatten(),
                row_AHB[some].flatten(),
                position_BN.repeat(len(run) * heads, 1),
                key_scale=key_scale,
                value_scale=value_scale,
            )
            found.append(score_PN.view(len(run), heads, -1))
        return torch.cat(found)[..., : prompt.tokens.total]

    def _reads_like(self, reader: int) -> tuple[int, float, float]:
        """What readers have in common whose pages one launch reads."""
        assert self.learned is not None, "as whoever asks has seen"
        scales = self._scales[reader]
        return id(self.learned.rotations[self._readers.caches[reader]]), scales.key, scales.value

    def _norms(self, prompt: Prompt, readers: range) -> Tensor:
        """Value norms of neighbouring readers, fp32 `[L, H, T]`."""
        gram, tokens = prompt.policy.value_weight == "l2-gram", prompt.value_tokens
        shape = (len(readers), self._pages.num_kv_heads, tokens.total)
        norm_LHT = torch.empty(shape, dtype=torch.float32, device=prompt.table_1B.device)
        for reader, norm_HT in zip(readers, norm_LHT, strict=True):
            # One after the other: what slices of quantised weights are written to is the next one's, too.
            weights = self._projections.factor(reader) if gram else self._projections.slices(reader)
            assert weights is not None, "of layers whose projections were found"
            launches.weigh(
                prompt.policy,
                self._reader_pages,
                reader,
                prompt.value_table_1B,
                tokens,
                weights,
                value_scale=self._scales[reader].value,
                out_HT=norm_HT,
            )
        return norm_LHT

    def _score_in_torch(self, prompt: Prompt, reader: int) -> LayerScores:
        """For policies that read no tensor of the model, and formulas that the kernels do not have."""
        policy, scales, layer = prompt.policy, self._scales[reader], self._readers.caches[reader]
        window_AWQD, peak_LHS = prompt.window_AWQD, prompt.peak_LHS
        where = prompt.table_1B, prompt.total, layer
        key_HSD = self._read(*where, self._pages.key_PND, scales.key if policy.needs_keys else None)
        value_HSD = self._read(*where, self._pages.value_PND, scales.value if policy.needs_values else None)
        echo_HS = None if peak_LHS is None else peak_LHS[layer]
        if policy.learned:
            assert self.learned is not None, f"{policy.name} needs a learned score"
            echo_HS = self.learned.peaks(layer, key_HSD, value_HSD, prompt.first_token)
        return score_layer(
            policy,
            layer=layer,
            query_WQD=window_AWQD[reader] if window_AWQD is not None and policy.needs_queries else None,
            echo_HS=echo_HS,
            key_HSD=key_HSD,
            value_HSD=value_HSD,
            output_QDM=self._projections.slices(reader) if policy.needs_projection else None,
            factor_QDC=self._projections.factor(reader) if policy.value_weight == "l2-gram" else None,
            **scales.softmax.arguments,
            keep_ratio=prompt.score.keep,
            evictable=prompt.evictable,
            reduce_heads=self._reduce_heads,
            window=prompt.window,
            first_token=prompt.first_token,
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
