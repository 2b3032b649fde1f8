"""`python -m benchmarks.answers --texts 20 --data DIR --out DIR`

Answers of thousands of tokens are forced token by token, by a request whose cache stays whole and by others that are
evicted to a budget again and again while they generate (`kv_eviction_answers`). At each token the distribution over the
vocabulary is compared: KL(full || evicted). All requests of a text are in the same batches, in float32, so that nothing
else makes them differ.

Suites: `prose`, Python's documentation, and `longbench`, documents of LongBench-E (with --data), go on as they are;
`needles` tell facts in the answer and ask for them at its end, where only the tokens of the values count.

May be stopped at any time and started again with the same folder: only what is missing is measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import lists
from benchmarks.answers import report
from benchmarks.answers.report import FULL
from benchmarks.answers.texts import LONGBENCH, SUITES, ForcedText, forced_texts
from benchmarks.models import ensure_model
from benchmarks.quality.metrics import mean

if TYPE_CHECKING:
    from benchmarks.quality.answers import Forced
    from benchmarks.quality.engine import Engine, Setting

WHOLE_PROMPT = "@prompt"
"""Behind a policy's name: the prompt stays whole, and takes what it needs of the budget. Other names behind an @ are
widths, as `learnedkv@k8v4`."""
POLICIES = ("learnedkv", "learned-halokv", "streamingllm", "random", f"random{WHOLE_PROMPT}")
RESULTS = Path(__file__).parent.parent / "results" / "answers"


@dataclass(frozen=True)
class Choice:
    """A row of the tables, and a column. budget: tokens a head on average, those of a prompt that stays included."""

    policy: str
    budget: int

    def leaves_room(self, prompt: int) -> bool:
        return not self.policy.endswith(WHOLE_PROMPT) or self.budget > prompt

    def setting(self, prompt: int, interval: int) -> Setting:
        from benchmarks.quality.engine import Setting

        if self.policy == FULL:
            return Setting()
        protect = prompt if self.policy.endswith(WHOLE_PROMPT) else 0
        name, _, widths = self.policy.removesuffix(WHOLE_PROMPT).partition("@")
        return Setting(name, budget=self.budget, interval=interval, protect=protect, widths=widths or None)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.answers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="model folder; default: SmolLM2-135M-Instruct, made if it is missing")
    add("--policies", type=lists.names, default=list(POLICIES), help=f"default: {','.join(POLICIES)}")
    add("--budgets", type=lists.ints, default=[256, 512, 1024], help="tokens a head; default: 256,512,1024")
    add("--suites", type=lists.names, help=f"of {','.join(SUITES)}; default: all that there are texts for")
    add("--texts", type=int, default=20, help="of each suite; default: %(default)s")
    add("--data", type=Path, metavar="DIR", help="a folder with longbench-e.jsonl, plain, .gz or .xz")
    add("--prompt", type=int, default=256, help="tokens; default: %(default)s")
    add("--answer", type=int, default=2048, help="tokens; default: %(default)s")
    add("--interval", type=int, default=256, help="tokens between two evictions; default: %(default)s")
    add("--together", type=int, default=2, help="texts in a batch; default: %(default)s")
    add("--dtype", default="float32", help="bfloat16, where pages of fewer bits are compared; default: %(default)s")
    add("--cache-gib", type=int, default=3, help="memory of the KV cache; default: %(default)s")
    add("--out", type=Path, default=RESULTS, help=f"folder of the records; default: {RESULTS}")
    add("--report", action="store_true", help="measure nothing, only write the report")
    chosen = parser.parse_args(arguments)
    chosen.suites = chosen.suites or [suite for suite in SUITES if suite != LONGBENCH or chosen.data]
    for suite in chosen.suites:
        if suite not in SUITES or (suite == LONGBENCH and not chosen.data):
            parser.error(f"--suites {suite}: choose from {', '.join(SUITES)}; {LONGBENCH} with --data")
    for policy in chosen.policies if chosen.dtype == "float32" else ():
        if "@" in policy.removesuffix(WHOLE_PROMPT):
            parser.error(f"--policies {policy}: a budget in tokens of 32 bits is twice as large; add --dtype bfloat16")
    return chosen


def main() -> None:
    chosen = parse()
    chosen.out.mkdir(parents=True, exist_ok=True)
    file = chosen.out / report.RECORDS
    rows = report.read(file)
    if not chosen.report:
        from benchmarks.quality.engine import Engine

        length = chosen.prompt + chosen.answer
        engine = Engine(
            chosen.model or ensure_model(),
            dtype=chosen.dtype,
            cache_gib=chosen.cache_gib,
            max_model_len=length + 1,
        )
        texts = forced_texts(chosen.suites, chosen.texts, chosen.prompt, chosen.answer, engine.encode, chosen.data)
        choices = [Choice(policy, budget) for budget in chosen.budgets for policy in chosen.policies]
        for batch in batches(texts, choices, rows, chosen.together):
            began = time.perf_counter()
            new = list(measure(engine, batch, chosen.interval))
            with file.open("a", encoding="utf-8") as out:
                out.write("".join(json.dumps(row) + "\n" for row in new))
            rows += new
            named = ", ".join(text.name for text, _ in batch)
            print(f"{named}: {len(new)} rows, {time.perf_counter() - began:.0f} s", flush=True)
    print(report.write(rows, chosen.out))


Batch = list[tuple[ForcedText, list[Choice]]]


def batches(
    texts: Iterator[ForcedText], choices: Sequence[Choice], rows: Sequence[dict[str, Any]], size: int
) -> Iterator[Batch]:
    """What is missing of each text, so many texts at once; the full cache, beside itself, of each text once."""
    done = {report.key(row) for row in rows}
    batch: Batch = []
    for text in texts:
        wanted = [Choice(FULL, 0), *(choice for choice in choices if choice.leaves_room(len(text.prompt)))]
        missing = [choice for choice in wanted if (text.name, choice.policy, choice.budget) not in done]
        if missing:
            batch.append((text, missing))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def measure(engine: Engine, batch: Batch, interval: int) -> Iterator[dict[str, Any]]:
    """A row for each text and choice."""
    from benchmarks.quality.answers import Forced
    from benchmarks.quality.engine import Setting

    jobs, forced = [], []
    for text, choices in batch:
        at = frozenset(values_of(text)) if text.asked else range(len(text.answer))
        full = Forced(text.answer, keep=True, at=at)
        jobs.append((text.prompt, full, Setting()))
        for choice in choices:
            # The rows are filled in as the batch goes on, each token's before it is compared with.
            own = Forced(text.answer, full_AV=full.rows, at=at)
            jobs.append((text.prompt, own, choice.setting(len(text.prompt), interval)))
            forced.append((text, choice, own))
    engine.forced(jobs)
    for text, choice, own in forced:
        about = {"text": text.name, "policy": choice.policy, "budget": choice.budget, "interval": interval}
        yield {**about, "prompt": len(text.prompt), "answer": len(text.answer), **counts(text, choice, own, interval)}


def values_of(text: ForcedText) -> Iterator[int]:
    """The places of all values that are asked for."""
    for asked in text.asked:
        yield from range(asked.first, asked.last)


def counts(text: ForcedText, choice: Choice, forced: Forced, interval: int) -> dict[str, Any]:
    """Of a text that asks for facts: the tokens of their values, KL and whether each was the most likely one, value by
    value as well, with the distance from where it was told. Of others: the tokens behind the first eviction, and those
    before it, which must not differ."""
    if text.asked:
        values = [range(asked.first, asked.last) for asked in text.asked]
        each = [mean([forced.kl[i] for i in value]) for value in values]
        exact = [float(all(forced.right[i] for i in value)) for value in values]
        distance = [asked.first - asked.told for asked in text.asked]
        nll = mean([forced.nll[i] for i in values_of(text)])
        kl = mean([forced.kl[i] for i in values_of(text)])
        return {"kl": kl, "exact": mean(exact), "nll": nll, "each_kl": each, "each_exact": exact, "distance": distance}
    first = first_behind(choice, len(text.prompt), interval)
    parts = [forced.kl[i : i + interval] for i in range(first, len(forced.kl), interval)]
    return {
        "first": first,
        "kl": mean(forced.kl[first:]),
        "kl_before": mean(forced.kl[:first]),
        "nll": mean(forced.nll[first:]),
        "kl_parts": [mean(part) for part in parts],
    }


def first_behind(choice: Choice, prompt: int, interval: int) -> int:
    """Place in the answer of the first token that is computed from what an eviction has kept: that of the token that a
    stop ends with is computed in the step that reaches the stop, before it evicts."""
    if choice.policy == FULL:
        return 0
    stop = prompt
    while stop <= choice.budget:
        stop += interval
    return stop - prompt + 1


if __name__ == "__main__":
    main()
