"""Each attention layer's output projection, as scoring wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_defensive.compat.base import get_logger

logger = get_logger("kv_eviction")

# What the models of vLLM call the linear layer that follows attention, in the module that holds the attention.
NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo", "attention_output", "proj")


def output_slices(model: nn.Module, attention_name: str, num_heads: int, head_size: int) -> Tensor | None:
    """`Wo` of one layer as `[Q, D, M]` in the model's dtype, or None (with a warning) if it cannot be recognised.

    attention_name: the layer's name in the KV cache config, such as `model.layers.0.self_attn.attn`.

    The layer may hold its weight quantised, transposed or packed for the CPU, so we do not look at the weight: we push
    unit vectors through the layer, once, and read the rows that come out. Only where it is certain what the weight is,
    as on GPUs without quantisation, a view of it is returned: 32 copies of a large matrix are memory that a KV cache
    could use.
    """
    width = num_heads * head_size
    parent_name = attention_name.rpartition(".")[0]
    try:
        parent = model.get_submodule(parent_name)
    except AttributeError:
        parent = None
    for name in NAMES:
        linear = getattr(parent, name, None)
        if linear is None or getattr(linear, "input_size_per_partition", None) != width:
            continue
        if _holds_plain_weight(linear, width):
            return linear.weight.detach().t().unflatten(0, (num_heads, head_size))
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        device = next(model.parameters()).device
        with torch.inference_mode():
            unit = torch.eye(width, dtype=dtype, device=device)
            rows = linear.quant_method.apply(linear, unit, bias=None)
        return rows.view(num_heads, head_size, -1).contiguous()
    logger.warning_once("KV eviction: no output projection found beside attention; policies go without value norms")
    return None


def _holds_plain_weight(linear: Any, width: int) -> bool:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.platforms import current_platform

    return (
        current_platform.is_cuda()
        and type(linear.quant_method) is UnquantizedLinearMethod
        and linear.weight.dim() == 2
        and linear.weight.shape[1] == width
    )


class Projections:
    """The output projections of a KV cache group's layers, taken apart when a policy first needs them."""

    def __init__(self, model: nn.Module, attention_names: Sequence[str], num_heads: int, head_size: int) -> None:
        """num_heads: query heads of this rank."""
        self._model, self._names = model, attention_names
        self._shape = (num_heads, head_size)
        self.forget()

    def forget(self) -> None:
        """The model has other weights now: take its projections apart anew when they are next needed."""
        self._slices: list[Tensor | None] | None = None
        self._factors: list[Tensor | None] | None = None

    def slices(self, layer: int) -> Tensor | None:
        """`Wo` of one layer by query head, `[Q, D, M]`; None if the model's projection was not recognised."""
        if self._slices is None:
            self._slices = [output_slices(self._model, name, *self._shape) for name in self._names]
        return self._slices[layer]

    def factor(self, layer: int) -> Tensor | None:
        """`C` of `C C^T = Wo Wo^T` of one layer by query head, `[Q, D, D]` in the model's dtype, or None."""
        if self._factors is None:
            from vllm_defensive_kernels import gram_factor

            parts = [output_slices(self._model, name, *self._shape) for name in self._names]
            self._factors = [None if part is None else gram_factor(part) for part in parts]
        return self._factors[layer]
