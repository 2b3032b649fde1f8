"""Random models that vLLM and transformers load in a second, for tests of mechanism rather than of quality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.tiny_model import CHAT_TEMPLATE, END, START, random_weights, tiny_tokenizer, write_tiny_llama

if TYPE_CHECKING:
    from torch import Generator, Tensor

__all__ = [
    "CHAT_TEMPLATE",
    "END",
    "START",
    "random_weights",
    "tiny_tokenizer",
    "write_tiny_cohere2",
    "write_tiny_gemma2",
    "write_tiny_gemma3",
    "write_tiny_gemma4",
    "write_tiny_gemma4_e",
    "write_tiny_gpt_oss",
    "write_tiny_granite_hybrid",
    "write_tiny_granite_swa",
    "write_tiny_lfm2",
    "write_tiny_llama",
    "write_tiny_llama4",
    "write_tiny_nemotron_h",
    "write_tiny_qwen2_vl",
    "write_tiny_qwen3_5",
]


# Of all models below.
_SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}
_HYBRID: dict[str, Any] = {"tie_word_embeddings": False, "pad_token_id": None}

# What becomes of a weight of this name after `random_weights`.
Adapt = Callable[[str, "Tensor", "Generator"], None]


def _write(folder: Path, seed: int, model_class: Any, config: Any, adapt: Adapt | None = None) -> Path:
    """Write a random bf16 model of this configuration, and a tokenizer. Return the folder."""
    import torch
    from transformers import GenerationConfig

    tokenizer = tiny_tokenizer(512)
    special_ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config.update(special_ids)
    model = model_class(config)
    random_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters() if adapt is not None else ():
            adapt(name, weight, generator)
    model.generation_config = GenerationConfig(do_sample=False, **special_ids)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tiny_cohere2(folder: Path, seed: int = 0) -> Path:
    """Write a random bf16 Cohere 2: two global layers, without positions, among four with a sliding window of 128
    tokens. Return it."""
    from transformers import Cohere2Config, Cohere2ForCausalLM

    config = Cohere2Config(
        **_SHAPE,
        num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        sliding_window=128,
    )
    return _write(folder, seed, Cohere2ForCausalLM, config)


def write_tiny_gemma2(folder: Path, seed: int = 0, cap: float = 3.0) -> Path:
    """Write a random bf16 Gemma 2: two global layers among two with a sliding window of 128 tokens. Return it.

    Its head is tied to the embedding, as vLLM has it; what attention adds is large beside the embedding, so that it
    does not repeat its last token. cap: of attention's logits, whose standard deviation is 4.
    """
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        **_SHAPE,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=128,
        head_dim=32,
        query_pre_attn_scalar=32,
        attn_logit_softcapping=cap,
        final_logit_softcapping=30.0,
    )

    def adapt(name: str, weight: Tensor, generator: Generator) -> None:
        _scale_embedding(name, weight)
        if name.endswith("norm.weight"):  # scales by 1 + weight
            weight += _noise(weight, generator) + 2.0 * ("post_attention" in name)

    return _write(folder, seed, Gemma2ForCausalLM, config, adapt)


def write_tiny_gemma3(folder: Path, seed: int = 0, global_first: bool = False, head_size: int = 32) -> Path:
    """Write a random bf16 Gemma 3: two global layers among four with a sliding window of 128 tokens. Return it.

    Like `write_tiny_llama`'s: its head is not tied to the embedding, which would have it repeat its last token with
    certainty whatever it attends to.
    """
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        **_SHAPE,
        num_hidden_layers=6,
        layer_types=types[::-1] if global_first else types,
        sliding_window=128,
        head_dim=head_size,
        query_pre_attn_scalar=head_size,
        tie_word_embeddings=False,
    )

    def adapt(name: str, weight: Tensor, generator: Generator) -> None:
        _scale_embedding(name, weight)
        if name.endswith("norm.weight"):  # scales by 1 + weight; of q and k it undoes the gain of `random_weights`
            weight += _noise(weight, generator) + ("q_norm" in name or "k_norm" in name)

    return _write(folder, seed, Gemma3ForCausalLM, config, adapt)


def write_tiny_gemma4(folder: Path, seed: int = 0) -> Path:
    """Write a random bf16 Gemma 4 of the shape of the large ones: a token takes half as many bytes in its two global
    layers, of one KV head of size 64, as in the four with a sliding window, of four of size 32. Return it."""
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    return _write_gemma4(
        folder, seed, layer_types=types, num_key_value_heads=4, global_head_dim=64, num_global_key_value_heads=1,
        attention_k_eq_v=True,
    )  # fmt: skip


def write_tiny_gemma4_e(folder: Path, seed: int = 0) -> Path:
    """Write a random bf16 Gemma 4 of the shape of the small ones, whose last layers have no cache of their own. Return
    it.

    Global layers are 1, 3, 5 and 6, of which the last two read the cache of layer 3; layer 4 that of layer 2, through a
    sliding window of 128 tokens.
    """
    types = ["sliding_attention", "full_attention"] * 3 + ["full_attention"]
    return _write_gemma4(folder, seed, layer_types=types, global_head_dim=32, num_kv_shared_layers=3)


def _write_gemma4(folder: Path, seed: int, layer_types: list[str], **shape: Any) -> Path:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    own = {
        "num_hidden_layers": len(layer_types),
        "layer_types": layer_types,
        "sliding_window": 128,
        "head_dim": 32,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 512,
        "tie_word_embeddings": False,
    }

    def adapt(name: str, weight: Tensor, generator: Generator) -> None:
        _scale_embedding(name, weight)
        if name.endswith("norm.weight"):  # as it is, unlike Gemma 3's
            weight.copy_(1 + _noise(weight, generator))

    return _write(folder, seed, Gemma4ForCausalLM, Gemma4TextConfig(**{**_SHAPE, **own, **shape}), adapt)


def _noise(weight: Tensor, generator: Generator) -> Tensor:
    import torch

    return 0.2 * torch.randn(weight.shape, generator=generator)


def _scale_embedding(name: str, weight: Tensor) -> None:
    if name == "model.embed_tokens.weight":
        weight *= weight.shape[1] ** -0.5  # Gemma multiplies by the root


def write_tiny_gpt_oss(folder: Path, seed: int = 0, sink: float = 14.0) -> Path:
    """Write a random bf16 gpt-oss: two global layers among two with a sliding window of 128 tokens, and four experts,
    two at a time. Return it.

    sink: the mean over heads of what is learned as the logit of nothing; attention's have a standard deviation of 7.
    """
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    own = {
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
        "intermediate_size": 128,
        "head_dim": 32,
    }

    def adapt(name: str, weight: Tensor, generator: Generator) -> None:
        _set_sinks(name, weight, sink, generator)
        if name.endswith("bias"):
            weight.copy_(_noise(weight, generator))
        elif weight.dim() == 3:  # experts, from rows to columns
            weight.copy_(weight.shape[1] ** -0.5 * torch.randn(weight.shape, generator=generator))

    return _write(folder, seed, GptOssForCausalLM, GptOssConfig(**{**_SHAPE, **own}), adapt)


def write_tiny_granite_swa(folder: Path, seed: int = 0, sink: float = 8.0) -> Path:
    """Write a random bf16 Granite with attention sinks: two global layers among two with a sliding window of 128
    tokens. Return it. sink: the mean over heads of the logit of nothing; attention's have a standard deviation of 4."""
    from transformers import GraniteSWAConfig, GraniteSWAForCausalLM

    config = GraniteSWAConfig(
        **_SHAPE,
        num_hidden_layers=4,
        layer_types=["full_attention", "sliding_attention"] * 2,
        sliding_window=128,
        attention_multiplier=32**-0.5,
        tie_word_embeddings=False,
    )

    def adapt(name: str, weight: Tensor, generator: Generator) -> None:
        _set_sinks(name, weight, sink, generator)

    return _write(folder, seed, GraniteSWAForCausalLM, config, adapt)


def _set_sinks(name: str, weight: Tensor, sink: float, generator: Generator) -> None:
    import torch

    if name.endswith("sinks"):
        weight.copy_(sink + torch.randn(weight.shape, generator=generator))


def write_tiny_qwen3_5(folder: Path, seed: int = 0) -> Path:
    """Write a random bf16 Qwen3.5, of text alone: two global layers, whose output is gated, among four of gated delta
    net, whose heads are the smallest that vLLM takes on CPUs. Return it. A block has 96 tokens."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        **_SHAPE,
        **_HYBRID,
        num_hidden_layers=6,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        head_dim=32,
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
        linear_conv_kernel_dim=4,
    )
    return _write(folder, seed, Qwen3_5ForCausalLM, config, _remembering)


def write_tiny_granite_hybrid(folder: Path, seed: int = 0) -> Path:
    """Write a random bf16 Granite 4 hybrid without experts: two global layers, without positions, among four of
    Mamba 2. Return it. In float32 a block has 96 tokens."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(
        **_SHAPE,
        **_HYBRID,
        num_hidden_layers=6,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        num_local_experts=0,
        shared_intermediate_size=256,
        attention_multiplier=32**-0.5,
        mamba_n_heads=8,
        mamba_n_groups=1,
        mamba_d_state=32,
        mamba_d_head=32,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_chunk_size=32,
    )
    return _write(folder, seed, GraniteMoeHybridForCausalLM, config, _remembering)


def write_tiny_nemotron_h(folder: Path, seed: int = 0) -> Path:
    """Write a random bf16 Nemotron-H: two global layers, without positions, among four of Mamba 2 and two of an MLP.
    Return it."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = NemotronHConfig(
        **_SHAPE,
        **_HYBRID,
        layers_block_type=["linear_attention", "linear_attention", "full_attention", "mlp"] * 2,
        head_dim=32,
        mamba_num_heads=8,
        mamba_head_dim=32,
        ssm_state_size=32,
        n_groups=1,
        conv_kernel=4,
        chunk_size=32,
    )
    return _write(folder, seed, NemotronHForCausalLM, config, _remembering)


def write_tiny_lfm2(folder: Path, seed: int = 0) -> Path:
    """Write a random bf16 LFM2: two global layers among four of short convolutions. Return it."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        **_SHAPE,
        **_HYBRID,
        num_hidden_layers=6,
        layer_types=["conv", "conv", "full_attention"] * 2,
        conv_L_cache=3,
        conv_dim=128,  # this and the next one are for vLLM
        block_dim=128,
        block_auto_adjust_ff_dim=False,
    )
    return _write(folder, seed, Lfm2ForCausalLM, config, _remembering)


def write_tiny_llama4(folder: Path, seed: int = 0) -> Path:
    """Write a random bf16 Llama 4 without experts: two global layers, without positions, among four that attend within
    chunks of 128 tokens. Return it."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        **_SHAPE,
        **_HYBRID,
        intermediate_size_mlp=256,
        num_hidden_layers=6,
        no_rope_layers=[1, 1, 0] * 2,
        layer_types=["chunked_attention", "chunked_attention", "full_attention"] * 2,
        attention_chunk_size=128,
        head_dim=32,
        moe_layers=[],
        interleave_moe_layer_step=0,
    )
    return _write(folder, seed, Llama4ForCausalLM, config, _remembering)


def _remembering(name: str, weight: Tensor, generator: Generator) -> None:
    """Recurrent layers remember for some hundred tokens."""
    import torch

    last = name.rpartition(".")[2]
    if weight.dim() == 3:  # a convolution over as many tokens as its last axis is long
        weight.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
    elif last == "A_log":  # how fast each head forgets
        weight.copy_(torch.linspace(0.02, 0.5, len(weight)).log())
    elif name.endswith(("q_norm.weight", "k_norm.weight", "q_layernorm.weight", "k_layernorm.weight")):
        weight += 1  # whether it scales by that or by one more: it undoes the gain of `random_weights`
    elif last in ("dt_bias", "D") or (last == "bias" and "conv" in name):
        weight.normal_(0.0, 0.5, generator=generator)


def write_tiny_qwen2_vl(folder: Path, seed: int = 0) -> Path:
    """Write a random bf16 Qwen2-VL with its processor: 3 layers, 4 query and 2 KV heads of size 32. Return it.

    In a prompt an image is `<|vision_start|><|image_pad|><|vision_end|>`, and takes a token for 28 x 28 pixels.
    """
    import torch
    from transformers import (
        GenerationConfig,
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = tiny_tokenizer(508)
    own = {"vision_start": "vision_start", "vision_end": "vision_end", "image": "image_pad", "video": "video_pad"}
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{name}|>" for name in own.values()]})
    own_ids = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in own.items()}
    special_ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {
        **_SHAPE,
        "num_hidden_layers": 3,
        "vocab_size": len(tokenizer),
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]},
        **special_ids,
        **own_ids,
    }
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **own_ids)
    model = Qwen2VLForConditionalGeneration(config)
    random_weights(model, seed)
    model.generation_config = GenerationConfig(do_sample=False, **special_ids)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT_TEMPLATE
    )
    processor.save_pretrained(folder)
    return folder
