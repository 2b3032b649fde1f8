"""The size of a model's KV cache, from its configuration alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}
_FULL, _SLIDING = "full_attention", ("sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Model:
    """What decides the size of a model's KV cache. Only layers of full attention are evicted.

    full_layers, windowed_layers: attention layers that see the whole prefix, and those that see `window` tokens.
    token_bytes: keys and values of one token in one layer, on one GPU. positions: longest sequence, None if unknown.
    head_size, number_bytes: of a KV head, and of one of its numbers.
    """

    full_layers: int
    windowed_layers: int
    window: int
    token_bytes: int
    positions: int | None = None
    head_size: int = 128
    number_bytes: int = 2

    def bytes(self, full_tokens: int, seen_tokens: int) -> int:
        """KV cache of a request that holds `full_tokens` slots in full layers and has seen `seen_tokens` tokens."""
        windowed = min(self.window, seen_tokens) if self.windowed_layers else 0
        return self.token_bytes * (self.full_layers * full_tokens + self.windowed_layers * windowed)

    def served(self, max_tokens: int) -> Model:
        """The model on a server that takes no longer requests: if all layers have a window that these cannot outgrow,
        they are full attention there (`engine.spec`)."""
        if self.full_layers or self.window < max_tokens:
            return self
        return replace(self, full_layers=self.windowed_layers, windowed_layers=0)


def read_model(config: Mapping[str, Any], tp: int = 1, kv_dtype: str = "auto") -> Model:
    """The KV cache of a Hugging Face configuration. ValueError names what is missing or not supported."""
    text = config.get("text_config") or config
    if text.get("kv_lora_rank"):
        raise ValueError("--model: multi-head latent attention is not evicted")
    layers, heads = _number(text, "num_hidden_layers"), _number(text, "num_attention_heads")
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or _number(text, "hidden_size") // heads
    if tp < 1 or kv_heads % tp:
        raise ValueError(f"--tp {tp}: choose a divisor of the model's {kv_heads} KV heads, as `vllm serve` wants it")
    dtype = text.get("dtype") or text.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    name = str(dtype or "bfloat16").removeprefix("torch.") if kv_dtype == "auto" else kv_dtype
    if name not in _DTYPE_BYTES:
        raise ValueError(f"--kv-dtype {name}: choose one of {', '.join(_DTYPE_BYTES)}")
    window = text.get("sliding_window") or text.get("attention_chunk_size") or 0
    kinds = text.get("layer_types")
    if kinds is None:  # one kind for all layers: Mistral's old form, or Qwen2's with its switch
        windowed = bool(window) and text.get("use_sliding_window", True)
        kinds = [_SLIDING[0] if windowed else _FULL] * layers
    kinds = kinds[: layers - (text.get("num_kv_shared_layers") or 0)]  # the last ones read the caches of others
    if any(kind in _SLIDING for kind in kinds) and not window:
        raise ValueError("--model: its configuration has layers with a window, but not the window's size")
    positions = text.get("max_position_embeddings")
    number_bytes = _DTYPE_BYTES[name]
    token_bytes = 2 * kv_heads // tp * head_dim * number_bytes
    windowed = sum(kind in _SLIDING for kind in kinds)
    return Model(kinds.count(_FULL), windowed, window, token_bytes, positions, head_dim, number_bytes)


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"--model: its configuration has no usable {name}")
    return value


def load_config(model: str) -> dict[str, Any]:
    """A folder's `config.json`, such a file, or the configuration of a model on the hub. ValueError: none there."""
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    try:
        if file.exists():
            config = json.loads(file.read_text(encoding="utf-8"))
        else:
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(model).to_dict()
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {model}: no configuration there ({str(error).splitlines()[0]})") from error
    if not isinstance(config, dict):
        raise ValueError(f"--model {model}: its configuration is not a JSON object")
    return config
