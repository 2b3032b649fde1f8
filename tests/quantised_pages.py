"""What a cache of quantised pages gives back, by the audit of an eviction and the formulas of the pages."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_defensive.audit import Audit
from vllm_defensive_kernels.quantised import requantised
from vllm_defensive_kernels.widths import CLASSES


def packed_by(audit: Audit, layer: int, key_HTD: Tensor, value_HTD: Tensor) -> tuple[Tensor, Tensor]:
    """K and V of a layer's tokens up to the stop as they are read after the eviction; what was evicted as it was.

    A head's tokens of one class fill its pages in ascending order, and a page's keys share steps and minima.
    """
    key_HTD, value_HTD = key_HTD.clone(), value_HTD.clone()
    for head in range(len(key_HTD)):
        positions, classes = audit.positions(layer, head).long(), audit.classes(layer, head)
        for place, (name, tokens) in enumerate(zip(audit.page_classes, audit.page_tokens, strict=True)):
            width = CLASSES[name]
            held = positions[classes == place]
            for page in held.split(tokens) if width.quantised and len(held) else ():
                count = torch.tensor([len(page)])
                for kind, keys in ((key_HTD, True), (value_HTD, False)):
                    kind[head, page] = requantised(kind[head, page][None], count, width, keys=keys)[0].to(kind.dtype)
    return key_HTD, value_HTD
