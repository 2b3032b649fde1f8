"""From scores to pages: which tokens each (layer, head) keeps when whole pages are handed out.

A head's scores, sorted downwards and summed in runs of N, are the gains of its pages, and they fall: taking the best
pages of a budget's scope is therefore the exact optimum of Ada-KV's objective (arXiv 2407.11550) under paging.
Sorting is torch's; the kernel then writes each head's kept tokens in ascending order without a second sort.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_defensive_kernels import formulas, reference
from vllm_defensive_kernels.addressing import runs_triton
from vllm_defensive_kernels.checks import refuse, require_choice, require_dtype, require_int, require_shape

BLOCK = 1024


@triton.jit(do_not_specialize=["first_token"])
def _pack_tokens_kernel(
    token_ptr, score_ptr, sorted_ptr, count_ptr, first_ptr, first_token, candidates, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr + row)
    if count == 0:
        return
    scores = score_ptr + row * candidates
    lowest = tl.load(sorted_ptr + row * candidates + count - 1)
    above = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, candidates, BLOCK):
        t = begin + tl.arange(0, BLOCK)
        score = tl.load(scores + t, mask=t < candidates, other=float("-inf"))
        above += (score > lowest).to(tl.int32)
    room = count - tl.sum(above, 0)  # among equals of the lowest kept score, the first tokens win
    out = token_ptr + tl.load(first_ptr + row)
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


class PageSelection(NamedTuple):
    """offset_O: int32 `[L*H + 1]`, first page of each head. token_T: int32 `[pages * N]`, kept prompt positions,
    ascending within a head, in the order of the pages."""

    offset_O: Tensor
    token_T: Tensor


def select_pages(
    score_LHE: Tensor,
    budget_pages: int,
    page_tokens: int,
    *,
    scope: str = "model",
    forced_tokens: int = 0,
    min_pages: int = 0,
    layer_budget_L: Tensor | None = None,
    first_token: int = 0,
) -> PageSelection:
    """Hand out exactly `budget_pages * L * H` pages to the heads that gain most by them, and list the tokens they keep.

    score_LHE: fp32 `[L, H, E]`, scores of the evictable tokens `[first_token, first_token + E)`, E a multiple of
        page_tokens. Neither NaN nor -inf; the caller's tensor is not changed.
    budget_pages: `K`, pages a head has on average. scope: who shares a budget: "head" (each gets K), "layer" (its H
        heads share K*H), "model" (all share K*L*H).
    forced_tokens: this many tokens at the end are kept by every head. min_pages: what every head gets at least.
    layer_budget_L: int `[L]` on the device, pages a head on average of each layer, instead of K; scope "head" or
        "layer". Their sum must be `K*L` and none may exceed `E / page_tokens`: unchecked, as reading them would wait.

    Ties: the lowest (layer, head, token) wins. Raises ValueError for arguments that do not fit. No host sync.
    """
    require_shape("score_LHE", score_LHE, (None, None, None))
    require_dtype("score_LHE", score_LHE, (torch.float32,))
    require_choice("scope", scope, ("head", "layer", "model"))
    layers, heads, candidates = score_LHE.shape
    require_int("page_tokens", page_tokens, 1)
    if candidates % page_tokens:
        refuse("score_LHE.shape[2]", candidates, f"a multiple of page_tokens={page_tokens}")
    most = candidates // page_tokens
    require_int("budget_pages", budget_pages, 0, most)
    require_int("forced_tokens", forced_tokens, 0, budget_pages * page_tokens)
    require_int("min_pages", min_pages, 0, budget_pages)
    if layer_budget_L is not None:
        require_shape("layer_budget_L", layer_budget_L, (layers,))
        if scope == "model":
            refuse("scope", scope, "'head' or 'layer' together with layer_budget_L")

    score_RE = score_LHE.reshape(layers * heads, candidates)
    if forced_tokens:
        score_RE = score_RE.clone()
        score_RE[:, candidates - forced_tokens :] = float("inf")
    sorted_RE = score_RE.sort(dim=-1, descending=True).values
    device = score_RE.device
    budget_L = torch.full((layers,), budget_pages, device=device) if layer_budget_L is None else layer_budget_L.long()
    if scope == "head":
        pages_R = budget_L.repeat_interleave(heads, output_size=layers * heads)
    else:
        gains_RJ = formulas.page_gains(sorted_RE, page_tokens)
        gains_RJ[:, :min_pages] = float("inf")
        shared = layers if scope == "model" else 1
        gains_UJ = gains_RJ.view(layers // shared, -1)
        kept_UJ = formulas.keep_best(gains_UJ, budget_L.view(-1, shared).sum(1) * heads)
        pages_R = kept_UJ.view(layers * heads, most).sum(1)
    offset_O = torch.zeros(layers * heads + 1, dtype=torch.int32, device=device)
    offset_O[1:] = pages_R.cumsum(0)
    count_R, total = pages_R * page_tokens, budget_pages * layers * heads * page_tokens
    if not runs_triton(score_RE):
        return PageSelection(offset_O, reference.pack_tokens(score_RE, sorted_RE, count_R, first_token, total))
    token_T = torch.empty(total, dtype=torch.int32, device=device)
    if total:
        _pack_tokens_kernel[(layers * heads,)](
            token_T, score_RE.contiguous(), sorted_RE, count_R, count_R.cumsum(0) - count_R, first_token, candidates,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return PageSelection(offset_O, token_T)
