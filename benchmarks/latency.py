"""What eviction costs at prefill and gains at decode, beside stock vLLM in one process: `python -m benchmarks.latency`.

Three cases take turns, so that a change of the machine's speed hits all of them: stock vLLM on the long prompt, stock
vLLM on a prompt as long as what is kept, and vLLM with eviction on the long prompt. Decode steps are timed one by one,
in processor time of the one thread, as are prefills; an eviction's cost is its share of the prefill it belongs to.
Absolute times mean nothing on a shared machine; the ratios are what is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import vllm_defensive
from benchmarks.models import ensure_model

DECODE_STEPS = 24
# Read when vLLM is imported, which happens in `make_engine`.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # one process, one thread: what is compared is work, not scheduling
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass
class Case:
    """One kind of run. Times in seconds of processor time."""

    name: str
    prompt_tokens: int
    engine: Any
    extra_args: dict[str, Any] = field(default_factory=dict)
    decode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    eviction: list[float] = field(default_factory=list)


def make_engine(model: Path, **kwargs: Any) -> Any:
    from vllm import LLM

    return LLM(
        str(model),
        dtype="bfloat16",
        block_size=32,
        enforce_eager=True,
        max_model_len=8192,
        max_num_batched_tokens=2048,
        **kwargs,
    )


def worker_of(engine: Any) -> Any:
    worker = engine.llm_engine.model_executor.driver_worker
    return getattr(worker, "worker", worker)


def run_once(case: Case, batch: int, seed: int) -> None:
    """Prefill `batch` prompts, decode, and add what was measured to the case."""
    import torch
    from vllm import SamplingParams

    engine = case.engine.llm_engine
    case.engine.reset_prefix_cache()
    generator = torch.Generator().manual_seed(seed)
    for i in range(batch):
        tokens = torch.randint(1000, 40000, (case.prompt_tokens,), generator=generator).tolist()
        parameters = SamplingParams(
            temperature=0, max_tokens=DECODE_STEPS + batch * 8, ignore_eos=True, extra_args=case.extra_args or None
        )
        engine.add_request(f"{case.name}-{seed}-{i}", {"prompt_token_ids": tokens}, parameters)
    evictor = getattr(worker_of(case.engine), "_evictor", None)
    spent = 0.0
    if evictor is not None:
        carry_out = type(evictor).run

        def timed(*work: Any) -> None:
            nonlocal spent
            start = time.process_time()
            carry_out(evictor, *work)
            spent += time.process_time() - start

        evictor.run = timed
    first_tokens: set[str] = set()
    start = time.process_time()
    while len(first_tokens) < batch:
        first_tokens.update(output.request_id for output in engine.step() if output.outputs[0].token_ids)
    case.prefill.append(time.process_time() - start - spent)
    case.eviction.append(spent)
    engine.step()  # pays for building tables and giving blocks back
    for _ in range(DECODE_STEPS - 2):
        start = time.process_time()
        engine.step()
        case.decode.append(time.process_time() - start)
    engine.abort_request([f"{case.name}-{seed}-{i}" for i in range(batch)], internal=False)
    while engine.has_unfinished_requests():
        engine.step()


def measure(cases: Sequence[Case], batch: int, repeats: int) -> dict[str, Any]:
    """Run the cases in turns and put them in relation. The first round warms up and does not count."""
    for seed in range(repeats + 1):
        for case in cases:
            run_once(case, batch, seed)
            if seed == 0:
                case.decode.clear(), case.prefill.clear(), case.eviction.clear()
            print(f"  round {seed} of {repeats}: {case.name}", flush=True)
    long, short, evicted = ({k: statistics.median(getattr(c, k)) for k in ("decode", "prefill")} for c in cases)
    shares = [e / p for e, p in zip(cases[2].eviction, cases[2].prefill, strict=True)]
    return {
        "decode_ms": {case.name: 1000 * statistics.median(case.decode) for case in cases},
        "decode_vs_stock_same_prompt": evicted["decode"] / long["decode"],
        "decode_vs_stock_kept_length": evicted["decode"] / short["decode"],
        "prefill_s": long["prefill"],
        "eviction_share_of_prefill": statistics.median(shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=6000)
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--policies", nargs="+", default=["layer-defensivekv", "adakv"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file as well")
    arguments = parser.parse_args()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    model = ensure_model()
    stock = make_engine(model)
    ours = make_engine(model, **vllm_defensive.engine_kwargs("none", per_request=True))
    rows = []
    for policy in arguments.policies:
        for batch in arguments.batch:
            cases = [
                Case(f"stock, {arguments.tokens} tokens", arguments.tokens, stock),
                Case(
                    f"stock, {int(arguments.tokens * arguments.keep)} tokens",
                    int(arguments.tokens * arguments.keep),
                    stock,
                ),
                Case(
                    f"{policy}, {arguments.tokens} tokens",
                    arguments.tokens,
                    ours,
                    {"kv_eviction": policy, "kv_eviction_keep": arguments.keep},
                ),
            ]
            rows.append({"policy": policy, "batch": batch, **measure(cases, batch, arguments.repeats)})
            print(json.dumps(rows[-1], indent=1), flush=True)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(arguments).items() if k != "out"}
        arguments.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
