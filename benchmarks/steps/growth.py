"""How the time of an eviction grows: with the prompt's length, and with the number of evictions in one step.

The evictor of a running engine is called directly, on pages and queries of random numbers: its time does not depend on
what is in them, and no prefill has to be paid for. Times are processor time of the one thread that computes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vllm_defensive
from benchmarks.latency import make_engine, worker_of
from vllm_defensive.packing import Packing, Region
from vllm_defensive.plan import Eviction, Score

KEEP, MIN_TOKENS = 0.2, 64
MANY_TOKENS = 512  # a prompt's length where several are evicted in one step


class Bench:
    """An engine's evictor with a cache full of random numbers."""

    def __init__(self, model: Path) -> None:
        import torch

        engine = make_engine(
            model, **vllm_defensive.engine_kwargs("snapkv", keep=KEEP, min_tokens=MIN_TOKENS, per_request=True)
        )
        worker = worker_of(engine)
        self.worker, self.window = worker, worker.eviction.window
        self.evictor, self.runtime = worker._evictor, worker._runtime
        generator = torch.Generator().manual_seed(0)
        view = self.runtime.attention_view
        for cache in {t.untyped_storage().data_ptr(): t for t in view}.values():
            storage = torch.empty(0, dtype=cache.dtype).set_(cache.untyped_storage())
            storage.copy_(
                torch.randn(1 << 20, generator=generator).repeat(-(-storage.numel() // (1 << 20)))[: storage.numel()]
            )
        self.block_size = worker.vllm_config.cache_config.block_size
        self.num_blocks = worker.vllm_config.cache_config.num_gpu_blocks
        self.queries = torch.randn(self.runtime.windows.blank().shape, generator=generator).to(torch.bfloat16)
        self.runtime.windows.pop = lambda request_id: self.queries

    def evictions(self, policy: str, tokens: int, count: int) -> list[Eviction]:
        """`count` evictions of prompts of `tokens` tokens, each on its own blocks. Raises ValueError if too many."""
        region = Region(tokens, 0, self.window, self.block_size, page_tokens=self.block_size)
        sources, packed = -(-tokens // self.block_size), region.budget_blocks(KEEP, region.plain)
        if 1 + count * (sources + packed) > self.num_blocks:
            raise ValueError(f"{count} prompts of {tokens} tokens do not fit: set VLLM_CPU_KVCACHE_SPACE higher")
        blocks = iter(range(1, self.num_blocks))  # block 0 is vLLM's null block
        take = lambda n: tuple(next(blocks) for _ in range(n))  # noqa: E731
        scores = [Score(f"r{i}", policy, KEEP, region, take(sources)) for i in range(count)]
        return [Eviction(score, Packing(region, take(packed), region.plain)) for score in scores]

    def seconds(self, evictions: Sequence[Eviction]) -> float:
        """Processor time of carrying them out in one step."""
        import torch

        with torch.inference_mode():
            start = time.thread_time()
            self.evictor.run([eviction.score for eviction in evictions], evictions)
            spent = time.thread_time() - start
        for eviction in evictions:
            self.runtime.tables.pop(eviction.request_id)
        return spent


def fit(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The least-squares line through (x, y), R² (how much of the variance of y it explains), and the exponent of the
    power law through the first and the last point: 1 is linear growth, 2 is quadratic growth."""
    import math

    x, y = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(x, y)
    exponent = math.log(y[-1] / y[0]) / math.log(x[-1] / x[0])
    return {"slope": slope, "intercept": intercept, "r2": statistics.correlation(x, y) ** 2, "exponent": exponent}


def growth(
    model: Path, policies: Sequence[str], tokens: Sequence[int], counts: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Median eviction seconds by prompt length, and by number of evictions in a step. The first repeat warms up."""
    bench = Bench(model)
    times: dict[tuple[str, int, int], list[float]] = {}
    for repeat in range(repeats + 1):
        for policy in policies:
            for length, count in [(n, 1) for n in tokens] + [(MANY_TOKENS, n) for n in counts]:
                spent = bench.seconds(bench.evictions(policy, length, count))
                if repeat:
                    times.setdefault((policy, length, count), []).append(spent)
        print(f"  round {repeat} of {repeats}", flush=True)
    middle = {key: statistics.median(values) for key, values in times.items()}
    by_tokens = {p: [(float(n), middle[p, n, 1]) for n in tokens] for p in policies}
    by_count = {p: [(float(n), middle[p, MANY_TOKENS, n]) for n in counts] for p in policies}
    return {
        "settings": {"keep": KEEP, "many_tokens": MANY_TOKENS, "repeats": repeats, "window": bench.window},
        "by_tokens": {p: {"points": points, **fit(points)} for p, points in by_tokens.items()},
        "by_count": {p: {"points": points, **fit(points)} for p, points in by_count.items()},
    }


def draw(result: dict[str, Any], folder: Path) -> list[Path]:
    """The two plots, each with its fitted lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    many = f"evictions in one step, prompts of {result['settings']['many_tokens']} tokens"
    for part, label in (("by_tokens", "tokens of the prompt"), ("by_count", many)):
        figure, axes = plt.subplots(figsize=(7, 4.5))
        for policy, line in result[part].items():
            x, y = zip(*line["points"], strict=True)
            (dots,) = axes.plot(x, y, "o", label=f"{policy} (R² {line['r2']:.3f})")
            axes.plot(x, [line["intercept"] + line["slope"] * value for value in x], color=dots.get_color())
        axes.set(xlabel=label, ylabel="eviction, seconds of processor time", xlim=(0, None), ylim=(0, None))
        axes.legend()
        axes.grid(alpha=0.3)
        paths.append(folder / f"growth_{part}.png")
        figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
        plt.close(figure)
    return paths
