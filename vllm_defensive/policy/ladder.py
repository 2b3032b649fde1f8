"""Pages of several classes by what they distort: the ladder of RDKV (arXiv 2605.08317), in whole pages.

Axes: R rows (a head of a layer), E evictable tokens, V ways to split a row's pages over C classes.
"""

from functools import lru_cache

import torch
from torch import Tensor

from vllm_defensive.packing import Format

DISTORTION = {"16": 0.0, "8": 4.8e-5, "4": 0.0138}
"""Of a value in so many bits, relative to its square (RDKV's constants, found by its authors' calibration); what is
evicted loses 1."""
GAINS_AT_A_TIME = 2**22  # of rows times splits, 32 MiB each


def least_distorted(sorted_RE: Tensor, format: Format, head_pages: int) -> Tensor:
    """Of the ways to split a row's `head_pages` pages over the classes, the one that distorts least, a token counting
    by its score. sorted_RE: fp32, downwards: the best tokens are in the widest pages. -> int64 [C, R]."""
    tokens, device = sorted_RE.shape[1], sorted_RE.device
    sizes = torch.tensor([part.tokens for part in format.parts], device=device)
    splits_VC = _splits(head_pages).to(device)
    upto_VC = (splits_VC * sizes).cumsum(1).clamp_max(tokens)
    # The gain of a split is that of its classes' runs of tokens.
    sum_RE = torch.nn.functional.pad(sorted_RE.double().cumsum(1), (1, 0))
    best = []
    for some_RE in sum_RE.split(max(1, GAINS_AT_A_TIME // len(splits_VC))):
        gain_RV = torch.zeros(len(some_RE), len(splits_VC), dtype=torch.float64, device=device)
        from_V = torch.zeros_like(upto_VC[:, 0])
        for part, upto_V in zip(format.parts, upto_VC.T, strict=True):
            gain_RV += (1 - DISTORTION[part.page_class]) * (some_RE[:, upto_V] - some_RE[:, from_V])
            from_V = upto_V
        best.append(gain_RV.argmax(dim=1))
    return splits_VC[torch.cat(best)].T


@lru_cache(maxsize=8)
def _splits(pages: int) -> Tensor:
    """All ways to share pages out over three classes, those with the most in the first classes first. int64 [V, 3]."""
    first, second = torch.meshgrid(torch.arange(pages, -1, -1), torch.arange(pages, -1, -1), indexing="ij")
    possible = first + second <= pages
    first, second = first[possible], second[possible]
    return torch.stack([first, second, pages - first - second], dim=1)
