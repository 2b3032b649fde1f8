"""`python -m benchmarks.quality.pages`: what whole pages cost against single tokens at equal memory.

On the masked model, so that any page size can be tried: pages of N tokens, and beside each the same number of entries
chosen one by one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.quality import metrics, plan, ruler
from benchmarks.quality.__main__ import RESULTS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.pages", description=__doc__)
    add = parser.add_argument
    add("--policies", default="snapkv,defensivekv,layer-defensivekv")
    add("--keep", type=float, default=0.2)
    add("--context", type=int, default=1024)
    add("--page-sizes", default="16,32,64,128")
    add("--documents", type=int, default=5)
    add("--questions", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    from tqdm import tqdm
    from transformers import AutoTokenizer

    from benchmarks.models import ensure_model
    from benchmarks.quality.masked import MaskedModel
    from benchmarks.quality.prompts import Prompts
    from vllm_defensive.policy import get_policy

    model, prompts = MaskedModel(ensure_model()), Prompts(AutoTokenizer.from_pretrained(ensure_model()))
    found: dict[tuple[str, int, bool], list[tuple[float, float, int]]] = {}
    for seed in tqdm(range(chosen.seed, chosen.seed + chosen.documents), unit="document", disable=None):
        document = ruler.generate(plan.YARDSTICK, chosen.context - 90, seed, prompts.count)
        for question in document.questions[: chosen.questions]:
            model.prefill(prompts.ask(document, question))
            for policy in map(get_policy, chosen.policies.split(",")):
                scores = model.scores(policy, chosen.keep)
                for size in map(int, chosen.page_sizes.split(",")):
                    for single in (False, True):
                        kept = model.kept(policy, scores, chosen.keep, size, single)
                        entry = (model.divergence(kept), kept.float().mean().item(), seed)
                        found.setdefault((policy.name, size, single), []).append(entry)
    cells = [
        {
            "policy": policy,
            "page_tokens": size,
            "single_tokens": single,
            "kept": metrics.mean([kept for _, kept, _ in entries]),
            "kl": metrics.mean([kl for kl, _, _ in entries]),
            "kl_interval": metrics.interval([kl for kl, _, _ in entries], [seed for _, _, seed in entries]),
            "answers": len(entries),
        }
        for (policy, size, single), entries in found.items()
    ]
    chosen.out.mkdir(parents=True, exist_ok=True)
    settings = {k: str(v) for k, v in vars(chosen).items() if k != "out"}
    (chosen.out / "pages.json").write_text(
        json.dumps({"settings": settings, "cells": cells}, indent=1), encoding="utf-8"
    )
    for cell in cells:
        print(
            f"{cell['policy']:20} {cell['page_tokens']:4} {'single' if cell['single_tokens'] else 'pages':6} "
            f"kept {cell['kept']:.3f} KL {cell['kl']:.4f} [{cell['kl_interval'][0]:.3f}, {cell['kl_interval'][1]:.3f}]"
        )


if __name__ == "__main__":
    main()
