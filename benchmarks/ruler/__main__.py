"""`python -m benchmarks.ruler --model DIR --length 4096 --samples 20 --policies full,snapkv,halokv --keep 0.5,0.2`

Asks a model the questions of NVIDIA's RULER, with its full cache and evicted. May be stopped at any time and started
again with the same file, or with more policies, ratios, tasks, lengths or samples: only what is missing is asked.
`--summary` asks nothing and prints the tables of what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from benchmarks import lists
from benchmarks.ruler import answers, package, samples, summary


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ruler", description=__doc__)
    add = parser.add_argument
    add("--model", type=Path, help="model folder; default: SmolLM2-135M-Instruct, made if it is missing")
    add("--tasks", type=lists.names, default=[], help="default: all thirteen")
    add("--length", type=lists.ints, default=[4096], help="most tokens of a prompt with its answer; default: 4096")
    add("--samples", type=int, default=5, help="of each task and length, from its first on; default: %(default)s")
    add(
        "--policies",
        type=lists.names,
        default=[],
        help="full: evict nothing; default: full and all that users can choose",
    )
    add(
        "--keep",
        type=lists.floats,
        default=[0.75, 0.5, 0.25, 0.2, 0.125],
        help="shares of the cache that stay (kvpress counts what goes); default: 0.75,0.5,0.25,0.2,0.125",
    )
    add(
        "--protocol", type=lists.names, default=[answers.EXCLUDED], help="excluded, included or both; default: excluded"
    )
    add("--dtype", default="bfloat16", help="default: %(default)s")
    add("--page-tokens", type=int, default=32, help="tokens a page; default: %(default)s")
    add("--cache-gib", type=int, default=2, help="memory of the KV cache; default: %(default)s")
    add("--out", type=Path, default=package.CACHE / "answers.jsonl", help="file of the answers; default: %(default)s")
    add("--summary", action="store_true", help="ask nothing, only print the tables")
    add("--compare", type=lists.names, default=[], help="A,B: the difference of two policies, in the tables")
    chosen = parser.parse_args(arguments)
    for protocol in chosen.protocol:
        if protocol not in answers.PROTOCOLS:
            parser.error(f"--protocol {protocol}: choose from {', '.join(answers.PROTOCOLS)}")
    if len(chosen.compare) not in (0, 2):
        parser.error("--compare: name two policies, A,B")
    return chosen


def main() -> None:
    chosen = parse()
    found = answers.Answers(chosen.out)
    if not chosen.summary:
        measure(chosen, found)
    print(summary.tables(found.rows, chosen.policies, chosen.compare))


def measure(chosen: argparse.Namespace, found: answers.Answers) -> None:
    """Ask what has no answer yet, sample by sample, so that a run that is stopped early has a bit of everything."""
    from tqdm import tqdm

    from benchmarks.models import ensure_model

    model, root = chosen.model or ensure_model(), package.ensure()
    wanted = answers.choices(_policies(chosen.policies, model), chosen.keep, chosen.protocol)
    scorers = {name: package.scorer(root, task) for name, task in package.tasks(root).items()}
    todo = [
        (sample, missing)
        for sample in _samples(chosen, root, model)
        if (missing := found.missing(model.name, sample, wanted))
    ]
    if not todo:
        return
    from benchmarks.quality.engine import Engine

    room = max(chosen.length) + 512  # for the chat template, and for `fwe`, which fills a prompt and then answers
    engine = Engine(
        model, dtype=chosen.dtype, page_tokens=chosen.page_tokens, cache_gib=chosen.cache_gib, max_model_len=room
    )
    for sample, missing in tqdm(todo, unit="sample", disable=None):
        rows = answers.ask(engine, sample, missing, scorers[sample.task])
        found.add({"model": model.name, "dtype": chosen.dtype, **row} for row in rows)


def _policies(names: list[str], model: Path) -> list[str]:
    """Checked, variants of policies registered; all that users can choose if none are named."""
    from benchmarks.quality import variants

    names = names or [answers.FULL, *variants.offered(model)]
    return [name if name == answers.FULL else variants.resolve(name) for name in names]


def _samples(chosen: argparse.Namespace, root: Path, model: Path) -> Iterator[samples.Sample]:
    """Round by round: the first sample of every task and length, then the second. Who has fewer is named."""
    tasks = package.tasks(root)
    if unknown := set(chosen.tasks) - set(tasks):
        raise ValueError(f"--tasks {', '.join(sorted(unknown))}: choose from {', '.join(tasks)}")
    columns = []
    for length in chosen.length:
        for name in chosen.tasks or tasks:
            columns.append(samples.load(root, tasks[name], model, length, chosen.samples))
            if len(columns[-1]) < chosen.samples:
                print(f"{name}, {length} tokens: only {len(columns[-1])} samples fit", file=sys.stderr, flush=True)
    return (sample for number in zip_longest(*columns) for sample in number if sample)


if __name__ == "__main__":
    main()
