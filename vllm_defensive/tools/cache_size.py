"""The size of a model's KV cache, from its configuration alone."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8": 1}
_FULL, _SLIDING = ("full_attention", "attention"), ("sliding_attention", "chunked_attention")
_RECURRENT = ("linear_attention", "mamba", "conv")
_PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}  # Nemotron-H's


@dataclass(frozen=True)
class Model:
    """What decides the size of a model's KV cache. Only layers of full attention are evicted.

    full_layers, windowed_layers: attention layers that see the whole prefix, and those that see `window` tokens.
    token_bytes: keys and values of one token in one layer, on one GPU. positions: longest sequence, None if unknown.
    head_size, number_bytes: of a KV head, and of one of its numbers.
    recurrent_layers, state_bytes: layers that have a state instead, and what it takes in one of them, on one GPU.
    """

    full_layers: int
    windowed_layers: int
    window: int
    token_bytes: int
    positions: int | None = None
    head_size: int = 128
    number_bytes: int = 2
    recurrent_layers: int = 0
    state_bytes: int = 0

    def bytes(self, full_tokens: int, seen_tokens: int) -> int:
        """KV cache of a request that holds `full_tokens` slots in full layers and has seen `seen_tokens` tokens. Of
        each state there are two, for the next one is made of it in a block of its own."""
        windowed = min(self.window, seen_tokens) if self.windowed_layers else 0
        attention = self.token_bytes * (self.full_layers * full_tokens + self.windowed_layers * windowed)
        return attention + 2 * self.recurrent_layers * self.state_bytes

    def block_tokens(self, smallest: int) -> int:
        """Tokens of a block: so many, or the least multiple in which a layer's tokens take as much as a state does."""
        return smallest * max(1, math.ceil(self.state_bytes / (smallest * self.token_bytes)))

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
    kinds = _kinds(text, layers, bool(window))
    kinds = kinds[: layers - (text.get("num_kv_shared_layers") or 0)]  # the last ones read the caches of others
    if any(kind in _SLIDING for kind in kinds) and not window:
        raise ValueError("--model: its configuration has layers with a window, but not the window's size")
    positions = text.get("max_position_embeddings")
    number_bytes = _DTYPE_BYTES[name]
    token_bytes = 2 * kv_heads // tp * head_dim * number_bytes
    full, windowed, recurrent = (sum(kind in those for kind in kinds) for those in (_FULL, _SLIDING, _RECURRENT))
    state = _state_bytes(text, _DTYPE_BYTES.get(str(dtype or "bfloat16").removeprefix("torch."), 2)) // tp
    return Model(
        full, windowed, window, token_bytes, positions, head_dim, number_bytes, recurrent, state if recurrent else 0
    )


def _kinds(text: Mapping[str, Any], layers: int, has_window: bool) -> list[str]:
    """The kind of each layer."""
    if (kinds := text.get("layer_types") or text.get("layers_block_type")) is not None:
        return list(kinds)
    if (pattern := text.get("hybrid_override_pattern")) is not None:
        return [_PATTERN.get(letter, letter) for letter in pattern]
    if (each := text.get("full_attention_interval")) is not None:  # Qwen3-Next
        return [_FULL[0] if (layer + 1) % each == 0 else _RECURRENT[0] for layer in range(layers)]
    if text.get("attention_chunk_size"):  # Llama 4
        each = text.get("no_rope_layer_interval") or 4
        return [_FULL[0] if (layer + 1) % each == 0 else _SLIDING[1] for layer in range(layers)]
    if _state_bytes(text, 1):
        raise ValueError("--model: its configuration does not say which of its layers are recurrent")
    # One kind for all: Mistral's old form, or Qwen2's with its switch.
    windowed = has_window and text.get("use_sliding_window", True)
    return [_SLIDING[0] if windowed else _FULL[0]] * layers


def _state_bytes(text: Mapping[str, Any], number_bytes: int) -> int:
    """Of a recurrent layer on all GPUs: what its convolution still sees, and what it remembers; 0: it has none."""

    def named(*names: str) -> int:
        return next((int(text[name]) for name in names if isinstance(text.get(name), int)), 0)

    if "linear_num_value_heads" in text:  # gated delta net
        key, value = text["linear_key_head_dim"], text["linear_value_head_dim"]
        heads = text["linear_num_value_heads"]
        seen, remembered = 2 * key * text["linear_num_key_heads"] + value * heads, heads * key * value
        kernel = named("linear_conv_kernel_dim")
    elif "conv_L_cache" in text:  # a short convolution alone
        seen, remembered, kernel = named("conv_dim", "hidden_size"), 0, named("conv_L_cache")
    else:  # Mamba 2
        heads, size = named("mamba_num_heads", "mamba_n_heads"), named("ssm_state_size", "mamba_d_state")
        width = named("mamba_head_dim", "mamba_d_head") * heads or named("mamba_expand") * named("hidden_size")
        if not heads or not size:
            return 0
        seen, remembered = width + 2 * named("n_groups", "mamba_n_groups") * size, width * size
        kernel = named("conv_kernel", "mamba_d_conv")
    ssm = _DTYPE_BYTES.get(str(text.get("mamba_ssm_cache_dtype") or text.get("mamba_ssm_dtype")), number_bytes)
    return seen * (kernel - 1) * number_bytes + remembered * ssm


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
