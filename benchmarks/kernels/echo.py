"""The reconstruction score of one layer: a step's echoes over a document, by either softmax."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case, Shape, close, make_cache, shuffled
from vllm_defensive.worker.cuda import launches
from vllm_defensive_kernels import PagedKV, reference

STEP = 2048  # echoes of a step, and tokens of a chunk: vLLM's own chunks, and the paper's
SINK = 4


def echo_cases(shape: Shape, tokens: int) -> Iterator[Case]:
    """The last step of echoes that repeat the whole document, and that of echoes that repeat its last chunk alone."""
    echoes = min(STEP, tokens)
    pages = make_cache(shape, 2 * (tokens // shape.page_tokens) + 1, 1)
    table = shuffled(2 * (tokens // shape.page_tokens), shape)[None]
    size = (echoes, shape.heads * shape.group, shape.head_size)
    query = torch.randn(size, dtype=shape.dtype, device=shape.device)
    for normalised, first, scored, keys in (
        ("all", 2 * tokens - echoes, (0, tokens), 2 * tokens),
        ("chunk", tokens, (tokens - echoes, tokens), SINK + 2 * echoes),
    ):
        peak = torch.zeros(1, shape.heads, tokens, device=shape.device)
        row = launches.EchoRow(slice(0, echoes), first, table, peak, scored, normalised, SINK)
        yield echo_case(shape, query, pages, row, keys)


def echo_case(shape: Shape, query: Tensor, pages: PagedKV, row: launches.EchoRow, keys: int) -> Case:
    """keys: that the last echo sees."""
    (echoes, num_heads, D), tokens = query.shape, row.peak_LHS.shape[2]
    count, seen = row.scored[1] - row.scored[0], keys - echoes // 2  # the latter in the mean

    def reconstruct(row: launches.EchoRow = row) -> None:
        launches.reconstruct(row, query, pages, 0, scale=D**-0.5, key_scale=1.0)

    def check() -> None:
        few = replace(row, tokens=slice(0, 32), peak_LHS=torch.zeros_like(row.peak_LHS))
        expected = torch.zeros_like(row.peak_LHS[0])
        reconstruct(few)
        reference.reconstruction_scores(
            query[few.tokens], pages, 0, row.table_1B, peak_HS=expected, scored=row.scored, first=row.first,
            normalised=row.normalised, sink=row.sink, scale=D**-0.5, key_scale=1.0,
        )  # fmt: skip
        close(few.peak_LHS[0], expected, 1e-4)  # both in fp32, in different orders

    return Case(
        "reconstruction_scores",
        f"{tokens} tokens, {echoes} echoes, {row.normalised}, 1 layer",
        reconstruct,
        check,
        shape.heads * (keys + count) * shape.width + 2 * query.nbytes + 2 * 4 * shape.heads * count,
        2 * num_heads * D * echoes * (seen + count),
        rivals(shape, query, seen),
    )


def rivals(shape: Shape, query: Tensor, keys: int) -> dict[str, Callable[[], object]]:
    """The model's own attention of these echoes over as many keys, which reads values and gives no maxima."""
    key = torch.randn(1, shape.heads, keys, shape.head_size, dtype=shape.dtype, device=shape.device)
    query_1QTD = query.transpose(0, 1)[None]

    def attention() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query_1QTD, key, key, enable_gqa=True)

    return {"SDPA, dense K and V": attention}
