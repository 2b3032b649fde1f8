"""The reconstruction score: how much a token is needed to say its document again (KVzip, arXiv 2505.23416).

Once a document of S tokens is in the cache, the model repeats it: tokens that stand at positions S, S + 1, ... and are
thrown away afterwards, the *echoes*. A document token's score is the largest attention that any echo's query, of any
query head of the group, pays it. It needs no question, so it serves questions that come later.

Axes: H KV heads, G query heads a KV head, Q = H*G, S document tokens, T echoes of one step, X keys in the cache,
Y keys that take part in the softmax, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_defensive_kernels.formulas import attention_tiles

NORMALISED = ("all", "chunk")
# Of a tile of attention: the logits and their softmax, 2 MB each, are what a core's own cache holds.
TILE_ELEMENTS = 2**19


def taking_part(document: int, scored: tuple[int, int], normalised: str, sink: int) -> tuple[int, int, int]:
    """(leading, begin, end): the document's tokens in the softmax are `[0, leading)` and `[begin, end)`.

    "all": all of them. "chunk": the first `sink` and those that are scored, none of them twice.
    """
    first, last = scored
    return (0, 0, document) if normalised == "all" else (min(sink, first), first, last)


def reconstruct_attention(
    peak_HS: Tensor,
    query_TQD: Tensor,
    key_HXD: Tensor,
    scale: float,
    *,
    scored: tuple[int, int],
    first: int,
    normalised: str,
    sink: int = 0,
    cap: float = 0.0,
    void_Q: Tensor | None = None,
) -> None:
    """Raise the scores of document tokens to the largest attention that these echoes pay them. In place, fp32 [H, S].

    query_TQD: of the echoes at positions `first`, `first + 1`, ... (after RoPE), any float dtype. key_HXD: of the
        document, then of all echoes from position S to these at least; an echo sees none that is later than itself.
    scored: positions `[a, b)` that are scored.
    normalised: "all": softmax over everything that an echo sees, as the model's own. "chunk", the paper's: over the
        first `sink` tokens, the scored ones and the echoes. With `(0, S)` both are the same. Where the model's own
        softmax has a logit of nothing (cap, void_Q: as in `formulas.window_attention`), both have it.

    `2*Q*D*Y` flops and Q*Y exponentials an echo, Y the keys that take part: half the products of attention over them.
    In tiles of queries, head by head: a temporary has 2 MB, or G*Y numbers if these are more, beside one head's keys in
    fp32; each tile reads these, `4*D*Y` bytes, anew.
    """
    (heads, document), (echoes, query_heads, _) = peak_HS.shape, query_TQD.shape
    assert 0 <= scored[0] < scored[1] <= document <= first, f"{scored} of {document} tokens, echoes from {first} on"
    assert first + echoes <= key_HXD.shape[1], f"{key_HXD.shape[1]} keys for echoes up to {first + echoes}"
    leading, begin, end = taking_part(document, scored, normalised, sink)
    columns = slice(leading + scored[0] - begin, leading + scored[1] - begin)
    group = query_heads // heads
    for head, key_XD in enumerate(key_HXD):
        some = slice(head * group, (head + 1) * group)
        query_TGD, void_G = query_TQD[:, some], None if void_Q is None else void_Q[some]
        key_YD = torch.cat([key_XD[:leading], key_XD[begin:end], key_XD[document : first + echoes]])
        peak_A = peak_HS[head, scored[0] : scored[1]]
        for attention_1GWY in attention_tiles(query_TGD, key_YD[None], scale, TILE_ELEMENTS, cap, void_G):
            torch.maximum(peak_A, attention_1GWY[0, ..., columns].amax(dim=(0, 1)), out=peak_A)
