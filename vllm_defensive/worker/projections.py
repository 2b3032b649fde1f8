"""Each attention layer's output projection, as scoring wants it: one matrix a query head.

A layer may hold its weight quantised, transposed or packed for the CPU, so we do not look at the weight: we push unit
vectors through the layer and read the rows that come out. Only where it is certain what the weight is, as on GPUs
without quantisation, a view of it is taken, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vllm_defensive.compat.base import get_logger

logger = get_logger("kv_eviction")

# What the models of vLLM call the linear layer that follows attention, in the module that holds the attention.
NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo", "attention_output", "proj")


# Unit vectors that are pushed through a layer at once, and heads that are factored at once: both bound temporaries.
UNITS = 1024
FACTORED_HEADS = 8
_ONE_FOR_ALL = -1


def output_layer(model: nn.Module, attention_name: str, width: int) -> Any:
    """The linear layer that takes attention's `width` numbers a token, or None (with a warning): not recognised.

    attention_name: the layer's name in the KV cache config, such as `model.layers.0.self_attn.attn`.
    """
    try:
        parent = model.get_submodule(attention_name.rpartition(".")[0])
    except AttributeError:
        parent = None
    for name in NAMES:
        linear = getattr(parent, name, None)
        if linear is not None and getattr(linear, "input_size_per_partition", None) == width:
            return linear
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
    """The output projections of a KV cache group's layers, taken apart when a policy first needs them.

    Slices that are no views of a weight are made by as much work as `Q*D` tokens take in that layer. With `keep` they
    are made once, and take the memory of the matrices in the model's dtype. Without, they are made whenever they are
    asked for, in one buffer for all layers: what was got before is overwritten. Factors are small, and always kept.
    """

    def __init__(
        self,
        model: nn.Module,
        attention_names: Sequence[str],
        num_heads: int,
        head_size: int,
        keep: bool = True,
    ) -> None:
        """num_heads: query heads of this rank."""
        self._model, self._names = model, attention_names
        self._shape, self._width = (num_heads, head_size), num_heads * head_size
        self._keep = keep
        self.forget()

    def forget(self) -> None:
        """The model has other weights now: take its projections apart anew when they are next needed."""
        self._layers: dict[int, Any] = {}
        self._rows: dict[int, Tensor] = {}  # by layer, or one for all
        self._factors: dict[int, Tensor | None] = {}

    def found(self, layer: int) -> bool:
        """Whether the layer's projection was recognised."""
        return self._layer(layer) is not None

    def slices(self, layer: int) -> Tensor | None:
        """`Wo` of one layer by query head, `[Q, D, M]`; None if the model's projection was not recognised."""
        if (linear := self._layer(layer)) is None:
            return None
        if _holds_plain_weight(linear, self._width):
            return self._cut(linear)
        key = layer if self._keep else _ONE_FOR_ALL
        if not self._keep or key not in self._rows:
            self._rows[key] = self._push(linear, self._rows.get(key))
        return self._rows[key].unflatten(0, self._shape)

    def factor(self, layer: int) -> Tensor | None:
        """`C` of `C C^T = Wo Wo^T` of one layer by query head, `[Q, D, min(D, M)]` in the model's dtype, or None."""
        if layer not in self._factors:
            from vllm_defensive_kernels import gram_factor

            linear = self._layer(layer)
            parts = () if linear is None else self._cut(linear).split(FACTORED_HEADS)
            self._factors[layer] = torch.cat([gram_factor(part) for part in parts]) if parts else None
        return self._factors[layer]

    def bytes_at_most(self) -> tuple[int, int]:
        """(what is held for good once every policy has been seen, what making it takes beside that), without `keep`."""
        heads, head_size = self._shape
        layers = [linear for layer in range(len(self._names)) if (linear := self._layer(layer)) is not None]
        if not layers:
            return 0, 0
        hidden, item = max(_output_size(linear) for linear in layers), self._dtype.itemsize
        factors = len(layers) * self._width * min(head_size, hidden) * item
        factoring = 3 * min(FACTORED_HEADS, heads) * head_size * hidden * torch.float32.itemsize
        if all(_holds_plain_weight(linear, self._width) for linear in layers):
            return factors, factoring
        # The layer's own copies of a strip, quantised and as sums, are no larger than the strip in float32.
        pushing = min(UNITS, self._width) * (self._width + hidden) * (item + torch.float32.itemsize)
        return factors + self._width * hidden * item, max(factoring, pushing)

    def _layer(self, layer: int) -> Any:
        if layer not in self._layers:
            self._layers[layer] = output_layer(self._model, self._names[layer], self._width)
        return self._layers[layer]

    def _cut(self, linear: Any) -> Tensor:
        """`[Q, D, M]`, a view of the layer's weight, or nobody else's."""
        plain = _holds_plain_weight(linear, self._width)
        return (linear.weight.detach().t() if plain else self._push(linear, None)).unflatten(0, self._shape)

    @property
    def _dtype(self) -> torch.dtype:
        """The model's: the first of its parameters that is not a quantised one."""
        wide = (p.dtype for p in self._model.parameters() if p.is_floating_point() and p.dtype.itemsize > 1)
        return next(wide, torch.float32)

    @torch.inference_mode()
    def _push(self, linear: Any, out_XM: Tensor | None) -> Tensor:
        """What the layer makes of each unit vector, `[Q*D, M]`; written to `out_XM` if there is one."""
        device = next(self._model.parameters()).device
        for first in range(0, self._width, UNITS):
            unit = torch.zeros(min(UNITS, self._width - first), self._width, dtype=self._dtype, device=device)
            unit.diagonal(first).fill_(1)
            rows = linear.quant_method.apply(linear, unit, bias=None)
            if out_XM is None:
                out_XM = rows.new_empty(self._width, rows.shape[1])
            out_XM[first : first + len(rows)] = rows
        assert out_XM is not None
        return out_XM


def _output_size(linear: Any) -> int:
    return int(getattr(linear, "output_size_per_partition", None) or linear.output_size)
