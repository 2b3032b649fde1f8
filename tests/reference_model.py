"""A Llama in plain PyTorch whose attention can be told, entry by entry, what to see. Nothing of vLLM, nothing paged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass
class Layer:
    """What attention of one layer computes with, positions encoded. query `[T, Q, D]`, key and value `[H, T, D]`."""

    query_TQD: Tensor
    key_HTD: Tensor
    value_HTD: Tensor


Packed = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a layer's index and the K and V of its first tokens, `[H, T, D]`, to those that its cache gives back."""


class ReferenceLlama:
    """Weights of a Llama folder, computed in `dtype` (float32 unless given)."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.layers = config["num_hidden_layers"]
        self.query_heads, self.heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.head_size = config.get("head_dim") or config["hidden_size"] // self.query_heads
        self._epsilon = config["rms_norm_eps"]
        rope = config.get("rope_parameters") or {}
        self._theta = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
        assert rope.get("rope_type", "default") == "default" and not config.get("rope_scaling")
        self._weights: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            self._weights.update({name: weight.to(dtype) for name, weight in load_file(file).items()})
        if config.get("tie_word_embeddings"):
            self._weights["lm_head.weight"] = self._weights["model.embed_tokens.weight"]

    def output_projection(self, layer: int) -> Tensor:
        """`[Q, D, M]`: the slice of each query head."""
        weight_MX = self._weights[f"model.layers.{layer}.self_attn.o_proj.weight"]
        return weight_MX.T.reshape(self.query_heads, self.head_size, -1)

    @torch.inference_mode()
    def forward(
        self,
        token_ids: list[int],
        kept_LHT: Tensor | None = None,
        attention: list[Layer] | None = None,
        packed: Packed | None = None,
        again: Sequence[tuple[int, Tensor]] = (),
    ) -> Tensor:
        """Log-probabilities fp32 `[S, vocabulary]` of what follows each token.

        kept_LHT: bool, for the first T tokens: they see each other; later tokens see, of them, only what is True.
        again: more of the same, for more tokens each, and from which position on tokens see that.
        attention: a list to which what each layer's attention computed with is appended.
        packed: makes of keys and values what later tokens read of the first T, of which the rest may be anything.
        """
        hidden_SM = self._weights["model.embed_tokens.weight"][torch.tensor(token_ids)]
        for index in range(self.layers):
            seen = [] if kept_LHT is None else [(kept_LHT.shape[2], kept_LHT)]
            mask_HSS = self._mask(len(token_ids), [(first, kept[index]) for first, kept in (*seen, *again)])
            hidden_SM = self._layer(index, hidden_SM, mask_HSS, attention, kept_LHT, packed)
        hidden_SM = self._norm("model.norm.weight", hidden_SM)
        return (hidden_SM @ self._weights["lm_head.weight"].T).float().log_softmax(dim=-1)

    def _mask(self, length: int, seen: Sequence[tuple[int, Tensor]]) -> Tensor:
        mask_HSS = torch.ones(length, length, dtype=torch.bool).tril().repeat(self.heads, 1, 1)
        for first, kept_HT in seen:
            mask_HSS[:, first:, : kept_HT.shape[1]] = kept_HT[:, None, :]
        return mask_HSS

    def _layer(
        self,
        index: int,
        hidden_SM: Tensor,
        mask_HSS: Tensor,
        attention: list[Layer] | None,
        kept_LHT: Tensor | None,
        packed: Packed | None,
    ) -> Tensor:
        name = f"model.layers.{index}"
        normed_SM = self._norm(f"{name}.input_layernorm.weight", hidden_SM)
        query_SQD, key_SHD, value_SHD = (
            self._linear(f"{name}.self_attn.{part}_proj", normed_SM).unflatten(1, (-1, self.head_size))
            for part in "qkv"
        )
        if f"{name}.self_attn.q_norm.weight" in self._weights:  # Qwen3
            query_SQD = self._norm(f"{name}.self_attn.q_norm.weight", query_SQD)
            key_SHD = self._norm(f"{name}.self_attn.k_norm.weight", key_SHD)
        query_SQD, key_SHD = self._rotate(query_SQD), self._rotate(key_SHD)
        key_HSD, value_HSD = key_SHD.transpose(0, 1), value_SHD.transpose(0, 1)
        if attention is not None:
            attention.append(Layer(query_SQD, key_HSD, value_HSD))
        query_HGSD = query_SQD.unflatten(1, (self.heads, -1)).permute(1, 2, 0, 3)
        mixed_HGSD = self._attend(query_HGSD, key_HSD, value_HSD, mask_HSS)
        if packed is not None and kept_LHT is not None:
            tokens = kept_LHT.shape[2]
            read_HSD = [
                torch.cat([some, exact[:, tokens:]], dim=1)
                for some, exact in zip(
                    packed(index, key_HSD[:, :tokens], value_HSD[:, :tokens]), (key_HSD, value_HSD), strict=True
                )
            ]
            later = self._attend(query_HGSD[:, :, tokens:], *read_HSD, mask_HSS[:, tokens:])
            mixed_HGSD = torch.cat([mixed_HGSD[:, :, :tokens], later], dim=2)
        mixed_SX = mixed_HGSD.permute(2, 0, 1, 3).flatten(1)
        hidden_SM = hidden_SM + self._linear(f"{name}.self_attn.o_proj", mixed_SX)
        normed_SM = self._norm(f"{name}.post_attention_layernorm.weight", hidden_SM)
        gate, up = (self._linear(f"{name}.mlp.{part}_proj", normed_SM) for part in ("gate", "up"))
        return hidden_SM + self._linear(f"{name}.mlp.down_proj", torch.nn.functional.silu(gate) * up)

    def _attend(self, query_HGSD: Tensor, key_HSD: Tensor, value_HSD: Tensor, mask_HSS: Tensor) -> Tensor:
        logits_HGSS = query_HGSD @ key_HSD[:, None].transpose(2, 3) * self.head_size**-0.5
        weights_HGSS = logits_HGSS.float().masked_fill(~mask_HSS[:, None], float("-inf")).softmax(dim=-1)
        return weights_HGSS.to(query_HGSD.dtype) @ value_HSD[:, None]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.float().pow(2).mean(dim=-1, keepdim=True) + self._epsilon)
        return (x.float() * scale).to(x.dtype) * self._weights[name]

    def _rotate(self, x_SHD: Tensor) -> Tensor:
        # Angles are rounded to float32, as where models are trained and served: at position 685 float64 ones differ by
        # 4e-5, more than everything else together.
        frequency_D = 1.0 / self._theta ** (torch.arange(0, self.head_size, 2, dtype=torch.float32) / self.head_size)
        angle_SD = torch.arange(x_SHD.shape[0], dtype=torch.float32)[:, None] * frequency_D
        cos, sin = angle_SD.cos()[:, None], angle_SD.sin()[:, None]
        first, second = x_SHD.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_SHD.dtype)


def decode_logprobs(model: Any, prompt: list[int], answer: list[int], kept_LHT: Tensor | None, **more: Any) -> Tensor:
    """float64 log-probabilities of the tokens of an answer, each given the true tokens before it."""
    logprobs = model.forward(prompt + answer[:-1], kept_LHT, **more)
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return logprobs[rows, torch.tensor(answer)].double()
