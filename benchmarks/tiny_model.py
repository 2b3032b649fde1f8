"""A random Llama that vLLM and transformers load in a second, for what is about mechanism rather than quality."""

from __future__ import annotations

import string
from itertools import islice, product
from pathlib import Path

END, START = "<|end|>", "<|start|>"
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def write_tiny_llama(
    folder: Path,
    *,
    num_layers: int = 3,
    hidden_size: int = 128,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    vocab_size: int = 512,
    max_positions: int = 4096,
    seed: int = 0,
) -> Path:
    """Write a bf16 Llama with random weights and a byte-level tokenizer to `folder`, and return it.

    Equal arguments give equal weights. Attention is peaked and logits are spread (see `random_weights`), so losing the
    wrong tokens changes the output. Its end token has no special logit: ask for `ignore_eos` where the length matters.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer(vocab_size)
    special_ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = LlamaConfig(
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_position_embeddings=max_positions,
        tie_word_embeddings=False,  # tied, a random model repeats its last token for ever
        **special_ids,
    )
    model = LlamaForCausalLM(config)
    random_weights(model, seed)
    # Else transformers' generate() would sample or stop by defaults of its own.
    model.generation_config = GenerationConfig(do_sample=False, **special_ids)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def random_weights(model, seed: int) -> None:
    """Fill all matrices from N(0, gain^2 / fan_in), so that each output has a standard deviation of about `gain`.

    RMS-normed inputs have variance 1. Gain 2 on q and k spreads attention scores (q.k / sqrt(D)) by 4, which
    concentrates each head on few tokens; gain 4 on the head spreads logits by 4, so that the greedy choice is not a
    tie that rounding decides.
    """
    import torch

    gains = {"q_proj": 2.0, "k_proj": 2.0, "lm_head": 4.0}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                gain = gains.get(name.split(".")[-2], 1.0)
                # each row of the embedding is an input by itself, not a sum over fan_in
                fan_in = 1 if "embed_tokens" in name else parameter.shape[1]
                parameter.normal_(0.0, gain * fan_in**-0.5, generator=generator)


def tiny_tokenizer(vocab_size: int):
    """A byte-level BPE tokenizer with exactly `vocab_size` tokens: 2 special ones, all bytes, then letter pairs.

    It encodes any text and decodes any token that the model can draw.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    num_pairs = vocab_size - 2 - len(byte_tokens)
    if not 0 <= num_pairs <= 26 * 26:
        raise ValueError(f"vocab_size={vocab_size}: choose a value in [258, 934]")
    merges = list(islice(product(string.ascii_lowercase, repeat=2), num_pairs))
    tokens = [END, START, *byte_tokens, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
