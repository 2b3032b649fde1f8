"""A learned score: how much a token is needed to say its document again, foretold from its own key and value.

The reconstruction score (`echo.py`) asks a second pass over the document. Its logarithm is a linear function of the
token's key, as it was before RoPE turned it, and of its value, to within what matters for choosing: no query, no other
token, and no position is read. So any token that is in the cache can be scored at any moment. KVzap (arXiv 2601.07891)
foretells the same score from hidden states, with trained weights.

Axes: H KV heads, T tokens, D head size, R numbers of a head that RoPE turns, X = 2*D + 1 weights a head: those of the
un-rotated key, those of the value, and a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SINKS = 4
"""First tokens of a sequence: all of a model's attention that has nowhere else to go is theirs, and they score 1."""


@dataclass(frozen=True)
class Rotation:
    """How a layer turns its keys.

    table_PR: `[positions, R]`, any float dtype: for each position the cosines of the R/2 angles, then their sines, both
        with the factor that YaRN and LongRoPE put on them. The numbers of a head from R on are not turned.
    interleaved: the pairs that are turned are neighbours (GPT-J), instead of R/2 apart (GPT-NeoX).
    """

    table_PR: Tensor
    interleaved: bool = False


def unrotate(key_HTD: Tensor, position_T: Tensor, rotation: Rotation | None) -> Tensor:
    """Keys as they were before RoPE. fp32, same shape.

    position_T: int64 `[T]`, or `[H, T]` where heads hold different tokens. None: the layer does not turn them.
    """
    key_HTD = key_HTD.float()
    if rotation is None:
        return key_HTD
    turned = rotation.table_PR.shape[1]
    cosine, sine = rotation.table_PR[position_T].float().chunk(2, dim=-1)
    # The inverse of a turn with a factor is the turn back over the factor's square; rounded tables have one, too.
    square = cosine.square() + sine.square()
    first, second = _pairs(key_HTD[..., :turned], rotation.interleaved)
    back = (first * cosine + second * sine) / square, (second * cosine - first * sine) / square
    joined = torch.stack(back, dim=-1).flatten(-2) if rotation.interleaved else torch.cat(back, dim=-1)
    return torch.cat([joined, key_HTD[..., turned:]], dim=-1)


def _pairs(key_HTR: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return key_HTR[..., ::2], key_HTR[..., 1::2]
    first, second = key_HTR.chunk(2, dim=-1)
    return first, second


def foretold_peaks(
    key_HTD: Tensor,
    value_HTD: Tensor,
    position_T: Tensor,
    weight_HX: Tensor,
    rotation: Rotation | None,
) -> Tensor:
    """The largest attention that a query of a second pass would pay each token, foretold: fp32 `[H, T]`, in (0, 1].

    min(exp(w . [un-rotated key, value, 1]), 1); the first tokens of the sequence have 1.

    key_HTD, value_HTD: any float dtype. position_T: as in `unrotate`. weight_HX: fp32.
    """
    size = key_HTD.shape[2]
    of_key, of_value, constant = weight_HX.split([size, size, 1], dim=1)
    log_HT = constant + (unrotate(key_HTD, position_T, rotation) @ of_key[..., None]).squeeze(-1)
    log_HT += (value_HTD.float() @ of_value[..., None]).squeeze(-1)
    return log_HT.clamp_max_(0).exp_().masked_fill_(position_T < SINKS, 1.0)
