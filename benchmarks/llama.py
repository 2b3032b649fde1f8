"""A Llama model in a GGUF file as transformers and vLLM read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.gguf_file import dequantised, field, hugging_face_name

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from tokenizers import Tokenizer


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """config.json of a Llama model, from the metadata of its GGUF file."""
    heads = field(reader, "llama.attention.head_count")
    hidden_size = field(reader, "llama.embedding_length")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden_size // heads,
        "max_position_embeddings": field(reader, "llama.context_length"),
        # float32 in the file: 1e-5 reads as 9.999999747378752e-06
        "rms_norm_eps": float(f"{field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": field(reader, "llama.rope.freq_base"),
        "vocab_size": field(reader, "llama.vocab_size"),
        # llama.cpp writes `output.weight` only if it differs from the embedding
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
    }


def load_weights(reader: GGUFReader) -> dict[str, torch.Tensor]:
    """All weights by their Hugging Face names, dequantised in float32 and rounded once, to bf16."""
    import torch

    rotary_heads = {
        "attn_q": field(reader, "llama.attention.head_count"),
        "attn_k": field(reader, "llama.attention.head_count_kv"),
    }
    weights = {}
    for tensor in reader.tensors:
        weight = dequantised(tensor)
        part = tensor.name.split(".")[-2]
        if part in rotary_heads:
            weight = to_half_rotation(weight, rotary_heads[part])
        weights[hugging_face_name(tensor.name)] = weight.to(torch.bfloat16).contiguous()
    return weights


def to_half_rotation(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of a q or k projection [num_heads * D, hidden] from llama.cpp's order to Hugging Face's.

    RoPE turns dimensions in pairs. llama.cpp pairs neighbours (2i, 2i + 1), Hugging Face pairs halves (i, i + D/2).
    """
    rows, hidden = weight.shape
    paired = weight.view(num_heads, rows // num_heads // 2, 2, hidden)
    return paired.transpose(1, 2).reshape(rows, hidden)


CONTROL_TOKEN = 3  # of GGUF's token types


def build_tokenizer(reader: GGUFReader) -> tuple[Tokenizer, dict[str, Any]]:
    """The byte-level BPE tokenizer in the file, and its tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pre_tokenizer = field(reader, "tokenizer.ggml.pre")
    if pre_tokenizer != "smollm":
        raise ValueError(f"tokenizer.ggml.pre={pre_tokenizer!r}: only smollm can be converted")
    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    kinds = field(reader, "tokenizer.ggml.token_type")
    control_tokens = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]

    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # Each digit is a token of its own; a space before it stays one space.
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control_tokens])

    config = {
        # Not a GPT-2 class, though the vocabulary is of that kind: that would put its own pre-tokenizer in place.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[field(reader, "tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[field(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[field(reader, "tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[field(reader, "tokenizer.ggml.unknown_token_id")],
        "model_max_length": field(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": field(reader, "tokenizer.chat_template"),
    }
    return tokenizer, config
