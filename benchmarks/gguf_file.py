"""What the converters of all architectures read of a GGUF file, and what its tensors are called elsewhere."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where they are used: a model that is there already costs no import of torch
    import torch
    from gguf import GGUFReader, ReaderTensor

TOP_LEVEL_NAMES = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"},
)
LAYER_NAMES = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)


def field(reader: GGUFReader, key: str) -> Any:
    """The value of a metadata field; ValueError if the file lacks it."""
    entry = reader.fields.get(key)
    if entry is None:
        raise ValueError(f"the GGUF file has no field {key!r}")
    return entry.contents()


def hugging_face_name(gguf_name: str) -> str:
    """`blk.7.attn_q.weight` -> `model.layers.7.self_attn.q_proj.weight`; KeyError for a tensor Llama does not have."""
    module, _, kind = gguf_name.rpartition(".")
    if not module.startswith("blk."):
        return f"{TOP_LEVEL_NAMES[module]}.{kind}"
    _, layer, part = module.split(".")
    return f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}"


def dequantised(tensor: ReaderTensor) -> torch.Tensor:
    """A tensor's numbers in float32."""
    import torch
    from gguf.quants import dequantize

    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
