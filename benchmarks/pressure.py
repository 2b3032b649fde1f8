"""`python -m benchmarks.pressure --texts 16 --pools 4,8,16 --out DIR`

So many requests come at once to a pool that holds so many of them whole, once evicted as they are read, and once when
memory is short. Their answers are forced token by token, and at each token the distribution over the vocabulary is
compared with the full cache's: KL(full || evicted), a mean over each request's answer, text by text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import lists
from benchmarks.answers.texts import ForcedText, prose
from benchmarks.models import ensure_model
from benchmarks.quality.metrics import interval, mean

if TYPE_CHECKING:
    from benchmarks.quality.engine import Engine

BLOCK = 32
RECORDS = "records.jsonl"
Row = dict[str, Any]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pressure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="model folder; default: SmolLM2-135M-Instruct, made if it is missing")
    add("--policies", type=lists.names, default=["halokv", "learnedkv"], help="default: halokv,learnedkv")
    add("--keep", type=float, default=0.2, help="default: %(default)s")
    add("--pools", type=lists.ints, default=[4, 8, 16], help="requests that each holds whole; default: 4,8,16")
    add("--texts", type=int, default=16, help="default: %(default)s")
    add("--prompt", type=int, default=1024, help="tokens; default: %(default)s")
    add("--answer", type=int, default=128, help="tokens; default: %(default)s")
    add("--seed", type=int, default=0, help="of the first text; default: %(default)s")
    add("--out", type=Path, required=True, help="folder of the records")
    add("--report", action="store_true", help="measure nothing, only write the report")
    return parser.parse_args(arguments)


def main() -> None:
    chosen = parse()
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / RECORDS
    if not chosen.report:
        from benchmarks.quality.engine import Engine

        # A block more than all tokens take, of each, and one that is vLLM's.
        blocks = -(-(chosen.prompt + chosen.answer) // BLOCK) + 1
        for pool in chosen.pools:
            engine = Engine(
                chosen.model or ensure_model(),
                max_model_len=chosen.prompt + chosen.answer + BLOCK,
                num_gpu_blocks_override=pool * blocks + 1,
            )
            seeds = range(chosen.seed, chosen.seed + chosen.texts)
            texts = [prose(seed, chosen.prompt, chosen.answer, engine.encode) for seed in seeds]
            for row in measure(engine, texts, chosen.policies, chosen.keep):
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"pool": pool, **row}) + "\n")
            del engine
    told = report([json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()])
    (chosen.out / "report.md").write_text(told, encoding="utf-8")
    print(told)


def measure(engine: Engine, texts: Sequence[ForcedText], policies: Sequence[str], keep: float) -> list[Row]:
    """A row for each text, policy, and time at which it is evicted."""
    from benchmarks.quality.answers import Forced
    from benchmarks.quality.engine import Setting

    full = [Forced(text.answer, keep=True) for text in texts]
    engine.forced([(text.prompt, each, Setting()) for text, each in zip(texts, full, strict=True)])
    rows = []
    for policy in policies:
        for late in (False, True):
            own = [Forced(text.answer, full_AV=each.rows) for text, each in zip(texts, full, strict=True)]
            before = engine.totals()
            setting = Setting(policy, keep, late=late)
            engine.forced([(text.prompt, each, setting) for text, each in zip(texts, own, strict=True)])
            made = {name: value - before.get(name, 0) for name, value in engine.totals().items()}
            assert not made["vllm:kv_eviction_cancelled"], "see the engine's warnings"
            evictions = made["vllm:kv_eviction_requests"] + made["vllm:kv_eviction_repeats"]
            about = {"policy": policy, "keep": keep, "late": late, "evictions": evictions}
            rows += [
                {**about, "text": text.name, "kl": mean(each.kl[1:])} for text, each in zip(texts, own, strict=True)
            ]
    return rows


def report(rows: Sequence[Row]) -> str:
    """Means over the texts, and the mean of what late evictions cost less, with its interval."""
    told = ["| pool | policy | keep | evicted at once: KL | late: KL | difference | evictions |", "|" + " --- |" * 7]
    cells: dict[tuple[int, str, float], dict[bool, dict[str, Row]]] = {}
    for row in rows:
        cells.setdefault((row["pool"], row["policy"], row["keep"]), {}).setdefault(row["late"], {})[row["text"]] = row
    for (pool, policy, keep), by_time in sorted(cells.items()):
        at_once, late = by_time[False], by_time[True]
        texts = sorted(at_once.keys() & late.keys())
        less = [late[text]["kl"] - at_once[text]["kl"] for text in texts]
        low, high = interval(less, texts)
        means = (mean([kind[text]["kl"] for text in texts]) for kind in (at_once, late))
        evictions = " / ".join(f"{next(iter(kind.values()))['evictions']:.0f}" for kind in (at_once, late))
        kls = " | ".join(f"{value:.4f}" for value in means)
        told.append(
            f"| {pool} | {policy} | {keep:g} | {kls} | {mean(less):+.4f} [{low:+.4f}, {high:+.4f}] | {evictions} |"
        )
    return "\n".join(told) + "\n"


if __name__ == "__main__":
    main()
