"""`make demo`: the same questions about the same long documents, to stock vLLM and to vLLM with eviction.

Starts `vllm serve` twice, asks over the OpenAI client for a number hidden in each document, streams the answers, and
prints what each server held in its KV cache, how many such requests its pool would hold, and how fast it decoded.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.documents import Question, make_question
from benchmarks.models import ensure_model
from benchmarks.server import Server
from vllm_defensive.tools.planner import Plan

FOLDER = Path(".demo")
BLOCK_SIZE = 32
POOL_BLOCKS = 700
NAME = "smollm2"


@dataclass(frozen=True)
class Row:
    """One question to one server. held: blocks while it decoded."""

    server: str
    prompt_tokens: int
    right: bool
    held: int
    milliseconds_per_token: float
    seconds_to_first: float

    @property
    def fit(self) -> int:
        """Requests like this one that the pool holds at once (vLLM keeps one block for itself). The last one to come
        must find room for its whole prompt, beside what is kept of it, until it is evicted."""
        prompt = -(-self.prompt_tokens // BLOCK_SIZE)
        first = prompt + self.held if self.held < prompt else self.held
        return Plan(prefill=first, mean=self.held, full=self.held, memory=POOL_BLOCKS - 1).at_once


def ask(server: Server, name: str, question: Question, max_tokens: int) -> Row:
    """Ask one question, print the answer as it arrives, and measure."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    started = time.perf_counter()
    stream = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": question.prompt}],
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        # As many tokens from everyone, special ones visible, so that their times compare.
        extra_body={"ignore_eos": True, "skip_special_tokens": False},
    )
    times: list[float] = []
    text, held, prompt_tokens = "", 0, 0
    for chunk in stream:
        if chunk.usage is not None:
            prompt_tokens = chunk.usage.prompt_tokens
        if not chunk.choices or not chunk.choices[0].delta.content:
            continue
        times.append(time.perf_counter())
        if not text:
            print(f"    first token after {times[0] - started:.1f} s: ", end="", flush=True)
        text += chunk.choices[0].delta.content
        if len(times) < 24:
            print(chunk.choices[0].delta.content.replace("\n", " "), end="", flush=True)
        if len(times) in (8, max_tokens // 2):  # early too: what is one chunk may be several tokens
            held = max(1, round(server.metric("vllm:kv_cache_usage_perc") * (POOL_BLOCKS - 1)))
    print(" ...")
    # The first tokens after the prefill still pay for what follows it; the second half is steady.
    steady = times[len(times) // 2 :]
    per_token = (steady[-1] - steady[0]) / max(1, len(steady) - 1)
    return Row(name, prompt_tokens, question.answer in text, held, 1000 * per_token, times[0] - started)


def run(name: str, model: Path, extra: Sequence[str], questions: Sequence[Question], max_tokens: int) -> list[Row]:
    """All questions to one server."""
    print(f"\n{name}: starting the server (log: {FOLDER / name}.log)", flush=True)
    args = [
        "--served-model-name", NAME, "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "8192",
        "--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(POOL_BLOCKS), *extra,
    ]  # fmt: skip
    started = time.perf_counter()
    with Server(model, args, FOLDER / f"{name}.log") as server:
        print(f"  ready after {time.perf_counter() - started:.0f} s", flush=True)
        rows = []
        for question in questions:
            print(f"  asking about a document: {question.question}", flush=True)
            rows.append(ask(server, name, question, max_tokens))
        if extra:
            freed = server.metric("vllm:kv_eviction_freed_blocks_total")
            print(f"  /metrics: {freed:.0f} blocks freed by eviction")
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as text, one line each."""
    lines = [
        f"{'server':<20}{'prompt':>8}{'answer':>8}{'KV blocks':>11}{'fit in pool':>13}"
        f"{'ms/token':>10}{'first token':>13}"
    ]
    lines += [
        f"{r.server:<20}{r.prompt_tokens:>8}{'right' if r.right else 'WRONG':>8}{r.held:>11}{r.fit:>13}"
        f"{r.milliseconds_per_token:>10.1f}{r.seconds_to_first:>11.1f} s"
        for r in rows
    ]
    return "\n".join(lines)


def token_counter(model: Path) -> Callable[[str], int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: len(tokenizer.encode(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--keep", default="0.2")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4000, 7000], help="document lengths")
    parser.add_argument("--max-tokens", type=int, default=64, help="of each answer, 24 or more")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    model = ensure_model()
    count = token_counter(model)
    questions = [make_question(arguments.seed + i, n, count) for i, n in enumerate(arguments.tokens)]
    audit = FOLDER / "audit"
    eviction = [
        "--kv-eviction",
        arguments.policy,
        "--kv-eviction-keep",
        arguments.keep,
        "--kv-eviction-audit",
        str(audit),
    ]
    rows = run("stock", model, [], questions, arguments.max_tokens)
    rows += run(f"evicted ({arguments.policy})", model, eviction, questions, arguments.max_tokens)

    print(f"\nPool: {POOL_BLOCKS} blocks of {BLOCK_SIZE} tokens. Blocks held and times are of single requests.\n")
    print(table(rows))
    for before, after in zip(rows[: len(questions)], rows[len(questions) :], strict=True):
        ratio, speed = before.held / after.held, before.milliseconds_per_token / after.milliseconds_per_token
        print(f"{before.prompt_tokens} tokens: {ratio:.1f}x fewer blocks, {speed:.2f}x the decode speed")
    print(f"\nWhat each head kept is in {audit}/; see one with\n  python -m vllm_defensive.audit show FILE")


if __name__ == "__main__":
    main()
