"""The learned score of one layer, of a prompt in place and of as many packed pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case, Shape, close, make_cache, shuffled
from vllm_defensive.worker.cuda import launches
from vllm_defensive_kernels import RaggedTokens, Rotation, reference
from vllm_defensive_kernels.learned import foretold_peaks

CHECKED = 512  # tokens


def learned_cases(shape: Shape, tokens: int) -> Iterator[Case]:
    """The table has the cache's dtype, as vLLM's have. Bytes: every key, value and row of the table once, weights and
    scores."""
    H, N, D = shape.heads, shape.page_tokens, shape.head_size
    pages = make_cache(shape, tokens // N + 1, 1)
    blocks = shuffled(tokens // N, shape)
    weight_HX = torch.randn(H, 2 * D + 1, device=shape.device) * D**-0.5
    angle = torch.rand(tokens, D // 2, device=shape.device) * 6
    rotation = Rotation(torch.cat([angle.cos(), angle.sin()], dim=1).to(shape.dtype))
    moved = 2 * H * tokens * shape.width + rotation.table_PR.nbytes + weight_HX.nbytes + 4 * H * tokens
    flops = 2 * 2 * H * tokens * D
    whole, few = (RaggedTokens.of([count], shape.device) for count in (tokens, min(CHECKED, tokens)))

    out_HT = torch.empty(H, tokens, device=shape.device)

    def in_place(scored: RaggedTokens = whole) -> Tensor:
        out = out_HT[:, : scored.total]
        launches.foretell(
            weight_HX, rotation, pages, 0, blocks[None], scored, key_scale=1.0, value_scale=1.0, out_HT=out
        )
        return out

    def check() -> None:
        expected = torch.empty(H, few.total, device=shape.device)
        reference.learned_scores(
            pages, 0, blocks[None], few, weight_HX, rotation, key_scale=1.0, value_scale=1.0, out_HT=expected
        )
        close(in_place(few), expected, 1e-4)  # both in fp32, in different orders

    rivals = in_torch(shape, tokens, weight_HX, rotation)
    yield Case("learned_scores", f"{tokens} tokens, 1 layer", in_place, check, moved, flops, rivals)

    head_P = torch.arange(H, dtype=torch.int32, device=shape.device).repeat_interleave(tokens // N)
    page_P = pages.page_of(0, head_P, blocks.repeat(H))
    position_PN = torch.arange(tokens // N * N, dtype=torch.int32, device=shape.device).view(-1, N).repeat(H, 1)

    def packed() -> Tensor:
        pages_of = page_P, head_P, position_PN
        return launches.foretell_pages(weight_HX, rotation, pages, *pages_of, key_scale=1.0, value_scale=1.0)

    def check_packed() -> None:
        some = slice(0, len(page_P), max(1, len(page_P) * N // CHECKED))  # of all heads
        arguments = page_P[some], head_P[some], position_PN[some], weight_HX, rotation
        expected = reference.learned_page_scores(pages, *arguments, key_scale=1.0, value_scale=1.0)
        close(packed()[some], expected, 1e-4)

    size = f"{tokens} tokens a head, packed, 1 layer"
    yield Case("learned_page_scores", size, packed, check_packed, moved + 4 * H * tokens, flops, rivals)


def in_torch(shape: Shape, tokens: int, weight_HX: Tensor, rotation: Rotation) -> dict[str, Callable[[], object]]:
    """The formula over dense keys and values, which it turns back."""
    key, value = torch.randn(2, shape.heads, tokens, shape.head_size, dtype=shape.dtype, device=shape.device)
    position = torch.arange(tokens, device=shape.device)
    formula = torch.compile(foretold_peaks) if shape.device == "cuda" else foretold_peaks
    return {"torch, compiled, dense K and V": lambda: formula(key, value, position, weight_HX, rotation)}
