"""What evictions packed, by depth of the layers."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_defensive.counts import DECILES


def layer_deciles(num_layers: int, device: torch.device | str = "cpu") -> Tensor:
    """The tenth of the layers that each of them belongs to, by depth. int64 [L], 0 to 9."""
    return torch.arange(num_layers, device=device) * DECILES // num_layers


def pages_by_decile(pages_L: Tensor, decile_L: Tensor) -> Tensor:
    """Pages of layers (int64 [L]) summed over each tenth of them, int64 [10]. Nothing is read back from the device."""
    return torch.zeros(DECILES, dtype=torch.int64, device=pages_L.device).index_add_(0, decile_L, pages_L)
