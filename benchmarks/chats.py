"""What a chat costs in quality that begins each turn with what the last one left: `python -m benchmarks.chats`.

Documents with several hidden facts, one asked for in each turn, the right answers forced (benchmarks/quality). For each
turn the divergence from the full cache, in nats a token: of requests that are evicted at the end of their whole prompt,
the question in the window (`off`), and of a chat whose first turn packs and whose later ones compute their new tokens
over that (`chat`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import lists
from benchmarks.models import ensure_model

RESULTS = Path(__file__).resolve().parent / "results" / "chats"
MODES = ("off", "chat")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct, made if it is missing")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--keep", type=lists.floats, default=[0.2, 0.1])
    parser.add_argument("--tokens", type=int, default=1024, help="of the first turn")
    parser.add_argument("--documents", type=int, default=10, help="seeds 0 and on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    model = ensure_model() if chosen.model is None else chosen.model
    rows = measure(model, chosen.policy, chosen.keep, chosen.tokens, chosen.documents)
    found = {"model": model.name, "policy": chosen.policy, "tokens": chosen.tokens, "rows": rows, "table": table(rows)}
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / f"{model.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    for line in found["table"]:
        print(line)


def measure(model: Path, policy: str, keeps: list[float], tokens: int, documents: int) -> list[dict[str, Any]]:
    """One row for each document, turn, ratio and mode; bf16, as it is served."""
    from benchmarks.quality import ruler
    from benchmarks.quality.answers import Forced
    from benchmarks.quality.engine import Engine, Setting
    from benchmarks.quality.plan import YARDSTICK
    from benchmarks.quality.prompts import Prompts
    from benchmarks.quality.protocols import TEMPLATE_TOKENS

    engine = Engine(model, dtype="bfloat16", learned=None)
    prompts, rows = Prompts(engine.tokenizer), []
    for seed in range(documents):
        document = ruler.generate(YARDSTICK, tokens - TEMPLATE_TOKENS, seed, prompts.count)
        turns = [prompts.ask(document, document.questions[0])]
        for question in document.questions[1:]:
            turns.append(prompts.ask_again(turns[-1], turns[-1].gold, question))
        full = [Forced(turn.gold, keep=True) for turn in turns]
        for turn, answer in zip(turns, full, strict=True):
            engine.forced([(turn.tokens, answer, Setting())])
        for keep in keeps:
            for mode in MODES:
                for number, turn in enumerate(turns):
                    forced, before = Forced(turn.gold, full_AV=full[number].reference()), adoptions(engine)
                    (output,) = engine.forced([(turn.tokens, forced, Setting(policy, keep, reuse=mode))])
                    adopted = adoptions(engine) > before
                    assert adopted == (mode == "chat" and number > 0), "a turn begins with what the last one left"
                    row = {"document": seed, "turn": number + 1, "keep": keep, "mode": mode}
                    cached = output.num_cached_tokens
                    rows.append({**row, "tokens": len(turn.tokens), "cached": cached, **forced.counts(False)})
        print(f"  document {seed + 1} of {documents}", flush=True)
    return rows


def adoptions(engine: Any) -> float:
    """Requests so far that began with what an earlier one had left."""
    return engine.totals()["vllm:kv_eviction_adoptions"]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Means over documents, a line a ratio and mode, a column a turn."""
    from benchmarks.quality.metrics import interval, mean

    turns = sorted({row["turn"] for row in rows})
    lines = ["| keep | reuse | " + " | ".join(f"turn {turn}" for turn in turns) + " |"]
    lines.append("| ---: | --- |" + " ---: |" * len(turns))
    for keep in dict.fromkeys(row["keep"] for row in rows):
        for mode in MODES:
            cells = []
            for turn in turns:
                own = [r for r in rows if (r["keep"], r["mode"], r["turn"]) == (keep, mode, turn)]
                found = [r["kl"] for r in own]
                low, high = interval(found, [r["document"] for r in own])
                cells.append(f"{mean(found):.4f} [{low:.4f}, {high:.4f}]")
            lines.append(f"| {keep} | `{mode}` | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
