"""The policies on a transformers model that masks what is evicted: no engine, any page size, single tokens too.

It answers what the engine cannot (what whole pages cost against single tokens at equal memory), and it is a second
opinion on the engine: the same prompt, policy and page size must give the same divergence up to rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.metrics import divergence
from benchmarks.quality.prompts import Prompt
from vllm_defensive.packing import Region
from vllm_defensive.policy import LayerScores, Policy, score_layer, select, select_within
from vllm_defensive.policy.budget import guarded

_NAME = "kv_eviction_masked"


class MaskedModel:
    """A Llama-like model in float32 whose attention can leave out (layer, head, token) entries."""

    def __init__(self, model: str | Path, window: int = 32) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS[_NAME] = self._attend
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation=_NAME).eval()
        config = self._model.config
        self.layers, self.heads = config.num_hidden_layers, config.num_key_value_heads
        self._window, self._scale = window, config.head_dim**-0.5
        self._output = [
            layer.self_attn.o_proj.weight.detach().T.reshape(config.num_attention_heads, config.head_dim, -1)
            for layer in self._model.model.layers
        ]
        self._query: dict[int, Tensor] = {}
        self._cache: Any = None
        self._kept: Tensor | None = None

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float = 1.0, **_: Any
    ) -> tuple[Tensor, None]:
        """Causal attention, `[1, Q, T, D]` queries over `[1, H, S, D]` keys, entries outside `_kept` left out."""
        del mask
        layer, new, seen = module.layer_idx, query.shape[2], key.shape[2]
        self._query[layer] = query[0, :, -self._window :].transpose(0, 1)
        allowed = torch.ones(new, seen, dtype=torch.bool).tril(seen - new).expand(key.shape[1], new, seen)
        if self._kept is not None:
            allowed = allowed.clone()
            tokens = self._kept.shape[2]
            allowed[..., :tokens] &= self._kept[layer][:, None]
        group = query.shape[1] // key.shape[1]
        output = torch.nn.functional.scaled_dot_product_attention(
            query,
            key.repeat_interleave(group, 1),
            value.repeat_interleave(group, 1),
            attn_mask=allowed.repeat_interleave(group, 0)[None],
            scale=scaling,
        )
        return output.transpose(1, 2).contiguous(), None

    @torch.inference_mode()
    def _forward(self, tokens: list[int]) -> Tensor:
        return (
            self._model(torch.tensor([tokens]), past_key_values=self._cache, use_cache=True).logits[0].log_softmax(-1)
        )

    def prefill(self, prompt: Prompt) -> None:
        """Compute the prompt with the full cache."""
        from transformers import DynamicCache

        self._cache, self._kept, self._prompt = DynamicCache(), None, prompt
        self._forward(prompt.tokens)
        self._window_queries = dict(self._query)
        self._full_AV = self._answer(None)

    def scores(self, policy: Policy, keep: float) -> list[LayerScores]:
        """Of all tokens of the prompt, every layer."""
        tokens = len(self._prompt.tokens)
        return [
            score_layer(
                policy,
                layer=layer,
                query_WQD=self._window_queries[layer],
                key_HSD=self._cache.layers[layer].keys[0],
                value_HSD=self._cache.layers[layer].values[0],
                output_QDM=self._output[layer],
                factor_QDC=None,
                scale=self._scale,
                keep_ratio=keep,
                evictable=(0, tokens),
            )
            for layer in range(self.layers)
        ]

    def kept(
        self, policy: Policy, scores: list[LayerScores], keep: float, page_tokens: int, single: bool = False
    ) -> Tensor:
        """Entries that stay, bool `[L, H, T]`. single: choose tokens one by one, as many as the whole pages hold."""
        tokens = len(self._prompt.tokens)
        stop = tokens // page_tokens * page_tokens
        region = Region(tokens, 0, self._window, page_tokens, page_tokens)
        blocks = region.budget_blocks(keep, region.plain)
        cut = [LayerScores(s.scores_HE[:, :stop], None if s.rank_HE is None else s.rank_HE[:, :stop]) for s in scores]
        if single:
            sharers = {"head": 1, "layer": self.heads, "model": self.heads * self.layers}[policy.scope]
            each = blocks * page_tokens
            chosen = select_within(
                policy,
                cut,
                page_size=1,
                budget_pages=each * sharers,
                guard_pages=guarded(policy.guard, each),
                evictable=(0, stop),
            )
        else:
            chosen = select(policy, cut, page_size=page_tokens, packed_blocks=blocks, evictable=(0, stop))
        counts = chosen.pages_LH.flatten().long() * chosen.tokens_PN.shape[1]
        kept = torch.zeros(counts.numel(), tokens, dtype=torch.bool)
        kept[:, stop:] = True
        kept[torch.arange(counts.numel()).repeat_interleave(counts), chosen.tokens_PN.flatten().long()] = True
        return kept.view(self.layers, self.heads, tokens)

    def _answer(self, kept: Tensor | None) -> Tensor:
        """Log-probabilities of the gold answer's tokens after the first. -> [A - 1, V]"""
        self._kept = kept
        logprobs = self._forward(self._prompt.gold[:-1])
        self._kept = None
        self._cache.crop(-(len(self._prompt.gold) - 1))
        return logprobs

    def divergence(self, kept: Tensor) -> float:
        """Mean KL(full || evicted) on the answer's tokens after the first."""
        return float(divergence(self._full_AV, self._answer(kept)).mean())
