"""The models that are served: one that is real, and dummies in which cache and weights, or prefill and decode, are in
proportion as on a GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks.models import ensure_model

HEAVY = "kv-heavy"
BALANCED = "kv-heavy-balanced"
SMOLLM2 = "SmolLM2-135M"

# A decode step of an 8B model (16 GB of weights) on a GPU with 141 GB reads, with the pool full, about 110 GB of KV
# cache: seven bytes of cache for each byte of weights. Here weights are 37 MB (25 MB of them the tied embedding) and a
# token's KV is 16 KiB, so a pool of 16,384 tokens, 268 MB, has the same ratio, and a smaller pool a smaller one. Every
# KV head has one query head: on two cores a group would make attention compute-bound, which on a GPU it is not.
HEAVY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# That one has too much work in a prefill: a core without matrix units computes some ten flops while it reads a byte, an
# H200 two hundred. There, with prompts of 32K and answers of 8K tokens, an 8B model needs 0.8 PFLOP, 1.3 s, for a
# prompt, and some 33 ms for a step over a full pool, which 23 requests share: a prefill takes a tenth of a request's
# time. So it does here (9 %), with prompts of 4,096 and answers of 1,024 tokens in a pool of four, by these changes:
# float32, in which a prefill took 8 % longer and a step of four long requests 59 %; half the hidden size; a vocabulary
# that is a quarter of the weights instead of two thirds (8B: an eighth).
_BALANCED_CONFIG = {**HEAVY_CONFIG, "hidden_size": 128, "vocab_size": 8192, "torch_dtype": "float32"}
DUMMIES: dict[str, dict[str, Any]] = {HEAVY: HEAVY_CONFIG, BALANCED: _BALANCED_CONFIG}
MODELS = (SMOLLM2, *DUMMIES)
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def model_folder(name: str, folder: Path = Path(".models")) -> Path:
    """The model's folder, made if it is missing."""
    real = ensure_model()
    if name == SMOLLM2:
        return real
    target, config = folder / name, DUMMIES[name]
    target.mkdir(parents=True, exist_ok=True)
    for file in _TOKENIZER:
        if (real / file).exists():
            shutil.copy(real / file, target / file)
    (target / "tokenizer.json").write_text(json.dumps(_cut_vocabulary(real / "tokenizer.json", config["vocab_size"])))
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target


def _cut_vocabulary(file: Path, size: int) -> dict[str, Any]:
    """A byte-level BPE tokenizer with its first `size` tokens, and the merges that yield them."""
    tokenizer: dict[str, Any] = json.loads(file.read_text())
    model = tokenizer["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < size}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    return tokenizer
