"""From a threshold a head to the tokens that it keeps: how many they are, and which is the lowest score among them, is
found in torch (`vllm_defensive.policy.select`); the kernel writes them in ascending order without a second sort."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_defensive_kernels import reference
from vllm_defensive_kernels.addressing import runs_triton
from vllm_defensive_kernels.checks import refuse, require_dtype, require_int, require_shape

BLOCK = 1024


@triton.jit(do_not_specialize=["first_token"])
def _list_kept_kernel(
    token_ptr, score_ptr, last_ptr, offset_ptr, first_token, candidates, N: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(offset_ptr + row)
    count = (tl.load(offset_ptr + row + 1) - first) * N
    if count == 0:
        return
    scores = score_ptr + row * candidates
    lowest = tl.load(last_ptr + row)
    above = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, candidates, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        score = tl.load(scores + t, mask=t < candidates, other=float("-inf"))
        above += (score > lowest).to(tl.int32)
    room = count - tl.sum(above, 0)  # among equals of the lowest kept score, the first tokens win
    out = token_ptr + first.to(tl.int64) * N
    written = 0
    ties = 0
    for begin in range(0, candidates, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        score = tl.load(scores + t, mask=t < candidates, other=float("-inf"))
        tied = ((score == lowest) & (t < candidates)).to(tl.int32)
        kept = (score > lowest) | ((tied > 0) & (ties + tl.cumsum(tied, 0) <= room))
        place = written + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(out + place, first_token + t, mask=kept)
        written += tl.sum(kept.to(tl.int32), 0)
        ties += tl.sum(tied, 0)


def list_kept(
    score_RE: Tensor, last_R1: Tensor, offset_O: Tensor, *, pages: int, page_tokens: int, first_token: int
) -> Tensor:
    """List the best tokens of each row (a head of a layer), as many as fill its pages. -> int32 `[pages, N]`:
    positions, ascending within a row, row after row.

    score_RE: fp32, contiguous, neither NaN nor -inf; column 0 is position `first_token`. last_R1: fp32, the lowest
        score that a row keeps; of a row that keeps none, anything. offset_O: int32 `[R + 1]`, first page of each row,
        and `pages` at the end: unchecked, as reading would wait.

    Ties: the lowest token wins. Raises ValueError for arguments that do not fit. No host sync.
    """
    require_shape("score_RE", score_RE, (None, None))
    rows, candidates = score_RE.shape
    require_shape("last_R1", last_R1, (rows, 1))
    require_shape("offset_O", offset_O, (rows + 1,))
    require_dtype("score_RE", score_RE, (torch.float32,))
    require_dtype("last_R1", last_R1, (torch.float32,))
    require_dtype("offset_O", offset_O, (torch.int32,))
    if not score_RE.is_contiguous():
        refuse("score_RE.stride()", score_RE.stride(), "contiguous rows")
    require_int("page_tokens", page_tokens, 1)
    require_int("pages", pages, 0, rows * candidates // page_tokens)
    if not runs_triton(score_RE):
        return reference.list_kept(
            score_RE, last_R1, offset_O, pages=pages, page_tokens=page_tokens, first_token=first_token
        )
    token_PN = torch.empty(pages, page_tokens, dtype=torch.int32, device=score_RE.device)
    if pages:
        _list_kept_kernel[(rows,)](
            token_PN, score_RE, last_R1, offset_O, first_token, candidates, N=page_tokens, BLOCK=BLOCK, num_warps=4
        )
    return token_PN
