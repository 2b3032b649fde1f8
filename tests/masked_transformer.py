"""A transformers model, with whatever other layers it has, whose global ones can be told, entry by entry, what to
see."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "tests_masked"


class MaskedTransformer:
    """What transformers computes in float32, but for the attention, which is below. Evictable are the caches of global
    layers: others have a sliding window, attend within chunks, or are recurrent, and have no attention at all. Who
    shares a cache sees of it what its own layer does."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS[NAME] = _attend
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=NAME).eval()
        layers = [getattr(layer, "self_attn", None) for layer in self._model.model.layers]
        self._attention: list[Any] = [attention for attention in layers if attention is not None]
        self._chunk = getattr(self._model.config, "attention_chunk_size", None)
        whole = [attention for attention in self._attention if not self._is_local(attention)]
        own = [attention for attention in whole if not getattr(attention, "is_kv_shared_layer", False)]
        # In transformers' models that share caches it is the last one of a kind that others read.
        self._readers = [[attention] for attention in own]
        self._readers[-1] += [attention for attention in whole if attention not in own]

    def _is_local(self, attention: Any) -> bool:
        return getattr(attention, "sliding_window", None) is not None or self._is_chunked(attention)

    def _is_chunked(self, attention: Any) -> bool:
        return self._chunk is not None and bool(attention.use_rope)

    @torch.inference_mode()
    def logprobs(
        self,
        token_ids: list[int],
        kept_LHT: Tensor | None = None,
        last: int = 0,
        again: Sequence[tuple[int, Tensor]] = (),
    ) -> Tensor:
        """fp32 `[S, vocabulary]` of what follows each token, or each of the `last`.

        kept_LHT: bool, L caches of global layers, the first T tokens: these see each other; later ones see of them what
        is True.
        again: of each eviction of a text that was evicted several times, from where on it is seen, and such a mask.
        """
        if kept_LHT is not None:
            again = [(kept_LHT.shape[2], kept_LHT)]
        causal_SS = torch.ones(len(token_ids), len(token_ids), dtype=torch.bool).tril()
        for attention in self._attention:
            seen_SS = causal_SS
            if (window := getattr(attention, "sliding_window", None)) is not None:
                seen_SS = causal_SS.triu(1 - window)  # tokens that one sees, itself included
            if self._is_chunked(attention):
                chunk_S = torch.arange(len(token_ids)) // self._chunk
                seen_SS = causal_SS & (chunk_S[:, None] == chunk_S)
            attention.seen_XSS = seen_SS[None]
        for first, seen_LHT in again:
            for readers, kept_HT in zip(self._readers, seen_LHT, strict=True):
                heads, tokens = kept_HT.shape
                for attention in readers:
                    seen_HSS = attention.seen_XSS.expand(heads, -1, -1).clone()
                    seen_HSS[:, first:, :tokens] = kept_HT[:, None]
                    attention.seen_XSS = seen_HSS
        logits_SV = self._model(torch.tensor([token_ids]), use_cache=False, logits_to_keep=last).logits[0]
        return logits_SV.log_softmax(dim=-1)

    def answer_logprobs(
        self,
        prompt: list[int],
        answer: list[int],
        kept_LHT: Tensor | None = None,
        again: Sequence[tuple[int, Tensor]] = (),
    ) -> Tensor:
        """float64, of the tokens of an answer, each given the true tokens before it."""
        logprobs = self.logprobs(prompt + answer[:-1], kept_LHT, len(answer), again)
        return logprobs[torch.arange(len(answer)), torch.tensor(answer)].double()


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any) -> tuple[Tensor, None]:
    """`[1, Q, S, D]` queries over `[1, H, S, D]` keys; transformers makes no mask for attention it does not know."""
    assert mask is None
    group = query.shape[1] // key.shape[1]
    seen_QSS = module.seen_XSS.expand(key.shape[1], -1, -1).repeat_interleave(group, 0)
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    cap, sinks_Q = arguments.get("softcap"), arguments.get("s_aux")
    if cap is None and sinks_Q is None:
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=seen_QSS[None], scale=arguments["scaling"])
        return mixed.transpose(1, 2), None
    logits_QSS = (query @ key.mT)[0] * arguments["scaling"]
    if cap is not None:
        logits_QSS = cap * torch.tanh(logits_QSS / cap)
    logits_QSS = logits_QSS.masked_fill(~seen_QSS, float("-inf"))
    if sinks_Q is not None:  # as if each query saw one key more, of this logit, whose value is zero
        sinks_QS1 = sinks_Q[:, None, None].expand(-1, logits_QSS.shape[1], 1)
        logits_QSS = torch.cat([logits_QSS, sinks_QS1], dim=-1)
    weights_QSS = logits_QSS.softmax(dim=-1)[..., : key.shape[2]]
    return (weights_QSS @ value[0])[None].transpose(1, 2), None
