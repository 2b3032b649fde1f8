"""Qwen2 from a GGUF file to Hugging Face's names: what differs from `benchmarks.llama`.

llama.cpp leaves q and k in Hugging Face's order. Embedding and output are one matrix upstream, which the file holds
twice, quantised in two ways: that of the output has more bits, and is taken for both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.gguf_file import dequantised, field, hugging_face_name

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from tokenizers import Tokenizer

CONTROL_TOKEN, USER_TOKEN, UNUSED_TOKEN = 3, 4, 5  # of GGUF's token types
END_OF_TEXT = "<|endoftext|>"  # ends an answer as well as the end of a turn does
# How Qwen2 cuts a text before its merges: contractions, words with what stands before them, single digits, runs of
# signs with the line ends behind them, line ends, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """config.json of a Qwen2 model, from the metadata of its GGUF file."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "bfloat16",
        # Without a version transformers takes the tokenizer for one of Mistral's with a wrong split, and warns.
        "transformers_version": "5.0.0",
        "hidden_act": "silu",
        "hidden_size": field(reader, "qwen2.embedding_length"),
        "intermediate_size": field(reader, "qwen2.feed_forward_length"),
        "num_hidden_layers": field(reader, "qwen2.block_count"),
        "num_attention_heads": field(reader, "qwen2.attention.head_count"),
        "num_key_value_heads": field(reader, "qwen2.attention.head_count_kv"),
        "max_position_embeddings": field(reader, "qwen2.context_length"),
        "rms_norm_eps": float(f"{field(reader, 'qwen2.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": field(reader, "qwen2.rope.freq_base"),
        "use_sliding_window": False,
        "vocab_size": len(tokens),
        "tie_word_embeddings": True,
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": [field(reader, "tokenizer.ggml.eos_token_id"), tokens.index(END_OF_TEXT)],
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
    }


def load_weights(reader: GGUFReader) -> dict[str, torch.Tensor]:
    """All weights by their Hugging Face names, dequantised in float32 and rounded once, to bf16."""
    import torch

    by_name = {tensor.name: tensor for tensor in reader.tensors}
    if better := by_name.pop("output.weight", None):
        by_name["token_embd.weight"] = better
    return {hugging_face_name(name): dequantised(tensor).to(torch.bfloat16) for name, tensor in by_name.items()}


def build_tokenizer(reader: GGUFReader) -> tuple[Tokenizer, dict[str, Any]]:
    """The byte-level BPE tokenizer in the file, and its tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Regex as Pattern

    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    # The matrix has more rows than there are tokens; the file calls the rest [PAD...], which no text may become.
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != UNUSED_TOKEN}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Pattern(SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL_TOKEN, USER_TOKEN):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL_TOKEN)])
    return tokenizer, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokens[field(reader, "tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[field(reader, "tokenizer.ggml.padding_token_id")],
        "model_max_length": field(reader, "qwen2.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": field(reader, "tokenizer.chat_template"),
    }
