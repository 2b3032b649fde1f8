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


@triton.jit
def _room(score_row, candidates, lowest, count, BLOCK: tl.constexpr):
    """How many equals of the lowest kept score a row keeps: those of the first tokens."""
    above = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, candidates, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        score = tl.load(score_row + t, mask=t < candidates, other=float("-inf"))
        above += (score > lowest).to(tl.int32)
    return count - tl.sum(above, 0)


@triton.jit(do_not_specialize=["first_token"])
def _list_kept_kernel(
    token_ptr, score_ptr, last_ptr, offset_ptr, taken_ptr, taken_last_ptr, first_token, candidates,
    N: tl.constexpr, BLOCK: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(offset_ptr + row)
    count = (tl.load(offset_ptr + row + 1) - first) * N
    if count == 0:
        return
    taken = 0
    if TAKEN:
        taken = tl.load(taken_ptr + row).to(tl.int32)
        taken_lowest = tl.load(taken_last_ptr + row)
        taken_room = _room(score_ptr + row * candidates, candidates, taken_lowest, taken, BLOCK)
        taken_ties = 0
    scores = score_ptr + row * candidates
    lowest = tl.load(last_ptr + row)
    room = _room(scores, candidates, lowest, tl.minimum(taken + count, candidates), BLOCK)
    out = token_ptr + first.to(tl.int64) * N
    written = 0
    ties = 0
    for begin in range(0, candidates, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        score = tl.load(scores + t, mask=t < candidates, other=float("-inf"))
        tied = ((score == lowest) & (t < candidates)).to(tl.int32)
        kept = (score > lowest) | ((tied > 0) & (ties + tl.cumsum(tied, 0) <= room))
        ties += tl.sum(tied, 0)
        if TAKEN:
            tied = ((score == taken_lowest) & (t < candidates)).to(tl.int32)
            kept = kept & ~((score > taken_lowest) | ((tied > 0) & (taken_ties + tl.cumsum(tied, 0) <= taken_room)))
            taken_ties += tl.sum(tied, 0)
        place = written + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(out + place, first_token + t, mask=kept)
        written += tl.sum(kept.to(tl.int32), 0)


def list_kept(
    score_RE: Tensor,
    last_R1: Tensor,
    offset_O: Tensor,
    *,
    pages: int,
    page_tokens: int,
    first_token: int,
    taken_R: Tensor | None = None,
    taken_last_R1: Tensor | None = None,
) -> Tensor:
    """List the best tokens of each row (a head of a layer), as many as fill its pages. -> int32 `[pages, N]`:
    positions, ascending within a row, row after row; -1 behind the last one of a row that has no more.

    score_RE: fp32, contiguous, neither NaN nor -inf; column 0 is position `first_token`. last_R1: fp32, the lowest
        score that a row keeps; of a row that keeps none, anything. offset_O: int32 `[R + 1]`, first page of each row,
        and `pages` at the end: unchecked, as reading would wait.
    taken_R: int64 `[R]`, so many of a row's best are listed elsewhere already; taken_last_R1: fp32 `[R, 1]`, the lowest
        of these. `last_R1` is then the lowest of all, these included.

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
    require_int("pages", pages, 0, rows * -(-candidates // page_tokens))
    if taken_R is not None:
        require_shape("taken_R", taken_R, (rows,))
        require_dtype("taken_R", taken_R, (torch.int64,))
        if taken_last_R1 is None:
            refuse("taken_last_R1", None, "what goes with taken_R")
        require_shape("taken_last_R1", taken_last_R1, (rows, 1))
        require_dtype("taken_last_R1", taken_last_R1, (torch.float32,))
    if not runs_triton(score_RE):
        return reference.list_kept(
            score_RE, last_R1, offset_O, pages=pages, page_tokens=page_tokens, first_token=first_token,
            taken_R=taken_R, taken_last_R1=taken_last_R1,
        )  # fmt: skip
    shape, full = (pages, page_tokens), taken_R is None and candidates % page_tokens == 0
    token_PN = torch.empty(shape, dtype=torch.int32, device=score_RE.device)
    if not full:  # where a row has fewer tokens than its pages have room
        token_PN.fill_(-1)
    if pages:
        _list_kept_kernel[(rows,)](
            token_PN, score_RE, last_R1, offset_O, taken_R, taken_last_R1, first_token, candidates,
            N=page_tokens, BLOCK=BLOCK, TAKEN=taken_R is not None, num_warps=4,
        )  # fmt: skip
    return token_PN
