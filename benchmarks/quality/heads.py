"""`python -m benchmarks.quality.heads`: which heads keep what, how far two policies agree, and how long each takes.

Reads the audits that the engine writes. For each policy: a heat map of kept pages, the share of its kept entries that
the first policy keeps too, and the time of an eviction (the smallest of the runs: other work on the machine only adds).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.quality import plan, ruler
from benchmarks.quality.__main__ import RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.heads", description=__doc__)
    add = parser.add_argument
    add("--policies", default="layer-defensivekv,layer-defensivekv@value_weight=l2-gram,defensivekv,snapkv")
    add("--keep", type=float, default=0.2)
    add("--context", type=int, default=1024)
    add("--documents", type=int, default=3)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(chosen, Path(folder))
    path = chosen.out / f"heads_{chosen.context}.json"
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    for name, entry in result["policies"].items():
        print(f"{name}: {entry['milliseconds']:.0f} ms, {entry['shared_with_first']:.3f} shared with the first")


def measure(chosen: argparse.Namespace, audits: Path) -> dict[str, Any]:
    """Run every policy on the same prompts. -> what the JSON file holds."""
    from benchmarks.models import ensure_model
    from benchmarks.quality.engine import Engine, Setting

    engine = Engine(ensure_model(), dtype="bfloat16", audit=str(audits))
    from benchmarks.quality.prompts import Prompts
    from benchmarks.quality.variants import resolve
    from vllm_defensive import audit

    prompts, names = Prompts(engine.tokenizer), [resolve(name) for name in chosen.policies.split(",")]
    timer = _Timer(engine)
    masks: dict[str, list[Any]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(chosen.seed, chosen.seed + chosen.documents):
        document = ruler.generate(plan.YARDSTICK, chosen.context - 90, seed, prompts.count)
        prompt = prompts.ask(document, document.questions[0])
        for repeat in range(3):
            for name in names:
                timer.seconds = 0.0
                engine.free([(prompt.tokens, 1, Setting(name, chosen.keep))])
                seconds[name].append(timer.seconds)
                (path,) = audits.glob("*.safetensors")
                if repeat == 0:
                    masks[name].append(audit.load(path).mask())
                path.unlink()
    return {
        "context": chosen.context,
        "keep": chosen.keep,
        "documents": chosen.documents,
        "seed": chosen.seed,
        "policies": {name: _entry(name, masks, names[0], seconds[name], chosen) for name in names},
    }


def _entry(name: str, masks: dict[str, list[Any]], first: str, seconds: list[float], chosen: Any) -> dict[str, Any]:
    shared = [(a & b).sum().item() / a.sum().item() for a, b in zip(masks[name], masks[first], strict=True)]
    share_LH = sum(mask.float().mean(dim=-1) for mask in masks[name]) / len(masks[name])
    try:
        from benchmarks.quality.plots import heat_map

        if "@" not in name:  # of a policy, not of a variant
            path = chosen.out / f"heads_{chosen.context}_{name}.png"
            heat_map(share_LH, 1, path, f"{name}, keep {chosen.keep:g}, {chosen.context} tokens")
    except ImportError:
        pass
    return {
        "milliseconds": 1000 * min(seconds),
        "shared_with_first": sum(shared) / len(shared),
        "kept_share": share_LH.mean().item(),
        "kept_share_LH": [[round(x, 4) for x in row] for row in share_LH.tolist()],
    }


class _Timer:
    """Time spent in the worker's evictions."""

    def __init__(self, engine: Any) -> None:
        self.seconds = 0.0
        worker = engine.llm.llm_engine.model_executor.driver_worker
        evictor = getattr(worker, "worker", worker)._evictor
        run = evictor.run

        def timed(*work: Any) -> None:
            started = time.perf_counter()
            run(*work)
            self.seconds += time.perf_counter() - started

        evictor.run = timed


if __name__ == "__main__":
    main()
