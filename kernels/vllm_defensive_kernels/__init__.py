"""Kernels of vllm_defensive: each op is a Triton kernel, a readable PyTorch reference of the same signature
(`reference`) and a wrapper that checks its arguments, runs the kernel on CUDA and the reference elsewhere. Needs torch
and Triton only.

Axes, used as suffixes of tensor names: `L` layers, `H` KV heads of this rank, `G` query heads a KV head, `Q = H*G`
query heads, `W` window queries, `R` rows of a batch, `T` tokens, `E` evictable tokens, `N` tokens a page, `D` head
size, `P` pages, `K` fresh blocks, `O` page offsets, `S` slots of `PackedState`, `C` columns of a projection, or classes
of pages, `n` tokens a quantised page.

One convention for storage (`pages.PagedKV`): the cache is seen as **head pages**, `N` tokens of one KV head of one
layer, through two strided views `key_PND` and `value_PND` of one buffer. The page of a (layer, head, block) is

    page(l, h, b) = layer_page_L[l] + b * block_pages + h * head_pages              (int64, in units of pages)

which covers every layout of vLLM's cache: block or layer outermost, heads or tokens inside, K and V interleaved or not
(`pages.PageAddresses`, where a block may also hold several pages of a head, though the kernels read one).

What a request keeps (`pages.PackedState`): flat page `q` of its packed region lives in block `fresh[q // (L*H)]` at
inner position `q % (L*H)`, whose (layer slot, head slot) is `divmod(inner, H)`; of its pages of class c, head (l, h)
owns `q in [offset[x], offset[x + 1])` with `x = c*L*H + l*H + h`. Before them lie `shared` whole blocks at their
ordinary positions, after them the ordinary blocks from `growth` on. A page of class 16 is `N` tokens as the cache has
them; of other classes it holds, in as many bytes, `n` tokens as codes (`widths`). A head's last page of a class has
room left only where the head keeps every token of the region, so that nothing else need say how many there are.
"""

from __future__ import annotations

import importlib
from typing import Any

# Modules are named differently from their functions, so that a submodule never hides the function of its name; they
# load on first use, because importing Triton costs time that a process without eviction should not pay.
_EXPORTS = {
    "MAX_HEAD_SIZE": "pages",
    "PageAddresses": "pages",
    "PagedKV": "pages",
    "PackedState": "pages",
    "PackedSource": "pages",
    "RaggedTokens": "pages",
    "WindowScores": "window",
    "window_scores": "window",
    "value_norm": "norms",
    "reconstruction_scores": "reconstruction",
    "learned_scores": "foretold",
    "learned_page_scores": "foretold",
    "Rotation": "learned",
    "gram_factor": "formulas",
    "list_kept": "selection",
    "compact": "compaction",
    "compact_quantised": "quantised_compaction",
    "ragged_paged_decode": "decode",
    "DecodeWorkspace": "decode",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
