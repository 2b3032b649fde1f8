"""Gemma 3 from a GGUF file to Hugging Face's names: what differs from `benchmarks.llama`.

The base model, not the instruction-tuned one: it has no chat format, so its folder gets a plain one (messages with
blank lines between them). llama.cpp stores each norm weight w as 1 + w, and leaves q and k in Hugging Face's order.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from benchmarks.gguf_file import dequantised, field

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from tokenizers import Tokenizer

NORMAL_TOKEN, CONTROL_TOKEN, USER_TOKEN = 1, 3, 4  # of GGUF's token types
LAYERS_FOR_A_GLOBAL_ONE = 6
LOCAL_ROPE_THETA = 10_000.0  # not in the file: Gemma 3's architecture fixes it
PLAIN_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] + '\n\n' }}{% endfor %}"

TOP_LEVEL_NAMES = MappingProxyType({"token_embd": "model.embed_tokens", "output_norm": "model.norm"})
LAYER_NAMES = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "attn_output": "self_attn.o_proj",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "post_ffw_norm": "post_feedforward_layernorm",
    }
)


def hugging_face_name(gguf_name: str) -> str:
    """`blk.7.ffn_norm.weight` -> `model.layers.7.pre_feedforward_layernorm.weight`; KeyError for an unknown tensor."""
    module, _, kind = gguf_name.rpartition(".")
    if not module.startswith("blk."):
        return f"{TOP_LEVEL_NAMES[module]}.{kind}"
    _, layer, part = module.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """config.json of a Gemma 3 text model, from the metadata of its GGUF file."""

    layers, head_dim = field(reader, "gemma3.block_count"), field(reader, "gemma3.attention.key_length")
    types = [
        "sliding_attention" if (layer + 1) % LAYERS_FOR_A_GLOBAL_ONE else "full_attention" for layer in range(layers)
    ]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "dtype": "bfloat16",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": field(reader, "gemma3.embedding_length"),
        "intermediate_size": field(reader, "gemma3.feed_forward_length"),
        "num_hidden_layers": layers,
        "layer_types": types,
        "sliding_window": field(reader, "gemma3.attention.sliding_window"),
        "num_attention_heads": field(reader, "gemma3.attention.head_count"),
        "num_key_value_heads": field(reader, "gemma3.attention.head_count_kv"),
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        "max_position_embeddings": field(reader, "gemma3.context_length"),
        "rms_norm_eps": float(f"{field(reader, 'gemma3.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": field(reader, "gemma3.rope.freq_base")},
            "sliding_attention": {"rope_type": "default", "rope_theta": LOCAL_ROPE_THETA},
        },
        "vocab_size": len(field(reader, "tokenizer.ggml.tokens")),
        "tie_word_embeddings": True,
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
    }


def load_weights(reader: GGUFReader) -> dict[str, torch.Tensor]:
    """All weights by their Hugging Face names, dequantised in float32 and rounded once, to bf16."""
    import torch

    weights = {}
    for tensor in reader.tensors:
        weight = dequantised(tensor)
        if tensor.name.endswith("norm.weight"):
            weight -= 1
        weights[hugging_face_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    return weights


def merges_of(tokens: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """The pairs that a SentencePiece BPE vocabulary merges, best score first; it stores the results, not the pairs."""
    ids = {token: number for number, token in enumerate(tokens)}
    ranked = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind != NORMAL_TOKEN:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def build_tokenizer(reader: GGUFReader) -> tuple[Tokenizer, dict[str, Any]]:
    """The SentencePiece BPE tokenizer in the file, and its tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    special = {
        name: tokens[field(reader, f"tokenizer.ggml.{key}_token_id")]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=merges_of(tokens, field(reader, "tokenizer.ggml.scores"), kinds),
            unk_token=special["unk"],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bos_id = field(reader, "tokenizer.ggml.bos_token_id")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special['bos']} $A", special_tokens=[(special["bos"], bos_id)]
    )
    for kind in (CONTROL_TOKEN, USER_TOKEN):
        chosen = [token for token, its_kind in zip(tokens, kinds, strict=True) if its_kind == kind]
        whole = [AddedToken(token, normalized=False, special=kind == CONTROL_TOKEN) for token in chosen]
        (tokenizer.add_special_tokens if kind == CONTROL_TOKEN else tokenizer.add_tokens)(whole)
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": token for name, token in special.items()},
        "model_max_length": field(reader, "gemma3.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": PLAIN_TEMPLATE,
    }
