"""Attention over pages of fewer bits, by itself: our compiled function beside vLLM's kernel over as many bytes of plain
ones. `python -m benchmarks.widths_attention`: one thread, random keys and values, one layer of SmolLM2's shape; the
least of some rounds that take turns."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import lists
from benchmarks.latency import ENVIRONMENT

N, D, G, HEADS = 32, 64, 3, 3
GROWTH = 64  # tokens behind the packed ones, in pages as the cache has them
CALLS = 20  # a round


def calls_of(rows: int, pages: int) -> dict[str, Callable[[], Any]]:
    """One layer's attention of so many rows, each of whose heads has so many packed pages, by who computes it."""
    import torch
    from vllm import _custom_ops as ops

    from vllm_defensive.worker.cpu.native import ClassRows, Quantised, class_shape
    from vllm_defensive_kernels.quantised import pack_pages
    from vllm_defensive_kernels.widths import CLASSES, PageShape

    shape, sequences, each = PageShape(N, D), rows * HEADS, pages + GROWTH // N
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(sequences * each, 2 * N * D, generator=generator).bfloat16()
    table_RP = torch.arange(sequences * each, dtype=torch.int32).view(sequences, each)
    numbers, start = torch.arange(N * D), torch.arange(sequences + 1, dtype=torch.int32)
    orders = numbers.view(D, N).T, numbers.view(N, D)
    query = torch.randn(sequences, G, D, generator=generator).bfloat16()
    out = torch.empty_like(query)

    def stock() -> None:
        lengths = torch.full((sequences,), pages * N + GROWTH, dtype=torch.int32)
        settings = {"query_start_loc": start, "seq_lens": lengths, "causal": True, "kv_cache_dtype": "auto"}
        scheduled = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=sequences, num_heads=G, num_kv_heads=1, head_dim=D, dtype=query.dtype, isa="vec",
            sliding_window_size=-1, enable_kv_split=True, **settings,
        )  # fmt: skip
        key, value = (data[:, half * N * D :].as_strided((len(data), 1, N, D), (2 * N * D, 2 * N * D, D, 1),
                      half * N * D) for half in range(2))  # fmt: skip
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=key, value_cache=value, output=out, scale=D**-0.5, alibi_slopes=None,
            sliding_window=-1, block_table=table_RP, softcap=0.0, scheduler_metadata=scheduled, s_aux=None,
            k_scale=1.0, v_scale=1.0, **settings,
        )  # fmt: skip

    def ours(name: str) -> Callable[[], None]:
        tokens, cache = shape.tokens(name), data.clone()
        if CLASSES[name].quantised:
            packed = table_RP[:, :pages].flatten().long()
            made = (torch.randn(len(packed), tokens, D, generator=generator) for _ in range(2))
            counts = torch.full((len(packed),), tokens)
            cache[packed] = pack_pages(*made, counts, shape, name, channel_major=True).view(torch.bfloat16)

        def filled(*size: int, value: int) -> torch.Tensor:
            return torch.full(size, value, dtype=torch.int32)

        described = ClassRows(
            start, table_RP[None], filled(sequences, value=0), filled(sequences, value=GROWTH),
            filled(1, sequences, 1, value=pages), filled(1, sequences, 1, value=pages * tokens),
            class_shape([(name, tokens)]),
        )  # fmt: skip
        function = Quantised(cache, shape, *orders)
        return lambda: function.attend(query, out, described, 0, D**-0.5)

    return {"stock": stock, **{name: ours(name) for name in CLASSES}}


def measure(rows: int, pages: int, rounds: int) -> dict[str, float]:
    """Microseconds of a call, by who computes it."""
    calls = calls_of(rows, pages)
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds + 1):  # the first warms up, and is never the least
        for name, call in calls.items():
            begun = time.perf_counter()
            for _ in range(CALLS):
                call()
            best[name] = min(best[name], 1e6 * (time.perf_counter() - begun) / CALLS)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.widths_attention", description=__doc__)
    parser.add_argument("--rows", type=lists.ints, default=[1, 8, 32])
    parser.add_argument("--pages", type=int, default=8, help="packed pages a head")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file as well")
    arguments = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch

    torch.set_num_threads(1)
    results = []
    for rows in arguments.rows:
        microseconds = measure(rows, arguments.pages, arguments.rounds)
        ratios = {name: each / microseconds["stock"] for name, each in microseconds.items()}
        results.append({"rows": rows, "pages": arguments.pages, "microseconds": microseconds, "vs_stock": ratios})
        print(json.dumps(results[-1]), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
