"""A transformers model, sliding windows and all, whose global layers can be told, entry by entry, what to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "tests_masked"


class MaskedTransformer:
    """What transformers computes in float32, but for the attention, which is below. Evictable are the global layers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS[NAME] = _attend
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=NAME).eval()
        self._attention: list[Any] = [layer.self_attn for layer in self._model.model.layers]
        self._evictable = [attention for attention in self._attention if attention.sliding_window is None]

    @torch.inference_mode()
    def logprobs(self, token_ids: list[int], kept_LHT: Tensor | None = None, last: int = 0) -> Tensor:
        """fp32 `[S, vocabulary]` of what follows each token, or each of the `last`.

        kept_LHT: bool, L global layers, the first T tokens: these see each other; later ones see of them what is True.
        """
        causal_SS = torch.ones(len(token_ids), len(token_ids), dtype=torch.bool).tril()
        for attention in self._attention:
            window = attention.sliding_window  # tokens that one sees, itself included
            attention.seen_XSS = (causal_SS if window is None else causal_SS.triu(1 - window))[None]
        if kept_LHT is not None:
            for attention, kept_HT in zip(self._evictable, kept_LHT, strict=True):
                heads, tokens = kept_HT.shape
                attention.seen_XSS = causal_SS.repeat(heads, 1, 1)
                attention.seen_XSS[:, tokens:, :tokens] = kept_HT[:, None]
        logits_SV = self._model(torch.tensor([token_ids]), use_cache=False, logits_to_keep=last).logits[0]
        return logits_SV.log_softmax(dim=-1)

    def answer_logprobs(self, prompt: list[int], answer: list[int], kept_LHT: Tensor | None) -> Tensor:
        """float64, of the tokens of an answer, each given the true tokens before it."""
        logprobs = self.logprobs(prompt + answer[:-1], kept_LHT, last=len(answer))
        return logprobs[torch.arange(len(answer)), torch.tensor(answer)].double()


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any) -> tuple[Tensor, None]:
    """`[1, Q, S, D]` queries over `[1, H, S, D]` keys; transformers makes no mask for attention it does not know."""
    assert mask is None and arguments.get("softcap") is None
    group = query.shape[1] // key.shape[1]
    seen_QSS = module.seen_XSS.expand(key.shape[1], -1, -1).repeat_interleave(group, 0)
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=seen_QSS[None], scale=arguments["scaling"])
    return mixed.transpose(1, 2), None
