"""`python -m benchmarks.kernels.sweep [--rows N] [--tokens N] [OP ...]`: each op's times under other constants.

Prints one line a setting, the fastest last. A setting that does not compile, or whose check fails, says so.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

KEEP = 0.2


def settings() -> dict[str, tuple[ModuleType, dict[str, tuple[Any, ...]]]]:
    """Module and candidate constants of each op."""
    from vllm_defensive_kernels import compaction, decode, foretold, norms, reconstruction, window

    return {
        "ragged_paged_decode": (
            decode,
            {"BLOCK_T": (32, 64, 128), "STAGES": (3, 5), "WARPS": (4, 8), "MIN_STEPS": (2, 4)},
        ),
        "window_scores": (window, {"STAGES": (3, 5, 7), "BLOCK_M": (64, 128), "BLOCK_T": (64, 128)}),
        "reconstruction_scores": (
            reconstruction,
            {"BLOCK_T": (64, 128), "WARPS": (4, 8), "PEAK_M": (64, 128), "PEAK_STAGES": (2, 3), "PEAK_WARPS": (4, 8)},
        ),
        "value_norm L1": (norms, {"BLOCK_T": (64, 128), "BLOCK_C": (64, 128, 256), "STAGES": (2, 3, 4)}),
        "learned_scores": (foretold, {"TILE": (2048, 4096, 8192), "WARP_NUMBERS": (512, 1024, 2048)}),
        "learned_page_scores": (foretold, {"WARP_NUMBERS": (256, 512, 1024, 2048)}),
        "compact": (compaction, {"ROW_BYTES": (32, 64, 128, 256)}),
    }


def variants(module: ModuleType, candidates: dict[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Set the module's constants to each combination in turn, and back at the end."""
    before = {name: getattr(module, name) for name in candidates}
    try:
        for values in itertools.product(*candidates.values()):
            chosen = dict(zip(candidates, values, strict=True))
            for name, value in chosen.items():
                setattr(module, name, value)
            yield chosen
    finally:
        for name, value in before.items():
            setattr(module, name, value)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.sweep")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("ops", nargs="*", help="those to try; all if none is named")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.kernels.sweep: no CUDA GPU here", file=sys.stderr)
        return 2
    from benchmarks.kernels.cases import LLAMA_8B, Case, decode_case, eviction_cases
    from benchmarks.kernels.echo import echo_cases
    from benchmarks.kernels.learned import learned_cases
    from benchmarks.kernels.machine import median_seconds

    def sources() -> Iterator[Callable[[], Iterator[Case]]]:
        yield lambda: iter([decode_case(LLAMA_8B, options.rows, options.tokens, KEEP)])
        yield lambda: echo_cases(LLAMA_8B, options.tokens)
        yield lambda: learned_cases(LLAMA_8B, options.tokens)
        yield lambda: eviction_cases(LLAMA_8B, options.tokens, KEEP)

    for source in sources():
        for case in source():
            if case.op not in settings() or (options.ops and case.op not in options.ops):
                continue
            results = []
            for chosen in variants(*settings()[case.op]):
                label = f"{case.op} {' '.join(f'{name}={value}' for name, value in chosen.items())}"
                try:
                    case.check()
                    results.append((median_seconds(case.run, "cuda"), label))
                except Exception as error:  # too much shared memory, too many registers, a wrong result
                    print(f"{label}: {type(error).__name__}: {error}".split("\n")[0][:160], flush=True)
            for seconds, label in sorted(results, reverse=True):
                print(f"{label}: {seconds * 1e3:.3f} ms", flush=True)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
